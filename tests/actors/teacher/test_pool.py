"""The pool with a fake teacher: what it hands out, and what is left on disk whatever happens to its replicas."""

import subprocess
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from ray.util import placement_group, placement_group_table, remove_placement_group

from actors.engines.base import TeacherEngine, TeacherSpec
from actors.records import Example
from actors.score_store.store import ScoreStore
from actors.teacher.pool import TeacherPool
from actors.teacher.replica import TeacherReplica
from actors.teacher.replica_set import TeacherFailed
from tests.fakes import FakeTeacher, assert_complete, fake_examples, fake_spec, fake_store, record_next_shard
from tests.recovery import Record

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


def score_without_ray(examples_path: Path, store: ScoreStore, shards: Iterable[int]) -> None:
    replica = TeacherReplica(fake_spec(TOP_K), FakeTeacher())
    replica.start()
    for shard in shards:
        replica.score_shard(examples_path, Path(store.place), shard)


def rooms_taken() -> int:
    """How many replicas hold or await room in the session's Ray."""
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


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

        content = (Path(store.place) / "shard-00003.rows").read_bytes()
        assert list(pool.score_missing(examples_path, store)) == []
        assert sorted(log.read_text().split()) == sorted(example.key for example in examples)

        store.discard_shard(3)
        assert [result.info.shard for result in pool.score_missing(examples_path, store)] == [3]
    assert (Path(store.place) / "shard-00003.rows").read_bytes() == content
    assert_complete(store, examples)


@pytest.mark.ray
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_replica_that_dies_is_replaced_and_the_store_is_the_same(
    local_ray: None, examples_path: Path, store: ScoreStore, examples: list[Example], tmp_path: Path, replicas: int,
    record_property: Record,
) -> None:  # fmt: skip
    died = tmp_path / "died"
    teacher = FakeTeacher(dies_on_call=3, only_once=died)
    with TeacherPool(fake_spec(TOP_K, replicas=replicas), engine_factory=teacher) as pool:
        assert rooms_taken() == replicas
        results = list(pool.score_missing(examples_path, store))
        assert rooms_taken() == replicas
    assert rooms_taken() == 0
    record_next_shard(record_property, died, store)
    yielded = [result.info.shard for result in results]
    assert len(yielded) == len(set(yielded)) >= 5  # the replica may have died between writing a shard and saying so
    assert_complete(store, examples)


@pytest.mark.ray
@pytest.mark.drill
def test_a_replica_that_hangs_is_replaced(
    local_ray: None, examples_path: Path, store: ScoreStore, examples: list[Example], tmp_path: Path, record_property: Record
) -> None:
    teacher = FakeTeacher(hangs_on_call=2, only_once=tmp_path / "hung")
    with TeacherPool(fake_spec(TOP_K), engine_factory=teacher, shard_timeout_seconds=3.0) as pool:
        list(pool.score_missing(examples_path, store))
    record_next_shard(record_property, tmp_path / "hung", store)
    assert_complete(store, examples)


@pytest.mark.ray
def test_a_row_that_ends_every_replica_is_set_aside_and_another_start_completes_the_store(
    local_ray: None, examples_path: Path, store: ScoreStore, examples: list[Example], tmp_path: Path
) -> None:
    log, cure = tmp_path / "scored", tmp_path / "cure"
    teacher = FakeTeacher(poison_key=examples[9].key, cure=cure, log=log)
    with TeacherPool(fake_spec(TOP_K, max_restarts=1), engine_factory=teacher) as pool:
        with pytest.raises(
            TeacherFailed,
            match=r"(?s)^shard 2 \(rows 8 to 11 of train.arrow\) was set aside after 3 replicas died on it, the last with: "
            r".*ActorDied.*the dataset's rows 8, 9, 10, 11\. All other shards are scored",
        ):
            list(pool.score_missing(examples_path, store))
        assert log.read_text().split().count("poison") == 3
        assert store.missing_shards() == [2]
        assert not list(Path(store.place).glob("*.lease"))
        cure.touch()
        assert [result.info.shard for result in pool.score_missing(examples_path, store)] == [2]
    assert_complete(store, examples)

    (tmp_path / "undisturbed").mkdir()
    _, undisturbed = fake_store(tmp_path / "undisturbed", examples, ROWS_PER_SHARD, TOP_K)
    score_without_ray(examples_path, undisturbed, range(6))
    for path in Path(undisturbed.place).iterdir():
        assert (Path(store.place) / path.name).read_bytes() == path.read_bytes()


