"""Who writes each row of each optimizer step: the data, the student anew, or the student in an earlier step. R rows of a step.

It follows from the seed and the step's number, and, where the student's share adapts, from the held-out losses that were measured
on the way, which stand in a file. So all workers, and whoever writes the rows, come to the same.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from actors.config.places import parent_and_name
from actors.config.rollouts import AdaptiveShareConfig, ReplayConfig
from actors.dataloader.sampler import Visits
from actors.storage.folder import Folder, open_folder


def weights_step(step: int, refresh_steps: int, lag: int, inner_epochs: int = 1) -> int:
    """Return after which optimizer step the weights are taken that write the rows of ``step``, which counts from 1.

    Steps come in windows of ``refresh_steps``. The rows of a window are written by the weights with which it begins, or with
    which the one ``lag`` windows before began; those of the first by the weights that the student begins with, after step 0.
    Where each window is learned from ``inner_epochs`` times, ``step`` counts its rows once, and weights count all steps.
    """
    return max(0, (step - 1) // refresh_steps - lag) * refresh_steps * inner_epochs


def steps_written_by(weights: int, refresh_steps: int, lag: int, total_steps: int, inner_epochs: int = 1) -> range:
    """Return the steps whose rows are written by the weights after step ``weights``; empty where nobody waits for them.

    Arguments as of ``weights_step``, whose ``step`` ends at ``total_steps``.
    """
    if weights % (refresh_steps * inner_epochs):
        return range(0)
    window = weights // (refresh_steps * inner_epochs) + lag
    first = 1 if weights == 0 else window * refresh_steps + 1
    return range(first, min((window + 1) * refresh_steps, total_steps) + 1)


def written_by_student(seed: int, step: int, rows: int, share: float) -> np.ndarray:
    """Return a bool [R] mask of the rows of a step that are the student's; each by a toss of its own."""
    return np.random.default_rng([seed, step]).random(rows) < share


@dataclass(frozen=True, slots=True)
class Change:
    """A new share of the rows that the student writes."""

    step: int
    """After which it was decided."""
    share: float
    """0 to 1."""
    loss: float
    """The student's loss on held-out rows then, in nats per target."""


@dataclass(frozen=True, slots=True)
class AdaptiveShares:
    """The shares of a training so far, in a file that the first worker writes and all others follow.

    Args:
        place: path or address of the file.
    """

    place: str

    def read(self) -> tuple[int, list[Change]]:
        """Return until after which step all is decided, and the changes in their order; -1 and none before the first."""
        folder, name = self._file
        try:
            content = json.loads(folder.read(name))
        except FileNotFoundError:
            return -1, []
        return content["decided"], [Change(*one) for one in content["changes"]]

    def write(self, decided: int, changes: list[Change]) -> None:
        """Replace the file whole."""
        rows = [[one.step, one.share, one.loss] for one in changes]
        folder, name = self._file
        folder.begin()
        folder.write(name, json.dumps({"decided": decided, "changes": rows}).encode())

    def after(self, step: int) -> float | None:
        """Return the share that was decided by the end of a step; None if that is still to come."""
        return share_after(step, *self.read())

    @property
    def _file(self) -> tuple[Folder, str]:
        parent, name = parent_and_name(self.place)
        return _opened(parent), name


def share_after(step: int, decided: int, changes: Sequence[Change]) -> float | None:
    """Return the share by the end of a step, of shares that are decided until after another; None if it is not among them."""
    return next(one.share for one in reversed(changes) if one.step <= step) if decided >= step else None


@lru_cache(maxsize=8)
def _opened(place: str) -> Folder:
    return open_folder(place)  # of one in object storage that connects anew


