"""Trains one model by Ray Train, and shows how far it is."""

import json
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from ray.exceptions import RayActorError
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer

from actors.config.passes import pass_size
from actors.config.places import within
from actors.config.workers import WorkersConfig
from actors.monitors.metrics_log import read_metrics
from actors.placement import worker_request
from actors.storage.folder import Folder, open_folder
from actors.storage.mirror import kept_alike
from actors.student.task import TrainingTask, WorkerResult
from actors.student.train_checkpoints import PREFIX, damaged_checkpoints
from actors.student.worker import fatal_error_path, read_fatal_error, train_worker
from losses.config import AtkdLoss
from orchestrator.cluster.elastic import NO_TRY_OF_ITS_OWN, train_in_turns
from orchestrator.cluster.logs import ProgressSnapshot
from orchestrator.cluster.progress import logged_progress

logger = logging.getLogger("atkd")

PROGRESS_SECONDS = 10.0
COUNTED = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of the checkpoints that count."""
LIST_LOST = "list-lost"
"""Stands beside the checkpoints while that list was cut short and there is no other."""


class TrainingFailed(RuntimeError):
    """The workers gave up; the message is theirs."""


def train_model(task: TrainingTask, workers: WorkersConfig, checkpoints: str | Path) -> dict[str, float]:
    """Train until the model is written to ``task.output``; resume from the latest checkpoint below ``checkpoints``, a path or
    an address.

    Returns:
        Steps, seconds of the steps themselves, tokens a second, seconds spent waiting for scores, first and last loss.

    Raises:
        TrainingFailed: with the workers' own error.
    """
    metrics = Path(task.metrics) / f"{task.name}.jsonl"
    if task.output is not None and Path(task.output).exists():  # written by rename, after the last step
        return summarize(read_metrics(metrics))
    place = within(str(checkpoints), task.name)
    drop_uncounted_checkpoints(open_folder(place))
    _forget_error(task)
    with (
        _telling_damage(task, open_folder(place)),
        logged_progress(task.name, lambda: _progress(task), PROGRESS_SECONDS),
        _keyboard_interrupt(),
    ):
        try:
            ending = _train(task, workers, str(checkpoints))
        except (WorkerGroupError, TrainingFailedError) as failure:
            if (error := read_fatal_error(task)) is not None:
                raise TrainingFailed(error) from failure
            if not isinstance(failure, WorkerGroupError):
                raise TrainingFailed(f"{task.name}: Ray Train gave up ({' '.join(str(failure).split())})") from failure
            rank, cause = next(iter(failure.worker_failures.items()))
            failure.__cause__ = cause  # the worker's traceback stands in the one, what kind of error it was in the other
            raise TrainingFailed(
                f"{task.name}: worker {rank} failed more often than train.max_failures {task.train.max_failures}; "
                f"the last time with {type(cause).__name__}: {cause}{_remedy(task, cause)}"
            ) from failure
        except RayActorError as failure:  # the actor that holds the workers; they end with it
            raise TrainingFailed(f"{task.name}: Ray Train's controller died ({str(failure).splitlines()[0]})") from failure
    if ending.error:
        raise TrainingFailed(ending.error)
    drop_uncounted_checkpoints(open_folder(place))
    return summarize(read_metrics(metrics))


def _forget_error(task: TrainingTask) -> None:
    """Remove the error that a worker left at an earlier start."""
    if task.mirror is not None:
        task.mirror.discard(fatal_error_path(task))
    else:
        fatal_error_path(task).unlink(missing_ok=True)


def _remedy(task: TrainingTask, cause: BaseException) -> str:
    """Return what would do where a GPU's memory was too small; an empty text for other errors."""
    if not isinstance(cause, torch.OutOfMemoryError):
        return ""
    section = f"{task.name.removeprefix('finetune_')}.finetune.train" if task.name.startswith("finetune_") else "train"
    key, size = pass_size(task.train)
    by_pass = isinstance(task.loss, AtkdLoss) and task.loss.scope == "microbatch"
    smaller = [f"{section}.{key}={size // 2}"] if size > 1 and not by_pass else []
    again = [f"{section}.gradient_checkpointing=true"] if not task.train.gradient_checkpointing else []
    if smaller or again:
        return f"; the same command with {' or '.join([*smaller, *again])} resumes from the last checkpoint"
    return f"; {section}.sharding=fsdp with more workers would do, under another name"