@pytest.mark.ray
def test_a_pool_whose_last_replica_is_given_up_says_what_it_held_and_what_was_set_aside(
    local_ray: None, examples_path: Path, store: ScoreStore, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.teacher.shard_queue.TRIES", 1)
    score_without_ray(examples_path, store, (0, 1, 3, 4, 5))
    with (
        pytest.raises(
            TeacherFailed,
            match=r"(?s)^teacher replica 0 died 1 times in a row while it held shard 2 \(rows 8 to 11 of train.arrow\) and is "
            r"not started again \(teacher.engine.max_restarts 0\); its last error: .*ActorDied.*; shard 2 .* was set aside",
        ),
        TeacherPool(fake_spec(TOP_K, max_restarts=0), engine_factory=FakeTeacher(poison_key=examples[9].key)) as pool,
    ):
        list(pool.score_missing(examples_path, store))


@pytest.mark.ray
def test_an_error_of_the_engine_stops_at_once_with_its_own_words(local_ray: None, examples_path: Path, store: ScoreStore) -> None:
    with (
        pytest.raises(
            TeacherFailed, match=r"failed on shard \d \(rows \d+ to \d+ of .*\): RuntimeError: call 3 of the fake teacher fails$"
        ),
        TeacherPool(fake_spec(TOP_K), engine_factory=FakeTeacher(fails_on_call=3)) as pool,
    ):
        list(pool.score_missing(examples_path, store))


@pytest.mark.ray
@pytest.mark.parametrize(("returns", "message"), [("nan", r"row \d+ .*must be finite"), ("uniform", r"row \d+ .*are uniform")])
def test_garbage_is_not_stored(local_ray: None, examples_path: Path, store: ScoreStore, returns: str, message: str) -> None:
    with (
        pytest.raises(TeacherFailed, match=rf"failed on shard \d .*ValueError: {message}"),
        TeacherPool(fake_spec(TOP_K), engine_factory=FakeTeacher(returns=returns)) as pool,
    ):
        list(pool.score_missing(examples_path, store))
    assert not list(Path(store.place).glob("shard-*.[ar]*"))


@pytest.mark.ray
def test_an_engine_that_cannot_start_says_why_at_once(local_ray: None) -> None:
    with (
        pytest.raises(TeacherFailed, match="^the teacher could not start: ValueError: no such model$"),
        TeacherPool(fake_spec(), engine_factory=FakeTeacher(fails_to_start="no such model")),
    ):
        raise AssertionError("the pool must not come up")


@pytest.mark.ray
def test_replicas_that_no_node_can_hold_are_refused_at_once(local_ray: None) -> None:
    with (
        pytest.raises(ValueError, match=r"^teacher\.engine\.cpus 99: the largest node has 4 CPUs; cpus 4 would do$"),
        TeacherPool(fake_spec(cpus=99), engine_factory=FakeTeacher()),
    ):
        raise AssertionError("the pool must not come up")


@pytest.mark.ray
def test_replicas_for_which_there_is_no_room_are_not_waited_for_without_end(local_ray: None) -> None:
    others = placement_group([{"CPU": 3}])
    with (
        pytest.raises(
            TeacherFailed,
            match=r"no room within 2 s: 2 replicas of 2 CPUs are wanted, other work leaves room for 0 now; wait until it "
            r"ends, or lower teacher\.engine\.replicas or what each wants",
        ),
        TeacherPool(fake_spec(cpus=2, replicas=2, start_seconds=2.0), engine_factory=FakeTeacher()),
    ):
        raise AssertionError("the pool must not come up")
    remove_placement_group(others)
    assert rooms_taken() == 0


@pytest.mark.ray
def test_an_engine_that_does_not_come_is_told_from_room_that_does_not_come(local_ray: None) -> None:
    with (
        pytest.raises(TeacherFailed, match=r"no engine within 2 s, though it has its 0\.5 CPUs; it loads for longer, or hangs"),
        TeacherPool(fake_spec(start_seconds=2.0), engine_factory=never_there),
    ):
        raise AssertionError("the pool must not come up")
    assert rooms_taken() == 0


def never_there(spec: TeacherSpec) -> TeacherEngine:
    time.sleep(3600)
    raise AssertionError


@pytest.mark.ray
def test_a_replica_that_cannot_be_made_leaves_no_room_behind(local_ray: None) -> None:
    unpicklable = threading.Lock()
    with (
        pytest.raises(TypeError, match="pickle"),
        TeacherPool(fake_spec(), engine_factory=lambda spec: FakeTeacher(log=unpicklable)(spec)),  # type: ignore[arg-type]
    ):
        raise AssertionError("the pool must not come up")
    assert rooms_taken() == 0


@pytest.mark.ray
def test_closing_ends_a_pool_that_hangs_and_its_user_hears_of_it(local_ray: None, examples_path: Path, store: ScoreStore) -> None:
    pool = TeacherPool(fake_spec(TOP_K), engine_factory=FakeTeacher(hangs_on_call=3)).__enter__()
    scoring = pool.score_missing(examples_path, store)
    assert next(scoring).info.shard in (0, 1)  # the replica has both; either may meet the engine first
    pool.close()
    with pytest.raises(TeacherFailed, match="the teacher pool was closed while it was in use"):
        list(scoring)


@pytest.mark.ray
def test_an_engine_that_died_inside_a_living_replica_is_replaced(
    local_ray: None, examples_path: Path, store: ScoreStore, examples: list[Example], tmp_path: Path, record_property: Record
) -> None:
    teacher = FakeTeacher(engine_dies_on_call=2, only_once=tmp_path / "died")
    with TeacherPool(fake_spec(TOP_K), engine_factory=teacher) as pool:
        list(pool.score_missing(examples_path, store))
    record_next_shard(record_property, tmp_path / "died", store)
    assert_complete(store, examples)


@pytest.mark.ray
@pytest.mark.drill
def test_a_device_that_fails_is_a_death_of_its_replica_and_may_not_be_free_at_once(
    local_ray: None, examples_path: Path, store: ScoreStore, examples: list[Example], tmp_path: Path, record_property: Record
) -> None:
    deaths: list[str] = []
    teacher = FakeTeacher(device_fails_on_call=2, only_once=tmp_path / "failed")
    with TeacherPool(fake_spec(TOP_K), engine_factory=teacher, on_death=lambda number, error: deaths.append(error)) as pool:
        list(pool.score_missing(examples_path, store))
    record_next_shard(record_property, tmp_path / "failed", store)
    assert_complete(store, examples)
    assert deaths == [
        "its device failed: AcceleratorError: CUDA error: an illegal memory access was encountered",
        "ValueError: Free memory on device is less than desired",
    ]


class Chatty(FakeTeacher):
    """Prints from Python and from a process of its own, and cannot start."""

    def __call__(self, spec: TeacherSpec) -> Any:
        print("loading weights", flush=True)
        subprocess.run(["sh", "-c", "echo the cause, from a process of the engine >&2"], check=True)
        raise RuntimeError("Engine core initialization failed. See root cause above.")


@pytest.mark.ray
def test_what_an_engine_prints_is_kept_and_ends_the_error(local_ray: None, tmp_path: Path) -> None:
    with (
        pytest.raises(TeacherFailed) as failed,
        TeacherPool(fake_spec(), engine_factory=Chatty(), logs=tmp_path / "logs"),
    ):
        raise AssertionError("the pool must not come up")
    log = tmp_path / "logs" / "replica-0.log"
    assert str(failed.value) == (
        "the teacher could not start: RuntimeError: Engine core initialization failed. See root cause above. "
        f"({log} ends with: loading weights | the cause, from a process of the engine)"
    )


@pytest.mark.ray
def test_a_full_disk_is_said_and_the_next_run_completes(
    local_ray: None, examples_path: Path, store: ScoreStore, examples: list[Example]
) -> None:
    with (
        pytest.raises(TeacherFailed, match="failed on shard [01] .*OSError: .*File too large"),
        TeacherPool(fake_spec(TOP_K), engine_factory=FakeTeacher(largest_file=1000)) as pool,
    ):
        list(pool.score_missing(examples_path, store))
    assert [path.name for path in Path(store.place).iterdir()] == ["manifest.json"]
    with TeacherPool(fake_spec(TOP_K), engine_factory=FakeTeacher()) as pool:
        list(pool.score_missing(examples_path, store))
    assert_complete(store, examples)