@dataclass(frozen=True, slots=True)
class RowPolicy:
    """What is told of the rows of a training that its student writes."""

    student_share: float
    """Of the rows of each step; at most, where it adapts."""
    refresh_steps: int = 1
    """Optimizer steps between two versions of the weights."""
    lag: int = 0
    """Windows of so many steps by which a step's writer may be older than the step."""
    inner_epochs: int = 1
    """How often the rows of each window are learned from. Steps of this module count them once."""
    replay: ReplayConfig | None = None
    """Rows that the student wrote earlier, to be learned from again."""
    adaptive: AdaptiveShareConfig | None = None
    """How the share grows."""
    shares: str | None = None
    """File of the shares that were decided on the way; None where none are."""

    def weights_step(self, step: int) -> int:
        """Return after which step the weights are taken that write the rows of ``step``, which counts from 1."""
        return weights_step(step, self.refresh_steps, self.lag, self.inner_epochs)

    @property
    def window_steps(self) -> int:
        """Optimizer steps of a window, all visits of its rows together."""
        return self.refresh_steps * self.inner_epochs

    def visits(self, deals: int) -> Visits:
        """Return in which optimizer steps the rows of so many deals are learned from."""
        return Visits(deals, self.refresh_steps, self.inner_epochs)

    def share(self, step: int) -> float | None:
        """Return the student's share of the rows of a step; None if it is not decided yet."""
        if self.shares is None:
            return self.student_share
        return AdaptiveShares(self.shares).after(self.weights_step(step))


@dataclass(frozen=True, slots=True)
class StepSources:
    """Where the rows of a step come from; from the data, but for these."""

    written: np.ndarray
    """bool [R], those to whose prompts the student writes the response anew; in the log they stand in this order."""
    replayed: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Of each row that is taken again the step for which it was written, and its place among that step's."""


class RowSources:
    """Decides where the rows of each step come from.

    Args:
        policy: by what rules.
        seed: of the tosses.
        rows_of: R of a step.
        total_steps: optimizer steps of the training.
    """

    def __init__(self, policy: RowPolicy, seed: int, rows_of: Callable[[int], int], total_steps: int) -> None:
        self.policy = policy
        self._seed, self._rows_of, self._total_steps = seed, rows_of, total_steps
        self._ends = [0]
        """Rows that were written before the end of each step, from step 0 on, as far as it was asked for."""
        self._decided: tuple[int, list[Change]] = -1, []
        """The shares as they were read last: what is decided stays."""

    def are_known(self, step: int) -> bool:
        """Return whether it is decided where the rows of a step come from."""
        return self.share(step) is not None

    def share(self, step: int) -> float | None:
        """Return the student's share of the rows of a step; None if it is not decided yet."""
        if self.policy.shares is None:
            return self.policy.student_share
        if self._decided[0] < (weights := self.policy.weights_step(step)):
            self._decided = AdaptiveShares(self.policy.shares).read()
        return share_after(weights, *self._decided)

    def of_step(self, step: int) -> StepSources:
        """Return where the rows of a step come from, which is decided."""
        if self.policy.replay is not None:
            for earlier in range(len(self._ends), step):
                self._ends.append(self._ends[-1] + int(self._sources(earlier).written.sum()))
        return self._sources(step)

    def _sources(self, step: int) -> StepSources:
        share = self.share(step)
        assert share is not None, "asked for once it is known"
        student, replay = written_by_student(self._seed, step, self._rows_of(step), share), self.policy.replay
        if replay is None or self._ends[step - 1] == 0:
            return StepSources(student)
        tosses = np.random.default_rng([self._seed, step, 1])
        again = student & (tosses.random(len(student)) < self._replay_share(replay, step))
        latest = min(replay.rows, self._ends[step - 1])
        places = self._ends[step - 1] - 1 - tosses.integers(latest, size=len(student))
        return StepSources(student & ~again, {int(row): self._place(int(places[row])) for row in np.flatnonzero(again)})

    def _replay_share(self, replay: ReplayConfig, step: int) -> float:
        return (step - 1) / self._total_steps if replay.share == "progress" else replay.share

    def _place(self, row: int) -> tuple[int, int]:
        """Return for which step a row was written, and its place there; rows count from 0 over all steps."""
        step = int(np.searchsorted(self._ends, row, side="right"))
        return step, row - self._ends[step - 1]
