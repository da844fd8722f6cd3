"""Checkpoints written and read by different numbers of workers, and ones that hold code or rubbish: nothing of it is run."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch import nn

from actors.config.models import LoraAdapter, OptimizerConfig, TrainConfig
from actors.model_source import ModelSource
from actors.student.causal_lm import CausalStudent, prepare_model
from actors.student.checkpoint import Progress, load_checkpoint, save_checkpoint
from actors.student.model import distribute
from actors.student.optimizer import make_optimizer, make_schedule
from actors.student.ranks import Worker
from losses.config import AtkdLoss
from losses.loss_state import LossState
from tests.worlds import tiny_llama

Parts = tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]
DONE = Progress(7, LossState())
WAYS: list[tuple[Any, bool]] = [("replicate", False), ("fsdp", False), ("fsdp", True)]
"""How two workers share a student, and whether it has adapters. Its head is its embeddings."""


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def trained_parts(width: int = 3) -> Parts:
    student = nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    student(torch.ones(4, width)).sum().backward()
    optimizer.step()
    schedule.step()
    return student, optimizer, schedule


def assert_same_state(found: Parts, expected: Parts) -> None:
    """Compare weights, moments, step counts, what stands beside them, and schedules, bit for bit."""
    torch.testing.assert_close(found[0].state_dict(), expected[0].state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(found[1].state_dict()["state"], expected[1].state_dict()["state"], rtol=0, atol=0)
    assert found[1].state_dict()["param_groups"] == expected[1].state_dict()["param_groups"]
    assert found[2].state_dict() == expected[2].state_dict()


@pytest.mark.parametrize("file_bytes", [1 << 29, 20])
def test_what_is_written_is_read(tmp_path: Path, file_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.student.checkpoint.FILE_BYTES", file_bytes)
    torch.manual_seed(1)
    parts = trained_parts()
    save_checkpoint(tmp_path, *parts, DONE, rank=0)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (file_bytes == 20)
    torch.manual_seed(2)
    other = trained_parts()
    other[2].step()
    assert load_checkpoint(tmp_path, *other) == DONE
    assert_same_state(other, parts)


def student_parts(folder: Path, worker: Worker, sharding: Any, adapted: bool, seed: int) -> Parts:
    train = TrainConfig(sharding=sharding)
    torch.manual_seed(seed)
    model = prepare_model(ModelSource(str(folder / "model")), LoraAdapter(rank=2) if adapted else None, train)
    student = distribute(CausalStudent(model, AtkdLoss(kind="atkd")), train, worker)
    optimizer = make_optimizer(student, OptimizerConfig())
    return student, optimizer, make_schedule(optimizer, OptimizerConfig(), total_steps=9)


def rank_main(rank: int, folder: Path) -> None:
    """What each of two processes does: it reads what one has written, and writes it again."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "rendezvous"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for way, (sharding, adapted) in enumerate(WAYS):
        parts = student_parts(folder, Worker(rank, 2, torch.device("cpu")), sharding, adapted, seed=1)
        progress = load_checkpoint(folder / f"by_one_{way}", *parts)
        save_checkpoint(folder / f"by_two_{way}", *parts, progress, rank)
    torch.distributed.destroy_process_group()


def test_two_workers_go_on_where_one_was_and_one_where_two_were(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model", seed=0)
    alone = Worker(0, 1, torch.device("cpu"))
    written = []
    for way, (_, adapted) in enumerate(WAYS):
        student, optimizer, schedule = student_parts(tmp_path, alone, "replicate", adapted, seed=0)
        for weight in student.parameters():
            weight.grad = torch.randn_like(weight) if weight.requires_grad else None
        optimizer.step()
        schedule.step()
        save_checkpoint(tmp_path / f"by_one_{way}", student, optimizer, schedule, DONE, rank=0)
        written.append((student, optimizer, schedule))
    torch.multiprocessing.spawn(rank_main, (tmp_path,), nprocs=2)
    for way, (_, adapted) in enumerate(WAYS):
        assert len(list((tmp_path / f"by_two_{way}").glob("*.safetensors"))) == 2, "each wrote a part"
        read = student_parts(tmp_path, alone, "replicate", adapted, seed=2)
        assert load_checkpoint(tmp_path / f"by_two_{way}", *read) == DONE
        assert_same_state(read, written[way])


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    made, folder = tmp_path / "made", tmp_path / "checkpoint"
    save_checkpoint(folder, *trained_parts(), DONE, rank=0)
    for name in (".metadata", "__0.metadata"):  # where torch's own checkpoints have theirs
        (folder / name).write_bytes(pickle.dumps(Harm(made)))
    load_checkpoint(folder, *trained_parts())
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(pickle.dumps(Harm(made)))
    with pytest.raises(ValueError, match=r"checkpoint is none of this training and is not read: .*; delete that folder"):
        load_checkpoint(folder, *trained_parts())
    assert not made.exists()

    with pytest.raises((Exception, dcp.CheckpointException)):
        dcp.load({"weight": torch.ones(2)}, storage_reader=dcp.FileSystemReader(folder))
        raise ValueError("read to the end")
    assert made.exists(), "torch's own reader runs it: otherwise this test would show nothing"


@pytest.mark.parametrize("content", [b"", b"\x80", b"rubbish", b"\xff" * 16])
def test_a_file_that_is_no_safetensors_is_refused_in_words(tmp_path: Path, content: bytes) -> None:
    save_checkpoint(tmp_path, *trained_parts(), DONE, rank=0)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is none of this training and is not read: .*; delete that folder"):
        load_checkpoint(tmp_path, *trained_parts())


def test_a_checkpoint_of_another_student_is_refused_in_words(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, *trained_parts(), DONE, rank=0)
    with pytest.raises(ValueError, match="is none of this training and is not read: Size mismatch .*; delete that folder"):
        load_checkpoint(tmp_path, *trained_parts(width=4))


def test_a_disk_that_does_not_answer_says_nothing_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise OSError("Stale file handle")

    save_checkpoint(tmp_path, *trained_parts(), DONE, rank=0)
    monkeypatch.setattr(dcp.HuggingFaceStorageReader, "read_data", unreachable)
    with pytest.raises(OSError, match="^Stale file handle$"):
        load_checkpoint(tmp_path, *trained_parts())
