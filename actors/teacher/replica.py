"""The replica: one engine that scores shards of example files into score stores. N targets of a row, V vocabulary."""

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from actors.engines.base import EngineDied, EngineFactory, TeacherEngine, TeacherSpec, require_top_k
from actors.engines.build import build_engine
from actors.examples import ExampleFile
from actors.handles import RemoteMethod
from actors.records import Example, TeacherScores, check_scores, uncertainty
from actors.score_store.sanity import ScoreRange
from actors.score_store.store import ScoreStore, ShardInfo
from actors.teacher.parity import Probe, ScoreParity, compare

CALLS_AT_ONCE = 2
"""Calls a replica takes up together: one has the engine, the other encodes and writes."""


@dataclass(frozen=True, slots=True)
class EngineStarted:
    """What a replica tells the driver once its engine is there."""

    vocab_size: int
    """V, the width of the teacher's logits."""
    way: str = field(default="", compare=False)
    """How the engine comes to its scores, in words."""
    parity: ScoreParity | str | None = None
    """Scores of the probe compared with a plain forward pass; in words why they could not be; none where no probe was given."""
    remark: str = field(default="", compare=False)
    """In words, which rows of the probe were left out of it and why; empty where none was."""


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What a replica tells the driver about a shard it scored."""

    info: ShardInfo
    """What was written."""
    tokens: int
    """Tokens of the shard's rows, prompts included."""
    seconds: float
    """From reading the rows to the rename of the shard."""
    mean_uncertainty: float
    """UNC, averaged over the shard's targets."""


def is_device_fault(error: Exception) -> bool:
    """Return whether a device is to blame, or the connection of several, so that another replica can take over."""
    import torch.distributed

    return isinstance(error, (torch.AcceleratorError, torch.OutOfMemoryError, torch.distributed.DistBackendError))


