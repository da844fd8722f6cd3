"""The rollout log: rows that the student wrote in training, with the teacher's scores; a log that workers follow while it grows.

A folder, on a disk or in object storage, holds a score store with a shard for each optimizer step, and for each shard two files
that are there before it: the rows as token ids, and what the sampler knew of them. N tokens of a response.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actors.config.places import in_object_storage
from actors.examples import ExampleFile, file_of_examples
from actors.records import Example, TeacherScores
from actors.score_store.store import ScoreStore
from actors.storage.folder import DiskFolder

FIRST_KEPT = "first_kept.txt"
POLL_SECONDS = 0.02
"""Between two looks of a worker that waits: a step may take less than a second."""
POLL_IN_STORAGE_SECONDS = 0.2
MOST_HELD = 8
"""Files that a reader holds."""

NUMBERS = pa.list_(pa.float32())
SCHEMA = pa.schema([
    ("logprobs", NUMBERS), ("ended", pa.bool_()), ("weights_step", pa.int64()), ("drawn_logprobs", NUMBERS),
    ("teacher_logprobs", NUMBERS),
])  # fmt: skip
"""The teacher's of the targets stand here once more, for workers who read those of all rows of a step and the rest of few."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the sampler knew of a row that it wrote."""

    logprobs: np.ndarray
    """float32 [N], the student's log-probability of each target when it was drawn."""
    ended: bool
    """Whether the response ended by itself, and was not cut."""
    weights_step: int
    """After which optimizer step its weights were taken; 0 for those the student begins with."""
    drawn_logprobs: np.ndarray | None = None
    """float32 [N], the log-probability of each target under the mixture of student and teacher from which it was drawn; None
    where the student alone wrote."""


