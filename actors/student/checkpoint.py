"""Checkpoints of a training run: weights and optimizer by torch.distributed.checkpoint, the position as JSON.

Random numbers need no place in it: every step seeds itself by (seed, step, rank).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from actors.dataloader.sampler import SamplerState
from actors.student.plain_checkpoint import read_tensors
from losses.loss_state import LossState

PROGRESS = "progress.json"
ONLY_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
"""Frozen weights under adapters are those the run began with; they are not written again."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands."""

    step: int
    """Optimizer steps done."""
    sampler: SamplerState
    """Rows done."""
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
        plain = {
            "step": progress.step, "sampler": progress.sampler.to_dict(), "schedule": schedule.state_dict(),
            "loss_state": asdict(progress.loss_state),
        }  # fmt: skip
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
    return Progress(plain["step"], SamplerState(**plain["sampler"]), LossState(**plain.get("loss_state", {})))


def whole_weights(student: nn.Module) -> dict[str, Any]:
    """Gather the full weights on the first worker's CPU, whatever way they are spread; all workers call it together."""
    return get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
