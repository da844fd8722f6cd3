"""Jobs that fill one store at once: each shard is scored by one of them, and nobody waits for the dead."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.records import Example
from actors.score_store.leases import FileLeases
from actors.score_store.store import ScoreStore
from actors.teacher.pool import TeacherPool
from actors.teacher.replica_set import TeacherFailed
from tests.fakes import FakeTeacher, assert_complete, expected_scores, fake_examples, fake_spec, fake_store

ROWS, ROWS_PER_SHARD, TOP_K = 22, 4, 5
LEASE_SECONDS = 30.0

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def pool(local_ray: None) -> Iterator[TeacherPool]:
    with TeacherPool(fake_spec(TOP_K), engine_factory=FakeTeacher(), lease_seconds=LEASE_SECONDS) as pool:
        yield pool


@pytest.fixture
def examples() -> list[Example]:
    return fake_examples(ROWS)


@pytest.fixture
def examples_path(tmp_path: Path, examples: list[Example]) -> Path:
    return fake_store(tmp_path, examples, ROWS_PER_SHARD, TOP_K)[0]


@pytest.fixture
def store(tmp_path: Path, examples: list[Example]) -> ScoreStore:
    return fake_store(tmp_path, examples, ROWS_PER_SHARD, TOP_K)[1]


def test_two_jobs_on_one_store_score_each_shard_once(local_ray: None, tmp_path: Path) -> None:
    examples = fake_examples(80)
    examples_path, store = fake_store(tmp_path, examples, ROWS_PER_SHARD, TOP_K)
    log, yielded = tmp_path / "scored", ([], [])  # type: ignore[var-annotated]
    teacher = FakeTeacher(log=log, seconds_per_call=0.05)
    with (
        TeacherPool(fake_spec(TOP_K), engine_factory=teacher) as one,
        TeacherPool(fake_spec(TOP_K), engine_factory=teacher) as other,
    ):

        def work(pool: TeacherPool, mine: list[int]) -> None:
            mine += [result.info.shard for result in pool.score_missing(examples_path, ScoreStore(store.place))]
            assert store.complete, "a job ends when nothing is missing"

        threads = [threading.Thread(target=work, args=pair) for pair in zip((one, other), yielded, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(log.read_text().split()) == sorted(example.key for example in examples)
    assert sorted(yielded[0] + yielded[1]) == list(range(20))
    assert yielded[0] and yielded[1]
    assert_complete(store, examples)


def test_what_another_job_finishes_is_waited_for_and_not_yielded(
    pool: TeacherPool, examples_path: Path, store: ScoreStore, examples: list[Example]
) -> None:
    other = FileLeases(Path(store.place), LEASE_SECONDS)
    assert other.take(1)
    waited_for: list[int] = []

    def finish_it(shards: int) -> None:
        waited_for.append(shards)
        if len(waited_for) == 2:
            store.write_shard(1, examples[4:8], [expected_scores(example, TOP_K) for example in examples[4:8]])
            other.release(1)

    scoring = pool.score_missing(examples_path, store, finish_it)
    assert sorted(result.info.shard for result in scoring) == [0, 2, 3, 4, 5]
    assert waited_for and set(waited_for) == {1}
    assert_complete(store, examples)


def test_the_shards_of_a_job_that_fell_silent_are_taken_over(
    pool: TeacherPool, examples_path: Path, store: ScoreStore, examples: list[Example]
) -> None:
    silent = FileLeases(Path(store.place), LEASE_SECONDS)
    assert silent.take(1)
    scoring = pool.score_missing(examples_path, store)
    assert sorted(next(scoring).info.shard for _ in range(5)) == [0, 2, 3, 4, 5]
    lease = Path(store.place) / "shard-00001.lease"
    then = lease.stat().st_mtime - LEASE_SECONDS - 5
    os.utime(lease, (then, then))
    assert [result.info.shard for result in scoring] == [1]
    assert_complete(store, examples)


def test_a_job_that_waits_for_another_stops_with_its_failure(pool: TeacherPool, examples_path: Path, store: ScoreStore) -> None:
    other = FileLeases(Path(store.place), LEASE_SECONDS)
    assert other.take(1)
    scoring = pool.score_missing(examples_path, store)
    assert sorted(next(scoring).info.shard for _ in range(5)) == [0, 2, 3, 4, 5]
    store.declare_failed("row 7 holds nan")
    with pytest.raises(TeacherFailed, match=r"^another job that scores .*store gave up: row 7 holds nan$"):
        next(scoring)
    other.release_all()
    assert not list(Path(store.place).glob("*.lease"))