def _train(task: TrainingTask, workers: WorkersConfig, checkpoints: str) -> WorkerResult:
    """Train by as many workers as are wanted, which Ray Train starts again, or by as many as there is room for."""
    failures = task.train.max_failures
    if not workers.elastic:
        return _fit(task, workers, workers.count, checkpoints, FailureConfig(max_failures=failures))
    growing = replace(task, elastic=workers)
    return train_in_turns(
        task.name,
        workers,
        failures,
        train=lambda count: _fit(growing, workers, count, checkpoints, NO_TRY_OF_ITS_OWN),
        scoring=lambda: task.beside_teacher,
    )


def _fit(task: TrainingTask, workers: WorkersConfig, count: int, checkpoints: str, failures: FailureConfig) -> WorkerResult:
    """Have Ray Train train; a training of the same name and place resumes from its latest checkpoint."""
    path, filesystem = open_folder(checkpoints).opened()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"task": task, "checkpoints": within(checkpoints, task.name)},
        torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo", timeout_s=task.train.collective_seconds),
        scaling_config=scaling_of(workers, count),
        run_config=RunConfig(
            name=task.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=failures,
            checkpoint_config=CheckpointConfig(num_to_keep=task.train.keep_checkpoints),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    with kept_alike(task.mirror, seconds=None):
        ending: WorkerResult = trainer.fit().return_value
    return ending


def drop_uncounted_checkpoints(folder: Folder) -> None:
    """Delete checkpoints that no training would take up: whoever wrote them was killed before Ray Train counted them.

    Ray Train writes its list in place. Of one that was cut short by a kill nothing is known, so the list goes, with which it
    would not begin, and all checkpoints stay until there is another.
    """
    try:
        book = folder.read(COUNTED)
    except FileNotFoundError:
        if folder.size(LIST_LOST) is not None:
            return
        book = b"{}"
    try:
        counted = json.dumps(json.loads(book))
    except ValueError:
        folder.write(LIST_LOST, b"")
        logger.warning(f"{folder.place}: Ray Train's list of checkpoints was cut short; the latest that is whole counts")
        folder.remove(COUNTED)
        return
    for name in folder.folders():
        if name.startswith(PREFIX) and name not in counted:
            folder.remove_folder(name)
    folder.remove(LIST_LOST)


def scaling_of(workers: WorkersConfig, count: int) -> ScalingConfig:
    """Tell Ray Train how many workers there are, what each holds, and on which nodes they may stand."""
    return ScalingConfig(
        num_workers=count,
        use_gpu=workers.gpus > 0,
        resources_per_worker=dict(worker_request(workers).amounts),
        label_selector=workers.labels or None,
    )


def summarize(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return the totals of a training run from the metrics of its steps."""
    last = steps[-1]
    seconds = sum(step["seconds"] for step in steps)
    waited = sum(step["waited_seconds"] for step in steps)
    return {
        "steps": last["step"],
        "step_seconds": round(seconds, 2),
        "waited_seconds": round(waited, 2),
        "tokens_per_second": round(sum(step["tokens"] for step in steps) / max(seconds - waited, 1e-9), 1),
        "first_loss": steps[0]["loss"],
        "last_loss": last["loss"],
    }


@contextmanager
def _telling_damage(task: TrainingTask, folder: Folder) -> Iterator[None]:
    """Log afterwards which checkpoints the workers skipped."""
    before = len(damaged_checkpoints(folder))
    try:
        yield
    finally:
        for line in damaged_checkpoints(folder)[before:]:
            logger.warning(
                f"{task.name}: a checkpoint was damaged and passed over, the steps since the one before were done again. {line}"
            )


@contextmanager
def _keyboard_interrupt() -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt: Ray Train's own handler ends the process with exit code 0, and stays installed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, handler)


def _progress(task: TrainingTask) -> ProgressSnapshot | None:
    """Return how far the metrics file has come."""
    steps = read_metrics(Path(task.metrics) / f"{task.name}.jsonl")
    if not steps:
        return None
    step, total = steps[-1]["step"], steps[-1]["total_steps"]
    return ProgressSnapshot(step, f"{task.name}: {progress_line(steps)}", step, total)


def progress_line(steps: list[dict[str, float]]) -> str:
    """Return a line such as ``step 120/300, loss 1.234, 8,100 tokens/s, waited 3 s, 0:42 left``."""
    last, recent = steps[-1], steps[-50:]
    pace = sum(step["seconds"] for step in recent) / len(recent)
    left = time.strftime("%H:%M:%S", time.gmtime((last["total_steps"] - last["step"]) * pace))
    waited = sum(step["waited_seconds"] for step in steps)
    return (
        f"step {last['step']:.0f}/{last['total_steps']:.0f}, loss {last['loss']:.4f}, "
        f"{last['tokens_per_second']:,.0f} tokens/s, waited {waited:.0f} s for scores, {left} left"
    )
