"""A teacher without a model: scores computed from token ids alone, and every way in which a teacher can go wrong.

It is built through the seam of ``TeacherPool`` and ``TeacherReplica``: an instance of ``FakeTeacher`` is an engine factory.
"""

import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actors.config.models import EngineConfig
from actors.engines.base import EngineDied, TeacherSpec, scores_from_likeliest
from actors.examples import ExampleFile, write_examples
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores, example_key, tail_logmass
from actors.score_store.store import ScoreStore
from tests.recovery import Record, record_recovery

FAKE_VOCAB = 64


def fake_logprobs(token_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """float64 [T, V]; row t, the prediction of token t+1, depends on tokens 0 to t."""
    state = np.cumsum((token_ids.astype(np.float64) + 1) * np.arange(1, len(token_ids) + 1))
    logits = 4 * np.sin(0.7 * state[:, None] + 1.3 * np.arange(vocab_size) ** 1.5)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def expected_scores(example: Example, top_k: int, vocab_size: int = FAKE_VOCAB) -> TeacherScores:
    """What the fake teacher must be found to have said, by sorting each whole distribution."""
    logprobs = fake_logprobs(example.token_ids, vocab_size)[example.target_positions - 1]
    target, ids, values = [], [], []
    for row, token in zip(logprobs, example.targets.tolist(), strict=True):
        others = sorted((other for other in range(vocab_size) if other != token), key=lambda other: -row[other])[:top_k]
        target.append(row[token])
        ids.append(others)
        values.append(row[others])
    topk = np.array(values, dtype=np.float32)
    gold = np.array(target, dtype=np.float32)
    return TeacherScores(example.key, gold, np.array(ids, dtype=np.int32), topk, tail_logmass(gold, topk))


def fake_examples(rows: int, seed: int = 0, longest: int = 20) -> list[Example]:
    """Rows of 4 to ``longest`` random tokens, about the second half of each a response."""
    rng = np.random.default_rng(seed)
    examples = []
    for row in range(rows):
        length = int(rng.integers(4, longest + 1))
        token_ids = rng.integers(0, FAKE_VOCAB, length).astype(np.int32)
        mask = np.arange(length) >= max(1, length // 2)
        examples.append(Example(token_ids, mask, example_key(token_ids, mask), row))
    return examples


def keys_of(file: ExampleFile) -> list[str]:
    """The keys of all rows, in their order."""
    return [file.key(position) for position in range(len(file))]


def fake_store(folder: Path, examples: Sequence[Example], rows_per_shard: int, top_k: int) -> tuple[Path, ScoreStore]:
    """Write the examples into ``folder`` and begin a store for their scores; return the examples' file and the store."""
    write_examples(folder / "train.arrow", examples)
    identity = {"examples": ExampleFile(folder / "train.arrow").hash, "top_k": top_k, "vocab_size": FAKE_VOCAB}
    return folder / "train.arrow", ScoreStore.open_or_create(folder / "store", identity, len(examples), rows_per_shard)


def record_next_shard(record: Record, harmed: Path, store: ScoreStore) -> None:
    """Note how long it took from some harm, which touched a file, until the next shard was written."""
    since = harmed.stat().st_mtime
    written = [path.stat().st_mtime for path in Path(store.place).glob("shard-*.json")]
    record_recovery(record, min(time for time in written if time > since) - since)


def assert_complete(store: ScoreStore, examples: Sequence[Example]) -> None:
    """Every row of the store is what the fake teacher says about that row, and no job left a lease there."""
    fresh = ScoreStore(store.place)
    fresh.verify()
    assert fresh.complete
    for position, example in enumerate(examples):
        wanted, found = expected_scores(example, store.top_k), fresh.scores_at(position)
        assert found.key == example.key
        np.testing.assert_array_equal(found.target_logprob, wanted.target_logprob)
        np.testing.assert_array_equal(found.topk_ids, wanted.topk_ids)
        np.testing.assert_allclose(found.topk_logprobs, wanted.topk_logprobs, atol=2.5e-4)
        np.testing.assert_allclose(found.tail_logmass, wanted.tail_logmass, atol=1e-6)
    assert not list(Path(store.place).glob("*.lease"))


def fake_spec(top_k: int = 5, **engine: object) -> TeacherSpec:
    """A spec for a fake teacher, with small replicas."""
    settings = {"kind": "transformers", "cpus": 0.5, "rows_per_call": 3, "max_restarts": 2, **engine}
    return TeacherSpec(EngineConfig.model_validate(settings), ModelSource("fake"), top_k, longest_row=64)


@dataclass(frozen=True)
class FakeTeacher:
    """Builds fake engines. Calls are counted from 1, anew in each process."""

    vocab_size: int = FAKE_VOCAB
    fails_on_call: int | None = None
    """Raise a RuntimeError."""
    fails_on_key: str | None = None
    """Example on which a RuntimeError is raised; of two shards at a replica, either may meet the engine first."""
    dies_on_call: int | None = None
    """End the process."""
    engine_dies_on_call: int | None = None
    """Report that the engine's own process is gone."""
    device_fails_on_call: int | None = None
    """Raise what torch raises when a GPU fails, and let the engine fail to start once after that."""
    hangs_on_call: int | None = None
    """Never answer."""
    only_once: Path | None = None
    """A file; misbehave only as long as it does not exist, and create it then."""
    poison_key: str | None = None
    """Example on which the process ends; the log then gets a line ``poison``."""
    cure: Path | None = None
    """A file; the poison works only as long as it does not exist."""
    seconds_per_call: float = 0.0
    """How long a call takes at least."""
    returns: str = "scores"
    """``scores``, ``nan``, ``uniform``, ``constant`` (the same whatever the input), or ``flat`` (another teacher's)."""
    largest_file: int | None = None
    """Bytes beyond which this process cannot write a file, as on a full disk."""
    log: Path | None = None
    """File that gets a line with the key of each example that is scored."""
    fails_to_start: str | None = None
    """Message of a ValueError while it is built."""

    def __call__(self, spec: TeacherSpec) -> "FakeEngine":
        if self.fails_to_start:
            raise ValueError(self.fails_to_start)
        if self.device_fails_on_call is not None and self.only_once is not None and self.only_once.exists():
            not_yet = self.only_once.with_suffix(".free")
            if not not_yet.exists():
                not_yet.touch()
                raise ValueError("Free memory on device is less than desired")
        if self.largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest_file, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return FakeEngine(self, spec)


class FakeEngine:
    """An engine that needs no device."""

    def __init__(self, teacher: FakeTeacher, spec: TeacherSpec) -> None:
        self._teacher = teacher
        self._spec = spec
        self._calls = 0
        self.vocab_size = teacher.vocab_size
        self.way = "fake"

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        """Score, or misbehave as told."""
        self._calls += 1
        cured = self._teacher.cure is not None and self._teacher.cure.exists()
        if not cured and self._teacher.poison_key in [example.key for example in examples]:
            self._log(["poison"])
            os._exit(1)
        self._misbehave()
        if self._teacher.fails_on_key in [example.key for example in examples]:
            raise RuntimeError("the fake teacher fails on this row")
        time.sleep(self._teacher.seconds_per_call)
        self._log([example.key for example in examples])
        return [self._score(example) for example in examples]

    def close(self) -> None:
        """Nothing is held."""

    def _log(self, lines: list[str]) -> None:
        if self._teacher.log is not None:
            with open(self._teacher.log, "a") as file:
                file.write("".join(f"{line}\n" for line in lines))

    def _misbehave(self) -> None:
        teacher, call = self._teacher, self._calls
        if call not in (
            teacher.fails_on_call, teacher.dies_on_call, teacher.engine_dies_on_call, teacher.device_fails_on_call,
            teacher.hangs_on_call,
        ):  # fmt: skip
            return
        if teacher.only_once is not None:
            if teacher.only_once.exists():
                return
            teacher.only_once.touch()
        if call == teacher.fails_on_call:
            raise RuntimeError(f"call {call} of the fake teacher fails")
        if call == teacher.dies_on_call:
            os._exit(1)
        if call == teacher.engine_dies_on_call:
            raise EngineDied("the engine's process is gone")
        if call == teacher.device_fails_on_call:
            import torch

            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        time.sleep(3600)

    def _score(self, example: Example) -> TeacherScores:
        logprobs = fake_logprobs(example.token_ids, self.vocab_size)[example.target_positions - 1]
        if self._teacher.returns == "nan":
            logprobs = logprobs * np.nan
        if self._teacher.returns == "uniform":
            logprobs = np.full_like(logprobs, -np.log(self.vocab_size))
        if self._teacher.returns == "constant":
            logprobs = np.tile(fake_logprobs(np.zeros(1), self.vocab_size), (len(logprobs), 1))
        if self._teacher.returns == "flat":
            logprobs = 0.1 * logprobs
            logprobs -= np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
        candidates = np.argsort(-logprobs, axis=1)
        rows = np.arange(len(logprobs))
        values = np.take_along_axis(logprobs, candidates, axis=1)
        scores = scores_from_likeliest(example, logprobs[rows, example.targets], candidates, values, self._spec)
        assert scores is not None
        return scores
