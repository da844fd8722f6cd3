"""Checkpoints of a training run: weights and optimizer as safetensors, the position as JSON; neither can hold code.

Each worker writes its shares by torch.distributed.checkpoint, and any number of workers reads them. What else an optimizer holds
is not written: it is the configuration's, and the schedule's. Random numbers need no place in it: every step seeds itself by
(seed, step, rank).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from losses.loss_state import LossState

PROGRESS = "progress.json"
ONLY_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False, flatten_optimizer_state_dict=True)
"""Frozen weights under adapters are those the run began with; they are not written again."""
FILE_BYTES = 1 << 29
"""Of the tensors of one file. A file is put together in memory before it is written."""


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
    tensors = _tensors_of(student, *get_state_dict(student, optimizer, options=ONLY_TRAINED))
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files_of(tensors), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except dcp.CheckpointException as error:
        raise _first_of(error) from None
    if rank == 0:
        plain = {"step": progress.step, "schedule": schedule.state_dict(), "loss_state": asdict(progress.loss_state)}
        (folder / PROGRESS).write_text(json.dumps(plain))


def load_checkpoint(folder: Path, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> Progress:
    """Put a checkpoint into the student, the optimizer and the schedule, for any number of workers.

    Raises:
        ValueError: if its files are no safetensors, or not those of this student and optimizer.
        OSError: if the disk does not give it, to this worker or another.
    """
    weights, optimizer_state = get_state_dict(student, optimizer, options=ONLY_TRAINED)
    try:
        dcp.load(_tensors_of(student, weights, optimizer_state), storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except dcp.CheckpointException as error:
        cause = _first_of(error)
        if isinstance(cause, OSError):
            raise cause from None
        raise ValueError(
            f"the checkpoint {folder} is none of this training and is not read: {cause}; delete that folder if you do not know "
            "who wrote it"
        ) from None
    set_state_dict(student, optimizer, model_state_dict=weights, optim_state_dict=optimizer_state, options=ONLY_TRAINED)
    plain = json.loads((folder / PROGRESS).read_text())
    schedule.load_state_dict(plain["schedule"])
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    return Progress(plain["step"], LossState(**plain["loss_state"]))


def whole_weights(student: nn.Module) -> dict[str, Any]:
    """Gather the full weights on the first worker's CPU, whatever way they are spread; all workers call it together."""
    return get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _tensors_of(student: nn.Module, weights: Mapping[str, Any], optimizer_state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return all tensors by name; a weight of two names, as a head that is the embeddings, by its first."""
    every = {name.removeprefix("module.") for name, _ in student.named_parameters(remove_duplicate=False)}
    second_names = every - {name.removeprefix("module.") for name, _ in student.named_parameters()}
    found = {f"student.{name}": weight for name, weight in weights.items() if name not in second_names}
    return found | {f"optimizer.{name}": one for name, one in optimizer_state.items() if isinstance(one, Tensor)}


def _files_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return for each tensor the number of its file, from 1."""
    ends = accumulate(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return {name: 1 + end // FILE_BYTES for name, end in zip(tensors, ends, strict=True)}


def _first_of(error: dcp.CheckpointException) -> BaseException:
    """Return what one worker met; the error itself wraps it in the tracebacks of all."""
    cause, _ = next(iter(error.failures.values()))
    return cause
