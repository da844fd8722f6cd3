"""Checkpoints that hold code: it is not run, and the reader says what it met."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from actors.student.checkpoint import CONTENTS, Progress, load_checkpoint, read_tensors, save_checkpoint
from losses.loss_state import LossState


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def trained_parts() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    student = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    student(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    return student, optimizer, schedule


def test_what_is_written_is_read(tmp_path: Path) -> None:
    torch.manual_seed(1)
    student, optimizer, schedule = trained_parts()
    done = Progress(7, LossState())
    save_checkpoint(tmp_path, student, optimizer, schedule, done, rank=0)
    torch.manual_seed(2)
    other, other_optimizer, other_schedule = trained_parts()
    assert load_checkpoint(tmp_path, other, other_optimizer, other_schedule) == done
    assert torch.equal(other.weight, student.weight)
    assert other_optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert torch.equal(*(one.state_dict()["state"][0]["exp_avg"] for one in (optimizer, other_optimizer)))
    assert other_schedule.state_dict() == schedule.state_dict()


def state(value: Any) -> dict[str, Any]:
    return {"student": {"weight": torch.ones(2)}, "optimizer": {"rate": value}}


@pytest.mark.parametrize("where", ["value", "contents", "contents of a rank"])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, where: str) -> None:
    made = tmp_path / "made"
    folder = tmp_path / "checkpoint"
    dcp.save(state(Harm(made) if where == "value" else 0.5), checkpoint_id=folder)
    if where == "contents":
        (folder / CONTENTS).write_bytes(pickle.dumps(Harm(made)))
    if where == "contents of a rank":  # to which torch turns where the list for all is none
        (folder / CONTENTS).write_bytes(pickle.dumps(None))
        (folder / f"__0{CONTENTS}").write_bytes(pickle.dumps(Harm(made)))
    with pytest.raises(ValueError, match=r"checkpoint holds what no checkpoint .* not read: .*; delete that folder") as told:
        read_tensors(folder, state(0.0))
    assert ("its list of contents is NoneType" if "rank" in where else "mkdir") in str(told.value)
    assert not made.exists()

    with pytest.raises((Exception, dcp.CheckpointException)):
        dcp.load(state(0.0), storage_reader=dcp.FileSystemReader(folder))
        raise ValueError("read to the end")
    assert made.exists(), "torch's own reader runs it: otherwise this test would show nothing"


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x04K\x01.", b"rubbish"])
def test_a_list_of_contents_that_is_none_is_refused_in_words(tmp_path: Path, content: bytes) -> None:
    dcp.save(state(0.5), checkpoint_id=tmp_path)
    (tmp_path / CONTENTS).write_bytes(content)
    with pytest.raises(ValueError, match="holds what no checkpoint of a training does, and is not read: .*; delete that folder"):
        read_tensors(tmp_path, state(0.0))


def test_a_list_of_contents_may_not_reach_through_what_is_known(tmp_path: Path) -> None:
    dcp.save(state(0.5), checkpoint_id=tmp_path)
    # Protocol 4 lets a name have dots, so that a known module would lead anywhere: to its own import of os, say.
    (tmp_path / CONTENTS).write_bytes(
        b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x07os.path\x93."
    )
    with pytest.raises(ValueError, match=r"not read: torch\.distributed\.checkpoint\.filesystem\.os\.path"):
        read_tensors(tmp_path, state(0.0))
