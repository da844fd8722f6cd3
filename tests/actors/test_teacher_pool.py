"""The pool with a fake teacher: what it hands out, and what is left on disk whatever happens to its replicas."""

from pathlib import Path

import numpy as np
import pytest

from actors.examples import ExampleFile, write_examples
from actors.records import Example
from actors.score_store import ScoreStore
from actors.teacher import TeacherReplica
from actors.teacher_pool import ShardQueue, TeacherFailed, TeacherPool
from tests.fakes import FAKE_VOCAB, FakeTeacher, expected_scores, fake_examples, fake_spec

ROWS, ROWS_PER_SHARD, TOP_K = 22, 4, 5


@pytest.fixture
def examples() -> list[Example]:
    return fake_examples(ROWS)


@pytest.fixture
def examples_path(tmp_path: Path, examples: list[Example]) -> Path:
    write_examples(tmp_path / "train.arrow", examples)
    return tmp_path / "train.arrow"


@pytest.fixture
def store(tmp_path: Path, examples_path: Path) -> ScoreStore:
    identity = {"examples": ExampleFile(examples_path).hash, "top_k": TOP_K, "vocab_size": FAKE_VOCAB}
    return ScoreStore.open_or_create(tmp_path / "store", identity, ROWS, ROWS_PER_SHARD)


def assert_complete(store: ScoreStore, examples: list[Example]) -> None:
    """Every row of the store is what the fake teacher says about that row."""
    fresh = ScoreStore(store.path)
    fresh.verify()
    assert fresh.complete
    for position, example in enumerate(examples):
        wanted, found = expected_scores(example, TOP_K), fresh.scores_at(position)
        assert found.key == example.key
        np.testing.assert_array_equal(found.target_logprob, wanted.target_logprob)
        np.testing.assert_array_equal(found.topk_ids, wanted.topk_ids)
        np.testing.assert_allclose(found.topk_logprobs, wanted.topk_logprobs, atol=2.5e-4)
        np.testing.assert_allclose(found.tail_logmass, wanted.tail_logmass, atol=1e-6)


# ---- the queue


def test_shards_come_in_order_and_those_handed_back_come_first() -> None:
    queue = ShardQueue(range(5), max_retries=1)
    assert [queue.next(), queue.next(), queue.next()] == [0, 1, 2]
    queue.hand_back([1, 2])
    assert queue.died_on(0) is None
    assert [queue.next() for _ in range(len(queue))] == [0, 1, 2, 3, 4]


def test_a_shard_is_tried_once_and_as_often_again_as_allowed() -> None:
    queue = ShardQueue([7, 8], max_retries=2)
    for _ in range(2):
        assert queue.next() == 7
        assert queue.died_on(7) is None
    queue.next()
    assert queue.died_on(7) == 3
    assert ShardQueue([1], max_retries=0).died_on(1) == 1


# ---- the replica, without Ray


def test_a_replica_writes_its_shard_and_returns_counts(
    examples_path: Path, store: ScoreStore, examples: list[Example], tmp_path: Path
) -> None:
    log = tmp_path / "scored"
    replica = TeacherReplica(fake_spec(TOP_K), FakeTeacher(log=log))
    assert replica.start() == FAKE_VOCAB
    result = replica.score_shard(examples_path, store.path, 5)
    assert result.info == store.shard_info(5)
    assert result.tokens == sum(len(example.token_ids) for example in examples[20:])
    assert log.read_text().split() == [example.key for example in examples[20:]]
    for shard in range(5):
        replica.score_shard(examples_path, store.path, shard)
    assert_complete(store, examples)


def test_a_replica_refuses_a_store_of_another_width(examples_path: Path, store: ScoreStore) -> None:
    for replica in (TeacherReplica(fake_spec(4), FakeTeacher()), TeacherReplica(fake_spec(TOP_K), FakeTeacher(vocab_size=65))):
        replica.start()
        with pytest.raises(ValueError, match=r"wants \(top_k, vocab_size\) \(5, 64\), this teacher gives \((4, 64|5, 65)\)"):
            replica.score_shard(examples_path, store.path, 0)


def test_a_replica_refuses_a_k_beyond_its_vocabulary() -> None:
    with pytest.raises(ValueError, match="scores.top_k 64 is too large.* 63 would do"):
        TeacherReplica(fake_spec(64), FakeTeacher()).start()


# ---- the pool, in Ray


@pytest.mark.ray
def test_each_row_is_scored_once_and_a_second_call_scores_nothing(
    local_ray: None, examples_path: Path, store: ScoreStore, examples: list[Example], tmp_path: Path
) -> None:
    log = tmp_path / "scored"
    with TeacherPool(fake_spec(TOP_K, replicas=2), engine_factory=FakeTeacher(log=log)) as pool:
        results = list(pool.score_missing(examples_path, store))
        assert sorted(result.info.shard for result in results) == [0, 1, 2, 3, 4, 5]
        assert sum(result.tokens for result in results) == sum(len(example.token_ids) for example in examples)
        assert_complete(store, examples)

        content = (store.path / "shard-00003.arrow").read_bytes()
        assert list(pool.score_missing(examples_path, store)) == []
        assert sorted(log.read_text().split()) == sorted(example.key for example in examples)

        store.discard_shard(3)
        assert [result.info.shard for result in pool.score_missing(examples_path, store)] == [3]
    assert (store.path / "shard-00003.arrow").read_bytes() == content
    assert_complete(store, examples)