class RolloutLog:
    """The rows of each optimizer step that the student wrote, for writing them and for following them.

    Args:
        place: the folder where ``open_or_create`` began it, by path or address.
    """

    def __init__(self, place: Path | str) -> None:
        self._store = ScoreStore(place)
        self._folder, self._poll_seconds = self._store.folder, poll_seconds(place)
        self._held: dict[str, pa.Buffer] = {}

    @classmethod
    def open_or_create(cls, place: Path | str, identity: Mapping[str, Any], steps: int, batch_rows: int) -> "RolloutLog":
        """Open the log in a folder, or begin it there.

        Args:
            place: path or address of the log's own folder.
            identity: what the scores depend on; ``top_k`` and ``vocab_size`` among it.
            steps: optimizer steps of the training.
            batch_rows: rows of a step; the student may have written fewer of them.

        Raises:
            StoreMismatch: if the log there is of another identity.
        """
        ScoreStore.open_or_create(place, identity, steps * batch_rows, batch_rows, most_shards=steps)
        return cls(place)

    def steps_there(self) -> set[int]:
        """Return the steps, which count from 1, whose rows are there with their scores."""
        return {*range(1, self._store.shard_count + 1)} - {shard + 1 for shard in self._store.missing_shards()}

    def is_there(self, step: int) -> bool:
        """Whether the rows of a step, which counts from 1, are there with their scores."""
        return self._store.is_there(step - 1)

    def wait_for(self, step: int, timeout_seconds: float) -> float:
        """Wait until the rows of a step are there; return the seconds waited.

        Raises:
            ScoringFailed: with the error of sampler or teacher, if they gave up.
            TimeoutError: if the rows did not come in time.
        """
        return self._store.wait_for(step - 1, timeout_seconds, self._poll_seconds)

    def write(
        self, step: int, examples: Sequence[Example], scores: Sequence[TeacherScores], sampled: Sequence[Sampled]
    ) -> None:
        """Write the rows of a step; they are there once all of it is.

        Raises:
            ValueError: naming the row, if a score cannot come from a working teacher.
        """
        columns = [
            pa.array([one.logprobs for one in sampled], NUMBERS),
            pa.array([one.ended for one in sampled]),
            pa.array([one.weights_step for one in sampled], pa.int64()),
            pa.array([one.drawn_logprobs for one in sampled], NUMBERS),
            pa.array([score.target_logprob for score in scores], NUMBERS),
        ]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        files = {_rows_name(step): file_of_examples(examples), _sampled_name(step): sink.getvalue().to_pybytes()}
        with ThreadPoolExecutor(len(files)) as threads:
            list(threads.map(self._folder.write, files, files.values()))
        for name in files:
            self._held.pop(name, None)
        self._store.write_shard(step - 1, examples, scores)

    def examples(self, step: int) -> ExampleFile:
        """Return the rows of a step that is there."""
        name = _rows_name(step)
        return ExampleFile(self._folder.place_of(name), self._content(name))

    def sampled(self, step: int) -> list[Sampled]:
        """Return what the sampler knew of the rows of a step that is there."""
        batch = self._sampled_batch(step)
        logprobs, drawn = batch["logprobs"], batch["drawn_logprobs"]
        rows = zip(batch["ended"].to_pylist(), batch["weights_step"].to_pylist(), strict=True)
        return [
            Sampled(logprobs[row].values.to_numpy(), ended, taken, drawn[row].values.to_numpy() if drawn[row].is_valid else None)
            for row, (ended, taken) in enumerate(rows)
        ]

    def teacher_logprobs(self, step: int, row: int) -> np.ndarray:
        """Return the teacher's log-probability of each target of a row of a step, float32 [N]."""
        numbers: np.ndarray = self._sampled_batch(step)["teacher_logprobs"][row].values.to_numpy()
        return numbers

    def scores(self, step: int, row: int, top_k: int | None = None) -> TeacherScores:
        """Return the teacher's scores of a row of a step."""
        return self._store.scores_at(self._position(step, row), top_k)

    def uncertainty(self, step: int, row: int) -> np.ndarray:
        """Return UNC of each target of a row of a step, float32 [N]."""
        return self._store.uncertainty_at(self._position(step, row))

    def teacher_loss(self, step: int, row: int) -> float:
        """Return the teacher's own mean loss on the targets of a row of a step, in nats."""
        return self._store.teacher_loss_at(self._position(step, row))

    @property
    def first_kept(self) -> int:
        """The first step whose rows are kept; those before it were there, and are gone."""
        try:
            return int(self._folder.read(FIRST_KEPT))
        except FileNotFoundError:
            return 1

    def keep_from(self, step: int) -> None:
        """Remove the rows of all steps before one; nobody may need them any more."""
        if (first := self.first_kept) >= step:
            return
        self._folder.write(FIRST_KEPT, str(step).encode())
        for gone in range(first, step):
            self.discard(gone)

    def discard(self, step: int) -> None:
        """Remove the rows of a step, so that they are missing."""
        self._store.discard_shard(step - 1)
        for name in (_rows_name(step), _sampled_name(step)):
            self._folder.remove(name)
            self._held.pop(name, None)

    def declare_failed(self, error: str) -> None:
        """Tell all who follow that no further rows will come, and why."""
        self._store.declare_failed(error)

    def clear_failure(self) -> None:
        """Begin again after a failure."""
        self._store.clear_failure()

    def _sampled_batch(self, step: int) -> pa.RecordBatch:
        return pa.ipc.open_file(self._content(_sampled_name(step))).get_batch(0)

    def _content(self, name: str) -> pa.Buffer:
        """Return what a file holds; from storage as it is now, for a node's copy might be of a log that stood there before."""
        if isinstance(self._folder, DiskFolder):
            return self._folder.mapped(name)
        if (content := self._held.get(name)) is None:
            for oldest in list(self._held)[: max(0, len(self._held) - MOST_HELD + 1)]:
                self._held.pop(oldest, None)
            content = self._held[name] = pa.py_buffer(self._folder.read(name))
        return content

    def _position(self, step: int, row: int) -> int:
        return (step - 1) * self._store.rows_per_shard + row


def poll_seconds(place: Path | str) -> float:
    """Return how long to wait between two looks for what a step waits for: each look in object storage is a request."""
    return POLL_IN_STORAGE_SECONDS if in_object_storage(place) else POLL_SECONDS


def _rows_name(step: int) -> str:
    return f"written-{step - 1:05d}.arrow"


def _sampled_name(step: int) -> str:
    return f"sampled-{step - 1:05d}.arrow"
