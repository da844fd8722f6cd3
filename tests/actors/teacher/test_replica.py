"""A replica with a fake teacher, without Ray: what it writes, and what it refuses."""

from pathlib import Path

import pytest

from actors.records import Example
from actors.score_store.store import ScoreStore
from actors.teacher.replica import TeacherReplica
from tests.fakes import FAKE_VOCAB, FakeTeacher, assert_complete, fake_examples, fake_spec, fake_store

ROWS, ROWS_PER_SHARD, TOP_K = 22, 4, 5


@pytest.fixture
def examples() -> list[Example]:
    return fake_examples(ROWS)


@pytest.fixture
def examples_path(tmp_path: Path, examples: list[Example]) -> Path:
    return fake_store(tmp_path, examples, ROWS_PER_SHARD, TOP_K)[0]


@pytest.fixture
def store(tmp_path: Path, examples: list[Example]) -> ScoreStore:
    return fake_store(tmp_path, examples, ROWS_PER_SHARD, TOP_K)[1]


def test_a_replica_writes_its_shard_and_returns_counts(
    examples_path: Path, store: ScoreStore, examples: list[Example], tmp_path: Path
) -> None:
    log = tmp_path / "scored"
    replica = TeacherReplica(fake_spec(TOP_K), FakeTeacher(log=log))
    assert replica.start().vocab_size == FAKE_VOCAB
    result = replica.score_shard(examples_path, Path(store.place), 5)
    assert result.info == store.shard_info(5)
    assert result.tokens == sum(len(example.token_ids) for example in examples[20:])
    assert log.read_text().split() == [example.key for example in examples[20:]]
    for shard in range(5):
        replica.score_shard(examples_path, Path(store.place), shard)
    assert_complete(store, examples)


def test_a_replica_refuses_a_store_of_another_width(examples_path: Path, store: ScoreStore) -> None:
    for replica in (TeacherReplica(fake_spec(4), FakeTeacher()), TeacherReplica(fake_spec(TOP_K), FakeTeacher(vocab_size=65))):
        replica.start()
        with pytest.raises(ValueError, match=r"wants \(top_k, vocab_size\) \(5, 64\), this teacher gives \((4, 64|5, 65)\)"):
            replica.score_shard(examples_path, Path(store.place), 0)


def test_a_replica_refuses_a_k_beyond_its_vocabulary() -> None:
    with pytest.raises(ValueError, match="scores.top_k 64 is too large.* 63 would do"):
        TeacherReplica(fake_spec(64), FakeTeacher()).start()
