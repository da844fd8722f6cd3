"""What a training run did, step by step: a line of JSON each, and beside it whatever else shows it."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from actors.config.models import TrainConfig
from actors.config.tracking import TrackingConfig
from actors.files import write_atomically
from actors.monitors.prometheus import StudentMetrics
from losses.config import LossConfig
from losses.distillation import LossSums


class StepLog(Protocol):
    """Where steps are recorded."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record one step."""

    def close(self) -> None:
        """Flush."""


class LoggedTask(Protocol):
    """What the logs know of a training."""

    @property
    def name(self) -> str:
        """Name of the training, also of its files."""
    @property
    def run(self) -> str:
        """Name of the run it belongs to."""
    @property
    def metrics(self) -> str:
        """Folder of the files."""
    @property
    def tracking(self) -> TrackingConfig:
        """Where steps are shown besides the files."""
    @property
    def loss(self) -> LossConfig:
        """What is minimised."""
    @property
    def train(self) -> TrainConfig:
        """How much, how large, how often."""
    @property
    def seed(self) -> int:
        """Of all draws."""
    @property
    def top_k(self) -> int:
        """How many of the store's K are used."""


class MetricsLog:
    """Hands each step to whoever keeps or shows it."""

    def __init__(self, logs: Sequence[StepLog]) -> None:
        self._logs = logs

    @staticmethod
    def on_first_worker(rank: int, task: LoggedTask, first_step: int) -> StepLog:
        """Return all logs of a task on rank 0, and one that records nothing elsewhere: sums are those of all workers already."""
        if rank != 0:
            return NoLog()
        folder = Path(task.metrics)
        logs: list[StepLog] = [JsonLines(folder, task.name, first_step), StudentMetrics(task.run, task.name)]
        if task.tracking.tensorboard:
            logs.append(Board(folder, task.name, first_step))
        return MetricsLog(logs + _trackers(task, folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record one step."""
        for log in self._logs:
            log.write(step, values)

    def close(self) -> None:
        """Flush all."""
        for log in self._logs:
            log.close()


class JsonLines:
    """Appends a line a step; a resumed run first drops the lines of the steps it will repeat."""

    def __init__(self, folder: Path, name: str, first_step: int) -> None:
        path = folder / f"{name}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line["step"] < first_step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  # closed in close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record one step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Flush."""
        self._file.close()


class Board:
    """TensorBoard; it too drops the steps that a resumed run will repeat."""

    def __init__(self, folder: Path, name: str, first_step: int) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard" / name), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record one step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class NoLog:
    """Records nothing."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _trackers(task: LoggedTask, folder: Path) -> list[StepLog]:
    """Open the services that the task names; their packages are extras, imported only here."""
    about = {"loss": task.loss.model_dump_json(), "train": task.train.model_dump_json(), "seed": task.seed, "top_k": task.top_k}
    logs: list[StepLog] = []
    if task.tracking.wandb is not None:
        from actors.monitors.wandb import WandbLog

        logs.append(WandbLog(task.tracking.wandb, folder, task.run, task.name, about))
    if task.tracking.mlflow is not None:
        from actors.monitors.mlflow import MlflowLog

        logs.append(MlflowLog(task.tracking.mlflow, folder, task.run, task.name, about))
    return logs


def step_metrics(
    sums: LossSums, loss: LossConfig, tokens: int, epoch: float, started: float, waited_seconds: float, learning_rate: float,
    gradient_norm: float, total_steps: int, workers: int,
) -> dict[str, float]:  # fmt: skip
    """Return what is recorded of a step; terms are means in nats over the tokens they speak of."""
    seconds = time.perf_counter() - started
    return {
        "loss": float(sums.loss),
        **sums.means(loss),
        "learning_rate": learning_rate,
        "gradient_norm": gradient_norm,
        "epoch": epoch,
        "total_steps": total_steps,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / max(seconds - waited_seconds, 1e-9),
        "waited_seconds": waited_seconds,
        "workers": workers,
    }


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics file; a last line that was cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
