"""The controller of a search: hears what trials measure, writes it into the ledger, and says which of them continue.

It becomes a Ray actor beside the driver. The ledger is all it needs to remember: after a kill another controller reads it and
resumes.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from actors.handles import RemoteMethod
from actors.student.task import ValidationController
from orchestrator.search.ledger import Ledger, Search, read_ledger
from orchestrator.search.ledger_records import FinalStatus, Measured, SearchSpec
from orchestrator.search.schedulers import Scheduler


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a trial is to do."""

    trial: int
    """Its number."""
    point: Mapping[str, Any]
    """What it sets, by dotted path."""
    seed: int
    """Draws the order of its later epochs, dropout and random splits."""
    arm: str | None = None
    """Its arm, in a comparison."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended."""

    status: FinalStatus
    value: float | None
    """What it is compared by, as measured last; None if it never was."""
    rung: int
    """The last rung at which it was measured; -1 if there was none."""


class ControllerHandle(ValidationController, Protocol):
    """Handle of the actor that a ``SearchController`` becomes."""

    @property
    def begin(self) -> RemoteMethod[[Assignment], None]:
        """See ``SearchController.begin``."""
        ...

    @property
    def assignment(self) -> RemoteMethod[[int], Assignment]:
        """See ``SearchController.assignment``."""
        ...

    @property
    def ended(self) -> RemoteMethod[[int, int, int, str | None, int | None], Outcome]:
        """See ``SearchController.ended``."""
        ...


class SearchController:
    """Records a search while its trials run.

    Args:
        path: the ledger, begun before.
        spec: what is searched.
        scheduler: says which trials continue.
    """

    def __init__(self, path: Path, spec: SearchSpec, scheduler: Scheduler) -> None:
        self._ledger = Ledger(path)
        self._spec, self._scheduler = spec, scheduler
        self._assignments: dict[int, Assignment] = {}
        self._begun_at: dict[int, float] = {}
        self._rungs: dict[int, list[Measured]] = {}  # what was measured of each trial, rung after rung
        self._stopped: set[int] = set()
        self._outcomes: dict[int, Outcome] = {}
        for trial in read_ledger(path).trials:
            if trial.ended is not None:  # one that was interrupted begins anew, and its rungs with it
                self._rungs[trial.number] = [dict(rung.metrics) for rung in trial.rungs]
                for number, rung in enumerate(self._rungs[trial.number]):
                    if spec.metric in rung:
                        self._scheduler.take_down(trial.number, number, self._value_of(rung))
                last = len(trial.rungs) - 1
                self._outcomes[trial.number] = Outcome(trial.ended.status, trial.metrics.get(spec.metric), last)

    def begin(self, assignment: Assignment) -> None:
        """A trial is about to start."""
        self._assignments[assignment.trial] = assignment
        self._begun_at[assignment.trial] = time.monotonic()
        self._rungs[assignment.trial] = []
        self._scheduler.begin(assignment.trial)
        self._ledger.begun(assignment.trial, assignment.point, assignment.seed, assignment.arm)

    def assignment(self, trial: int) -> Assignment:
        """Return what a trial is to do."""
        return self._assignments[trial]

    def measured(self, trial: int, rung: int, step: int, measures: Measured, seconds: float) -> bool:
        """Take down what was measured of a trial at a rung; return whether it continues.

        Workers that were started again may come by a rung once more; what was said there the first time stands. Those of a
        trial that is over, its process having died, are told to stop.
        """
        so_far = self._rungs[trial]
        if trial in self._outcomes or rung < len(so_far):
            return trial not in self._outcomes and trial not in self._stopped
        assert rung == len(so_far), f"trial {trial} comes to rung {rung} and was measured at {len(so_far)}"
        goes_on = self._spec.metric not in measures or self._decided(trial, rung, self._value_of(measures))  # answers come last
        self._ledger.rung(trial, rung, step, measures, "continue" if goes_on else "stop", seconds)
        so_far.append(dict(measures))
        if not goes_on:
            self._stopped.add(trial)
        return goes_on

    def _value_of(self, measures: Measured) -> float:
        """Return what trials are compared by; no number where it is undefined, as a kappa of rows of one grade."""
        value = measures[self._spec.metric]
        return math.nan if value is None else value

    def _decided(self, trial: int, rung: int, value: float) -> bool:
        if rung < len(self._spec.rungs) - 1:
            return self._scheduler.goes_on(trial, rung, value)
        self._scheduler.take_down(trial, rung, value)  # nothing is left that could be stopped
        return True

    def ended(
        self, trial: int, step: int, student_tokens: int, error: str | None = None, parameters: int | None = None
    ) -> Outcome:
        """Take down that a trial is over, by its own end, the controller's word or an error."""
        if trial in self._outcomes:
            return self._outcomes[trial]
        rungs = self._rungs[trial]
        status: FinalStatus = "failed" if error is not None else "stopped" if trial in self._stopped else "completed"
        measures = rungs[-1] if rungs else {}
        seconds = time.monotonic() - self._begun_at[trial]
        self._ledger.ended(trial, status, step, measures, seconds, student_tokens, error, parameters)
        self._outcomes[trial] = Outcome(status, measures.get(self._spec.metric), len(rungs) - 1)
        return self._outcomes[trial]

    def search(self) -> Search:
        """Return the search as the ledger has it by now."""
        return read_ledger(self._ledger.path)
