"""Checkpoints of a training run: weights and optimizer by torch.distributed.checkpoint, the position as JSON.

Random numbers need no place in it: every step seeds itself by (seed, step, rank).

Reading one runs nothing that is in it. ``torch.distributed.checkpoint`` keeps its list of contents and all that is no tensor as
pickles, and reads them as such: a pickle can run any code. What our checkpoints hold beside tensors is numbers, tuples and a list
of a few known kinds, and nothing else is let through.
"""

import io
import json
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from losses.loss_state import LossState

PROGRESS = "progress.json"
ONLY_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
"""Frozen weights under adapters are those the run began with; they are not written again."""
CONTENTS = ".metadata"
"""Name of the list of contents."""

KNOWN_KINDS = {
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),  # their names in Python 3.13
    ("pathlib._local", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
}  # fmt: skip
"""Module and name of all that a list of contents is made of, beside the types of numbers."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands."""

    step: int
    """Optimizer steps done."""
    loss_state: LossState
    """What the loss remembers."""


def save_checkpoint(
    folder: Path, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler, progress: Progress, rank: int
) -> None:
    """Write this worker's part of a checkpoint; all workers call it together, each with a folder of its own node.

    Raises:
        OSError: if the disk does not take it, on this worker or another.
    """
    weights, optimizer_state = get_state_dict(student, optimizer, options=ONLY_TRAINED)
    try:
        dcp.save({"student": weights, "optimizer": optimizer_state}, storage_writer=dcp.FileSystemWriter(folder))
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None  # the other wraps it in the tracebacks of all workers
    if rank == 0:
        plain = {"step": progress.step, "schedule": schedule.state_dict(), "loss_state": asdict(progress.loss_state)}
        (folder / PROGRESS).write_text(json.dumps(plain))


def load_checkpoint(folder: Path, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> Progress:
    """Put a checkpoint into the student, the optimizer and the schedule, for any number of workers.

    Raises:
        ValueError: if it holds anything that a checkpoint of a training does not.
    """
    weights, optimizer_state = get_state_dict(student, optimizer, options=ONLY_TRAINED)
    state: dict[str, Any] = {"student": weights, "optimizer": optimizer_state}
    read_tensors(folder, state)
    set_state_dict(
        student, optimizer, model_state_dict=state["student"], optim_state_dict=state["optimizer"], options=ONLY_TRAINED
    )
    plain = json.loads((folder / PROGRESS).read_text())
    schedule.load_state_dict(plain["schedule"])
    # Version 0.1.0 wrote no loss state: its losses had no memory.
    return Progress(plain["step"], LossState(**plain.get("loss_state", {})))


def whole_weights(student: nn.Module) -> dict[str, Any]:
    """Gather the full weights on the first worker's CPU, whatever way they are spread; all workers call it together."""
    return get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def read_tensors(folder: Path, state: dict[str, Any]) -> None:
    """Put a checkpoint into ``state``, in place; all workers call it together.

    Raises:
        ValueError: if it holds anything that a checkpoint of a training does not, or its list of contents cannot be read.
    """
    reader = _ReadContents(folder, _contents(folder))
    try:
        dcp.load(state, storage_reader=reader, planner=_PlainValues())
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise _unknown(folder, cause) if isinstance(cause, pickle.UnpicklingError) else cause from None


class _KnownKinds(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN_KINDS and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class _ReadContents(dcp.FileSystemReader):
    """Takes the list of contents from whoever looked at it, and reads no other: not the one that each rank may have."""

    def __init__(self, folder: Path, contents: Metadata) -> None:
        super().__init__(folder)
        self._contents = contents

    def read_metadata(self) -> Metadata:  # torch asks for a rank's own list only where it can
        self._contents.storage_meta = self._contents.storage_meta or StorageMeta()
        self._contents.storage_meta.load_id = self.load_id
        return self._contents


class _PlainValues(dcp.DefaultLoadPlanner):
    """Reads values that are no tensors as plain ones; torch gets them in bytes of our own making."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        ours = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), ours)
        ours.seek(0)
        super().load_bytes(read_item, ours)


def _contents(folder: Path) -> Metadata:
    try:
        with open(folder / CONTENTS, "rb") as file:
            contents = _KnownKinds(file).load()
    except Exception as error:  # a pickle that is cut or forged can end in any
        raise _unknown(folder, error) from error
    if not isinstance(contents, Metadata):
        raise _unknown(folder, TypeError(f"its list of contents is {type(contents).__name__}"))
    return contents


def _unknown(folder: Path, error: BaseException) -> ValueError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    met = next((line for line in lines if "GLOBAL" in line), lines[0])  # torch says it in the middle of advice
    return ValueError(
        f"the checkpoint {folder} holds what no checkpoint of a training does, and is not read: {met}; delete that folder if you "
        "do not know who wrote it"
    )
