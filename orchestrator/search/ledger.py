"""The record of a search or a comparison: one file of JSON lines that only grows, and what it says when read back.

A line counts once its newline stands: a last line cut short by a kill is ignored, and written over by whoever resumes.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.cluster.redaction import without_private_values
from orchestrator.search.ledger_records import (
    AnyLine,
    Begun,
    Decision,
    Ended,
    FinalStatus,
    Line,
    Measured,
    Rung,
    SearchSpec,
    line_of,
    text_of,
)

Status = Literal["completed", "stopped", "failed", "unfinished"]

MUST_AGREE = ("kind", "name", "metric", "mode", "space", "total_steps", "rungs")
"""What makes a search the same search; the number of trials may grow and the baseline may change."""


@dataclass(frozen=True, slots=True)
class Trial:
    """All that is known of one trial."""

    begun: Begun
    """Its last beginning."""

    rungs: tuple[Rung, ...] = ()
    """What was measured since, in order."""

    ended: Ended | None = None
    """Its end; None while it runs, and after a kill."""

    @property
    def number(self) -> int:
        """Number of the trial, from 0."""
        return self.begun.trial

    @property
    def step(self) -> int:
        """Optimizer steps it is known to have taken."""
        return max([self.ended.step if self.ended else 0, *(rung.step for rung in self.rungs)])

    @property
    def metrics(self) -> Measured:
        """What was measured last; empty before the first rung."""
        if self.ended and self.ended.metrics:
            return self.ended.metrics
        return self.rungs[-1].metrics if self.rungs else {}

    @property
    def seconds(self) -> float:
        """Time it is known to have taken."""
        return max([self.ended.seconds if self.ended else 0.0, *(rung.seconds for rung in self.rungs)])


@dataclass(frozen=True)
class Search:
    """A search or comparison as its ledger tells it."""

    spec: SearchSpec
    """What was asked, as said last."""

    starts: tuple[str, ...]
    """When it was begun and resumed."""

    trials: tuple[Trial, ...] = ()
    """The trials that have begun, by number."""

    def value(self, trial: Trial) -> float | None:
        """Return what the trial is compared by, as measured last; None if it never was or is no finite number."""
        value = trial.metrics.get(self.spec.metric)
        return value if value is not None and math.isfinite(value) else None

    def error(self, trial: Trial) -> str | None:
        """Return why the trial counts as failed; None if it does not. One whose measures are not all finite numbers does."""
        if trial.ended is None:
            return None
        if trial.ended.status == "failed":
            return trial.ended.error or "no error was recorded"
        for step, metrics in [*((rung.step, rung.metrics) for rung in trial.rungs), (trial.step, trial.metrics)]:
            for name, value in metrics.items():
                if value is not None and not math.isfinite(value):
                    return f"{name} is {value} after {step} steps"
        return None if self.value(trial) is not None else f"{self.spec.metric} was not measured"

    def status(self, trial: Trial) -> Status:
        """Return how the trial stands; ``unfinished`` runs still or was killed."""
        if trial.ended is None:
            return "unfinished"
        return "failed" if self.error(trial) else trial.ended.status

    def with_status(self, *statuses: Status) -> list[Trial]:
        """Return the trials that stand so, by number."""
        return [trial for trial in self.trials if self.status(trial) in statuses]


@dataclass
class _Reading:
    """A ledger as far as it has been read."""

    spec: SearchSpec | None = None
    starts: list[str] = field(default_factory=list)
    trials: dict[int, Trial] = field(default_factory=dict)

    def take(self, line: AnyLine) -> None:
        """Take one line in; ValueError if it cannot follow those before."""
        if isinstance(line, SearchSpec):
            if self.spec:
                require_same(self.spec, line)
            self.spec = line
            self.starts.append(line.time)
        elif self.spec is None:
            raise ValueError(f"{line.event} stands before any line of the event search")
        elif isinstance(line, Begun):
            self.trials[line.trial] = Trial(line)
        elif line.trial not in self.trials:
            raise ValueError(f"trial {line.trial} has a line of the event {line.event} and has not begun")
        elif (trial := self.trials[line.trial]).ended:
            raise ValueError(f"trial {line.trial} has ended, and a line of the event {line.event} follows")
        elif isinstance(line, Rung):
            self.trials[line.trial] = Trial(trial.begun, (*trial.rungs, line))
        else:
            self.trials[line.trial] = Trial(trial.begun, trial.rungs, line)


def read_ledger(path: Path) -> Search:
    """Return what a ledger tells.

    Raises:
        ValueError: naming the file, and the line if one is damaged, or if there is no search in it.
    """
    if not path.exists():
        raise ValueError(f"there is no ledger at {path}; a search or a comparison writes it when it begins")
    reading = _Reading()
    for number, line in _whole_lines(path):
        try:
            reading.take(line_of(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if reading.spec is None:
        raise ValueError(f"{path} holds no search; delete it, and the search begins anew")
    return Search(reading.spec, tuple(reading.starts), tuple(trial for _, trial in sorted(reading.trials.items())))


def require_same(ours: SearchSpec, theirs: SearchSpec) -> None:
    """Raise if a ledger is another search's.

    Raises:
        ValueError: with each field that differs, and both values.
    """
    lines = []
    for name in MUST_AGREE:
        one, other = getattr(ours, name), getattr(theirs, name)
        if name == "space":
            lines += [
                f"space.{path}: {one.get(path)!r} here, {other.get(path)!r} there"
                for path in dict.fromkeys([*one, *other])
                if one.get(path) != other.get(path)
            ]
        elif one != other:
            lines.append(f"{name}: {one!r} here, {other!r} there")
    if lines:
        raise ValueError("this is the ledger of another search:\n  " + "\n  ".join(lines))


class Ledger:
    """Writes the lines, each synced to disk before the call returns. One process at a time may hold it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin_search(self, spec: SearchSpec) -> Search:
        """Begin the ledger, or resume it; return what stands in it.

        Raises:
            ValueError: if it is another search's, or damaged.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_cut_line()
        if self.path.exists() and self.path.stat().st_size:
            written = read_ledger(self.path)
            try:
                require_same(_as_written(spec), written.spec)
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}\n{spec.kind}.name=... gives this one a folder of its own") from None
        self._append(spec)
        return read_ledger(self.path)

    def begun(self, trial: int, point: Mapping[str, Any], seed: int, arm: str | None = None) -> None:
        """A trial starts, or starts anew."""
        self._append(Begun(trial=trial, point=dict(point), seed=seed, arm=arm))

    def rung(
        self, trial: int, rung: int, step: int, metrics: Mapping[str, float | None], decision: Decision, seconds: float
    ) -> None:
        """A trial was measured after ``step`` optimizer steps and ``seconds`` of its time."""
        self._append(Rung(trial=trial, rung=rung, step=step, metrics=dict(metrics), decision=decision, seconds=seconds))

    def ended(
        self,
        trial: int,
        status: FinalStatus,
        step: int,
        metrics: Mapping[str, float | None],
        seconds: float,
        student_tokens: int,
        error: str | None = None,
        parameters: int | None = None,
    ) -> None:
        """A trial came to its end; ``error`` says what it failed of, ``parameters`` how many its student has."""
        self._append(
            Ended(
                trial=trial, status=status, step=step, metrics=dict(metrics), seconds=seconds, student_tokens=student_tokens,
                error=_encodable(error), parameters=parameters,
            )
        )  # fmt: skip

    def _append(self, line: Line) -> None:
        with open(self.path, "ab") as file:
            file.write(text_of(line) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _drop_cut_line(self) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        if not content.endswith(b"\n"):
            with open(self.path, "ab") as file:
                file.truncate(content.rfind(b"\n") + 1)


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    *whole, _ = path.read_bytes().split(b"\n")
    return enumerate(whole, start=1)


def _as_written(spec: SearchSpec) -> SearchSpec:
    """Return the spec as a reader gets it: JSON has no tuples."""
    written = line_of(text_of(spec))
    assert isinstance(written, SearchSpec)
    return written


def _encodable(error: str | None) -> str | None:
    """Return the text of an error without secrets, and without halves of characters, which names of files bring along."""
    return None if error is None else without_private_values(error.encode("utf-8", "backslashreplace").decode("utf-8"))