def print_into(log: Path) -> None:
    """Let this process and those it starts print into a file, those of C++ libraries included."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


class ReplicaHandle(Protocol):
    """Handle of the actor that a ``TeacherReplica`` becomes."""

    @property
    def start(self) -> RemoteMethod[[Probe | None], EngineStarted]:
        """See ``TeacherReplica.start``."""
        ...

    @property
    def answer(self) -> RemoteMethod[[Sequence[Example]], tuple[TeacherScores | None, ...]]:
        """See ``TeacherReplica.answer``."""
        ...

    @property
    def score_shard(self) -> RemoteMethod[[Path, str, int, ScoreRange | None], ShardResult]:
        """See ``TeacherReplica.score_shard``."""
        ...

    @property
    def close(self) -> RemoteMethod[[], None]:
        """See ``TeacherReplica.close``."""
        ...


class TeacherReplica:
    """One engine that scores shards of example files into score stores. Becomes a Ray actor in the pool.

    Calls may come from ``CALLS_AT_ONCE`` threads: while one call encodes and writes its shard, the engine scores the next.
    The engine itself lives in a thread of its own.
    """

    def __init__(
        self, spec: TeacherSpec, engine_factory: EngineFactory = build_engine, log: Path | None = None, pause_seconds: float = 0.0
    ) -> None:
        """``log`` takes what the engine prints, in this process and its own; ``pause_seconds`` pass before it is built."""
        self._spec, self._pause_seconds = spec, pause_seconds
        if log is not None:
            print_into(log)
        self._engine_factory = engine_factory
        self._engine: TeacherEngine | None = None
        self._engine_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._opening = threading.Lock()
        self._examples: dict[str, ExampleFile] = {}
        self._stores: dict[str, ScoreStore] = {}

    def start(self, probe: Probe | None = None) -> EngineStarted:
        """Build the engine, and hold what it serves for the probe's rows against the teacher's plain forward pass.

        Apart from the constructor, so that its error arrives as it was raised.
        """
        return self._engine_thread.submit(self._build, probe).result()

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        """Return the scores of a few rows."""
        return self._engine_thread.submit(self._scores, examples).result()

    def answer(self, examples: Sequence[Example]) -> tuple[TeacherScores | None, ...]:
        """Return the checked scores of a few rows, and None at the end: small enough to be waited for where they are not wanted.

        Raises:
            ValueError: naming the row whose scores cannot come from a working teacher.
        """
        assert self._engine is not None, "start() comes first"
        scores = self.score(examples)
        for example, score in zip(examples, scores, strict=True):
            check_scores(example, score, self._spec.ids_below or self._engine.vocab_size)
        return (*scores, None)

    def score_shard(
        self, examples_path: Path, store_place: str, shard: int, known: ScoreRange | None = None
    ) -> ShardResult:
        """Score the rows of one shard and write it; the arrays stay in this process and on disk.

        ``known`` is where the rows of other shards lie.

        Raises:
            ValueError: if the store wants another K or V than this teacher gives, or a score fails its check.
        """
        start = time.perf_counter()
        examples, store = self._open(examples_path, store_place)
        rows = [examples[position] for position in store.positions(shard)]
        scores = self.score(rows)
        info = store.write_shard(shard, rows, scores, known)
        mean_uncertainty = float(np.concatenate([uncertainty(score) for score in scores]).mean())
        tokens = sum(len(row.token_ids) for row in rows)
        return ShardResult(info, tokens, time.perf_counter() - start, mean_uncertainty)

    def close(self) -> None:
        """Give the device back."""
        if self._engine is not None:
            self._engine_thread.submit(self._engine.close).result()
            self._engine = None

    def _build(self, probe: Probe | None) -> EngineStarted:
        if probe is None or not probe.rows:
            return EngineStarted(self._build_engine(), self._way())
        from actors.teacher.reference_pass import (  # here, so that only a replica that compares waits for them
            compare_row,
            references,
        )

        engine = self._spec.engine
        if engine.tensor_parallel > 1:  # the engine computes in processes of its own, on GPUs, the reference here on CPUs
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="reference") as beside:
                under_way = beside.submit(references, self._spec.model, probe, "cpu")
                vocab_size = self._build_engine()
                expected = under_way.result()
        else:
            expected = references(self._spec.model, probe, "cuda" if engine.gpu else "cpu")  # first: an engine takes all memory
            vocab_size = self._build_engine()
        if isinstance(expected, str):
            return EngineStarted(vocab_size, self._way(), expected)
        pairs = zip(expected.rows, self._scores([one.example for one in expected.rows]), strict=True)
        rows = [compare_row(reference, served, self._spec.ids_below) for reference, served in pairs]
        return EngineStarted(vocab_size, self._way(), compare(rows), expected.remark)

    def _build_engine(self) -> int:
        time.sleep(self._pause_seconds)
        self._engine = self._engine_factory(self._spec)
        require_top_k(self._spec.top_k, self._engine.vocab_size, self._spec.ids_below)
        return self._engine.vocab_size

    def _way(self) -> str:
        assert self._engine is not None, "it was built"
        return self._engine.way

    def _scores(self, rows: Sequence[Example]) -> list[TeacherScores]:
        assert self._engine is not None, "start() comes first"
        step, found = self._spec.engine.rows_per_call, []
        try:
            for first in range(0, len(rows), step):
                found += self._engine.score(rows[first : first + step])
        except Exception as error:
            if is_device_fault(error):
                raise EngineDied(f"its device failed: {type(error).__name__}: {error}") from error
            raise
        return found

    def _open(self, examples_path: Path, store_place: str) -> tuple[ExampleFile, ScoreStore]:
        assert self._engine is not None, "start() comes first"
        with self._opening:
            return self._open_alone(examples_path, store_place, self._engine.vocab_size)

    def _open_alone(self, examples_path: Path, store_place: str, vocab_size: int) -> tuple[ExampleFile, ScoreStore]:
        if store_place not in self._stores:
            store = ScoreStore(store_place)
            wanted, given = (store.top_k, store.vocab_size), (self._spec.top_k, vocab_size)
            if wanted != given:
                raise ValueError(
                    f"the store at {store_place} wants (top_k, vocab_size) {wanted}, this teacher gives {given}; "
                    "open the store for this teacher, or build the teacher for this store"
                )
            self._examples[store_place], self._stores[store_place] = ExampleFile(examples_path), store
        return self._examples[store_place], self._stores[store_place]