@pytest.mark.ray
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_replica_that_dies_is_replaced_and_the_store_is_the_same(
    local_ray: None, examples_path: Path, store: ScoreStore, examples: list[Example], tmp_path: Path, replicas: int
) -> None:
    died = tmp_path / "died"
    teacher = FakeTeacher(dies_on_call=3, only_once=died)
    with TeacherPool(fake_spec(TOP_K, replicas=replicas), engine_factory=teacher) as pool:
        results = list(pool.score_missing(examples_path, store))
    assert died.exists()
    assert sorted(result.info.shard for result in results) == [0, 1, 2, 3, 4, 5]
    assert_complete(store, examples)


@pytest.mark.ray
def test_a_replica_that_hangs_is_replaced(
    local_ray: None, examples_path: Path, store: ScoreStore, examples: list[Example], tmp_path: Path
) -> None:
    teacher = FakeTeacher(hangs_on_call=2, only_once=tmp_path / "hung")
    with TeacherPool(fake_spec(TOP_K), engine_factory=teacher, shard_timeout_seconds=3.0) as pool:
        list(pool.score_missing(examples_path, store))
    assert (tmp_path / "hung").exists()
    assert_complete(store, examples)


@pytest.mark.ray
def test_a_row_that_ends_every_replica_is_named_after_its_tries(
    local_ray: None, examples_path: Path, store: ScoreStore, examples: list[Example]
) -> None:
    teacher = FakeTeacher(poison_key=examples[9].key)
    with (
        pytest.raises(
            TeacherFailed,
            match=r"(?s)shard 2 \(rows 8 to 11 of train.arrow\) could not be scored: 2 replicas died on it, the last with: "
            r".*ActorDied.*max_restarts 1",
        ),
        TeacherPool(fake_spec(TOP_K, max_restarts=1), engine_factory=teacher) as pool,
    ):
        list(pool.score_missing(examples_path, store))
    assert set(store.missing_shards()) >= {2}
    store.verify()


@pytest.mark.ray
def test_an_error_of_the_engine_stops_at_once_with_its_own_words(local_ray: None, examples_path: Path, store: ScoreStore) -> None:
    with (
        pytest.raises(
            TeacherFailed, match=r"failed on shard 1 \(rows 4 to 7 of .*\): RuntimeError: call 3 of the fake teacher fails$"
        ),
        TeacherPool(fake_spec(TOP_K), engine_factory=FakeTeacher(fails_on_call=3)) as pool,
    ):
        list(pool.score_missing(examples_path, store))


@pytest.mark.ray
@pytest.mark.parametrize(("returns", "message"), [("nan", "row 0 .*must be finite"), ("uniform", "row 0 .*are uniform")])
def test_garbage_is_not_stored(local_ray: None, examples_path: Path, store: ScoreStore, returns: str, message: str) -> None:
    with (
        pytest.raises(TeacherFailed, match=f"failed on shard 0 .*ValueError: {message}"),
        TeacherPool(fake_spec(TOP_K), engine_factory=FakeTeacher(returns=returns)) as pool,
    ):
        list(pool.score_missing(examples_path, store))
    assert not list(store.path.glob("*.arrow"))


@pytest.mark.ray
def test_an_engine_that_cannot_start_says_why_at_once(local_ray: None) -> None:
    with (
        pytest.raises(TeacherFailed, match="^the teacher could not start: ValueError: no such model$"),
        TeacherPool(fake_spec(), engine_factory=FakeTeacher(fails_to_start="no such model")),
    ):
        raise AssertionError("the pool must not come up")


@pytest.mark.ray
def test_replicas_for_which_there_is_no_room_are_not_waited_for_without_end(local_ray: None) -> None:
    with (
        pytest.raises(
            TeacherFailed,
            match="no engine within 2 s; 1 replicas want 99 CPUs and 0 GPUs each, the cluster has 4 CPUs and 0 GPUs",
        ),
        TeacherPool(fake_spec(cpus=99), engine_factory=FakeTeacher(), start_timeout_seconds=2.0),
    ):
        raise AssertionError("the pool must not come up")


@pytest.mark.ray
def test_closing_ends_a_pool_that_hangs_and_its_user_hears_of_it(local_ray: None, examples_path: Path, store: ScoreStore) -> None:
    pool = TeacherPool(fake_spec(TOP_K), engine_factory=FakeTeacher(hangs_on_call=3)).__enter__()
    scoring = pool.score_missing(examples_path, store)
    assert next(scoring).info.shard == 0
    pool.close()
    with pytest.raises(TeacherFailed, match="the teacher pool was closed while it was in use"):
        list(scoring)


@pytest.mark.ray
def test_an_engine_that_died_inside_a_living_replica_is_replaced(
    local_ray: None, examples_path: Path, store: ScoreStore, examples: list[Example], tmp_path: Path
) -> None:
    teacher = FakeTeacher(engine_dies_on_call=2, only_once=tmp_path / "died")
    with TeacherPool(fake_spec(TOP_K), engine_factory=teacher) as pool:
        list(pool.score_missing(examples_path, store))
    assert (tmp_path / "died").exists()
    assert_complete(store, examples)


@pytest.mark.ray
def test_a_full_disk_is_said_and_the_next_run_completes(
    local_ray: None, examples_path: Path, store: ScoreStore, examples: list[Example]
) -> None:
    with (
        pytest.raises(TeacherFailed, match="failed on shard 0 .*OSError: .*File too large"),
        TeacherPool(fake_spec(TOP_K), engine_factory=FakeTeacher(largest_file=1000)) as pool,
    ):
        list(pool.score_missing(examples_path, store))
    assert [path.name for path in store.path.iterdir()] == ["manifest.json"]
    with TeacherPool(fake_spec(TOP_K), engine_factory=FakeTeacher()) as pool:
        list(pool.score_missing(examples_path, store))
    assert_complete(store, examples)
