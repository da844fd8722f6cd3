"""What a benchmark says of a model: its figures, and the file that keeps them. The harness itself is not known here."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.files import write_atomically


@dataclass(frozen=True, slots=True)
class BenchmarkFigure:
    """One metric of one task, or of a group of tasks."""

    task: str
    """Name of the task or group."""
    metric: str
    """As the harness calls it, such as ``acc``."""
    filter: str
    """How the answer was taken out of what the model wrote; ``none`` for all of it."""
    value: float
    stderr: float | None
    """Standard error over the rows; None where the harness gives none."""
    shots: int | None
    """Examples before each question; None for a group whose tasks differ."""
    rows: int
    """Rows that were measured."""
    version: str
    """Of the task."""
    dataset: str | None = None
    """Where its rows come from, as on the hub; None for a group, and for files."""
    dataset_config: str | None = None
    """Which part of the data set."""

    @property
    def name(self) -> str:
        """The metric and how the answer was taken, such as ``exact_match, strict-match``."""
        return self.metric if self.filter == "none" else f"{self.metric}, {self.filter}"


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """What came of one name among ``evaluate.benchmarks.tasks`` for one model."""

    task: str
    """The name that was asked for."""
    figures: tuple[BenchmarkFigure, ...]
    """Of the task; of a group its own, or where it has none, and of a tag, those of its tasks."""
    parts: tuple[BenchmarkFigure, ...]
    """Of the tasks of a group."""
    harness: str
    """Version of the harness."""
    seconds: float
    remarks: tuple[str, ...] = ()
    """What else is to be known, such as prompts that were cut."""


def write_result(path: Path, identity: Mapping[str, Any], result: BenchmarkResult) -> None:
    """Write a result beside all that it depends on, as JSON, in one rename."""
    content = {"identity": identity, "result": asdict(result)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False).encode())


def read_result(path: Path) -> BenchmarkResult:
    """Return the result that ``write_result`` wrote."""
    return result_of(json.loads(path.read_text(encoding="utf-8"))["result"])


def result_of(content: Mapping[str, Any]) -> BenchmarkResult:
    """Return a result from the plain fields it was written as."""
    figures = {key: tuple(BenchmarkFigure(**one) for one in content[key]) for key in ("figures", "parts")}
    return BenchmarkResult(**{**content, **figures, "remarks": tuple(content["remarks"])})
