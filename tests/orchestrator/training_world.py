"""A training of eight steps on a real Ray Train, and ways to stop and kill it."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup
from transformers import AutoModelForCausalLM

from actors.config.models import OptimizerConfig, TrainConfig
from actors.config.workers import WorkersConfig
from actors.model_source import ModelSource
from actors.monitors.metrics_log import read_metrics
from actors.student.loop import distil
from actors.student.task import TrainingTask
from actors.student.train_checkpoints import NoCheckpoints
from losses.config import AtkdLoss
from losses.weighing_config import DistantTokens
from orchestrator.run.training import train_model
from tests.recovery import Record, record_until
from tests.worlds import scored_world, tiny_llama

TRAIN = TrainConfig(
    epochs=2, batch_rows=8, micro_batch_rows=8, optimizer=OptimizerConfig(learning_rate=3e-3), checkpoint_every_steps=3
)
LOSS = AtkdLoss(kind="atkd", tokens=DistantTokens(fraction=0.9, step_size=0.1, tolerance=0.01, momentum=0.0))
"""Remembers: the share of tokens it teaches follows the loss, so a run that is resumed must know it."""
ROWS = 30  # the last batch of an epoch holds 6 rows, which do not go round four workers


def task_in(folder: Path, world: Path, **changes: Any) -> TrainingTask:
    path, store = scored_world(world, ROWS)
    model = tiny_llama(world / "model", seed=1) if not (world / "model").exists() else world / "model"
    task = TrainingTask(
        name="train", model=ModelSource(str(model)), tokenizer=str(model), lora=None, loss=LOSS, train=TRAIN,
        examples=str(path), store=str(Path(store.place)), top_k=8, wait_seconds=120.0, seed=5, threads=1, gpu=False,
        metrics=str(folder / "metrics"), output=str(folder / "student"),
    )  # fmt: skip
    return replace(task, **changes)


def trained(task: TrainingTask, folder: Path, workers: int = 1) -> dict[str, torch.Tensor]:
    """Train and return the finished weights."""
    train_model(task, WorkersConfig(count=workers, cpus=1), folder / "checkpoints")
    return weights_of(task)


def trained_here(task: TrainingTask) -> dict[str, torch.Tensor]:
    """Train by one worker in this process, without Ray Train, and return the finished weights."""
    distil(task, NoCheckpoints())
    return weights_of(task)


def weights_of(task: TrainingTask) -> dict[str, torch.Tensor]:
    """Return the weights of the finished model."""
    weights: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(task.output).state_dict()
    return weights


def losses_of(folder: Path) -> list[float]:
    return [step["loss"] for step in read_metrics(folder / "metrics" / "train.jsonl")]


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def withhold_shard(store: Path, shard: int) -> str:
    """Hide a shard from readers; return what is needed to give it back."""
    info = store / f"shard-{shard:05d}.json"
    text = info.read_text()
    info.unlink()
    return f"{info.name}\n{text}"


def give_back(store: Path, withheld: str) -> None:
    name, text = withheld.split("\n", 1)
    (store / name).write_text(text)


def when(condition: Callable[[], bool], action: Callable[[], Any]) -> threading.Thread:
    """Do something once a condition holds, beside the test."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)
        action()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def timed(record: Record, folder: Path, harm: Callable[[], Any], step: int) -> Callable[[], None]:
    """Return what does harm to a training and then notes how many seconds it took until the step was done."""

    def broken() -> None:
        harm()
        record_until(record, lambda: len(losses_of(folder)) >= step)

    return broken


def free_groups() -> None:
    """Give back what a killed controller held: Ray Train's own cleaner asks a dashboard for it, and the tests' Ray has none."""
    for number, group in placement_group_table().items():
        if group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(number)))


def processes(name: str) -> list[psutil.Process]:
    """The processes of this test session's own Ray whose command has the name in it."""
    found = []
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended meanwhile
            if name in " ".join(one.cmdline()):
                found.append(one)
    return found


def kill_train_workers() -> None:
    """Kill the training workers that this test session's own Ray started."""
    workers = processes("TrainWorker")
    assert workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
