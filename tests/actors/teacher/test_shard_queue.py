"""The order of shards, and which of them bear the blame for replicas that died; no replica is needed for either."""

import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from actors.score_store.leases import FileLeases
from actors.score_store.sanity import ScoreRange
from actors.score_store.store import ScoreStore, ScoringFailed
from actors.teacher.shard_queue import TRIES, ScoringWork, ShardQueue
from tests.fakes import expected_scores, fake_examples, fake_store

TOP_K, ROWS = 5, 12


def take_all(queue: ShardQueue) -> list[int | None]:
    """Take what an idle, proven replica would take if it scored each at once."""
    return [queue.next([], proven=True, others_proven=False) for _ in range(len(queue))]


# ---- the queue


def test_shards_come_in_order_up_to_the_window() -> None:
    queue = ShardQueue(range(5), window=2)
    assert queue.next([], proven=True, others_proven=True) == 0
    assert queue.next([0], proven=True, others_proven=True) == 1
    assert queue.next([0, 1], proven=True, others_proven=True) is None
    assert take_all(queue) == [2, 3, 4]
    assert len(queue) == 0


def test_what_was_put_off_comes_first_and_in_order_when_asked_again() -> None:
    queue = ShardQueue(range(4), window=2)
    queue.died_on([queue.next([], proven=True, others_proven=True) or 0], "gone")
    for shard in (2, 1):
        queue.put_off(shard)
    assert queue.next([], proven=True, others_proven=True) == 0
    queue.put_off(0)
    assert len(queue) == 6  # 1 and 2 are among the fresh ones as well here
    queue.ask_again()
    assert queue.next([9], proven=True, others_proven=True) is None, "0 is still a suspect"
    assert take_all(queue) == [0, 1, 2, 1, 2, 3]


def test_all_that_a_dead_replica_held_is_tried_alone_before_anything_else_is_begun_beside_it() -> None:
    queue = ShardQueue(range(6), window=2)
    queue.died_on([0, 1], "gone")
    assert queue.next([2], proven=True, others_proven=True) is None  # it finishes, and takes a suspect then
    assert queue.next([], proven=True, others_proven=True) == 0
    assert queue.next([0], proven=True, others_proven=True) is None
    assert queue.next([], proven=True, others_proven=True) == 1
    assert queue.next([2], proven=True, others_proven=True) is not None


def test_a_replica_proves_itself_on_a_shard_above_suspicion_and_on_a_suspect_only_if_nobody_else_can_try_it() -> None:
    queue = ShardQueue([0, 5], window=2)
    queue.died_on([7], "gone")
    assert queue.next([], proven=False, others_proven=True) == 0
    assert queue.next([0], proven=False, others_proven=True) is None
    assert queue.next([], proven=False, others_proven=True) == 5
    assert queue.next([], proven=False, others_proven=True) is None
    assert queue.next([], proven=False, others_proven=False) == 7
    assert ShardQueue([1], window=2).next([0], proven=False, others_proven=True) is None


def test_a_shard_is_set_aside_after_its_tries_with_its_last_error() -> None:
    queue = ShardQueue([7, 8], window=2)
    queue.died_on([7, 8], "error 1")
    queue.died_on([7], "error 2")
    assert queue.set_aside == {}
    queue.died_on([7], "error 3")
    assert queue.set_aside == {7: "error 3"}


def simulate(queue: ShardQueue, replicas: int, kills: Sequence[set[int]], seed: int) -> tuple[list[int], Counter[int], int]:
    """Play a pool in which any shard of a replica may be the next to be finished, or to end it.

    Args:
        kills: for each replica the shards that end it.

    Returns:
        The scored shards, how many replicas died while they held each shard, and the most deaths of a replica in a row.
    """
    chance = random.Random(seed)
    held: list[list[int]] = [[] for _ in range(replicas)]
    deaths, most, scored, met = [0] * replicas, 0, list[int](), Counter[int]()
    while len(queue) or any(held):
        for one in chance.sample(range(replicas), replicas):
            others = any(deaths[other] == 0 for other in range(replicas) if other != one)
            while (shard := queue.next(held[one], proven=deaths[one] == 0, others_proven=others)) is not None:
                held[one].append(shard)
        one = chance.choice([replica for replica in range(replicas) if held[replica]])
        shard = chance.choice(held[one])
        if shard in kills[one]:
            met.update(held[one])
            queue.died_on(held[one], f"died on {shard}")
            held[one], deaths[one] = [], deaths[one] + 1
            most = max(most, deaths[one])
        else:
            held[one].remove(shard)
            scored.append(shard)
            deaths[one] = 0
    return scored, met, most


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_only_shards_that_kill_every_replica_are_set_aside_and_all_others_are_scored_once(replicas: int) -> None:
    for seed in range(200):
        poison = set(random.Random(seed).sample(range(20), 3))
        queue = ShardQueue(range(20), window=2)
        scored, met, _ = simulate(queue, replicas, [poison] * replicas, seed)
        assert sorted(scored) == sorted(set(range(20)) - poison)
        assert set(queue.set_aside) == poison
        assert {met[shard] for shard in poison} == {TRIES}


@pytest.mark.parametrize(("poison", "longest"), [({3}, 1), ({3, 4, 11}, 2)])
def test_one_replica_proves_itself_between_its_deaths_on_bad_shards_among_many(poison: set[int], longest: int) -> None:
    runs = [simulate(ShardQueue(range(40), window=2), 1, [poison], seed) for seed in range(200)]
    assert max(most for _, _, most in runs) == longest


def test_a_broken_device_condemns_no_shard_while_another_works() -> None:
    for seed in range(200):
        queue = ShardQueue(range(20), window=2)
        scored, _, _ = simulate(queue, 2, [set(range(20)), set()], seed)
        assert sorted(scored) == list(range(20)) and not queue.set_aside


# ---- the work on one store, among other jobs


def test_a_shard_of_another_job_is_passed_over_and_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.teacher.shard_queue.ASK_AGAIN_SECONDS", 0.0)
    path, store = fake_store(tmp_path, examples := fake_examples(ROWS), 4, TOP_K)
    other = FileLeases(Path(store.place))
    assert other.take(0) and other.take(1)
    work = ScoringWork(path, store, window=2, lease_seconds=60.0)
    assert work.next([], proven=True, others_proven=False) == 2
    assert work.next([2], proven=True, others_proven=False) is None and work.waits
    info = store.write_shard(1, examples[4:8], [expected_scores(example, TOP_K) for example in examples[4:8]])
    other.release_all()
    work.keep_up()
    assert work.next([2], proven=True, others_proven=False) == 0
    work.scored(0, info)
    assert work.known == ScoreRange.over([(info.target_logprob, info.entropy)])
    assert work.next([2], proven=True, others_proven=False) is None and not work.waits


def test_a_shard_handed_back_is_free_for_other_jobs_and_one_set_aside_is_not(tmp_path: Path) -> None:
    path, store = fake_store(tmp_path, fake_examples(ROWS), 4, TOP_K)
    work, other = ScoringWork(path, store, window=2, lease_seconds=60.0), FileLeases(Path(store.place))
    assert work.next([], proven=True, others_proven=False) == 0
    assert not other.take(0)
    work.died_on([0], "gone")
    assert other.take(0)
    other.release(0)
    for _ in range(TRIES - 1):
        assert work.next([], proven=True, others_proven=False) == 0
        work.died_on([0], "gone")
    assert not other.take(0)
    work.close()
    assert other.take(0)


def test_a_shard_that_is_there_is_neither_waited_for_nor_scored_whenever_its_holder_finished_it(tmp_path: Path) -> None:
    path, store = fake_store(tmp_path, examples := fake_examples(ROWS), 4, TOP_K)

    class OvertakenStore(ScoreStore):
        """Another job writes shard 1 right after it was found missing."""

        def wait_for(self, shard: int, timeout_seconds: float, poll_seconds: float = 0.2) -> float:
            try:
                return super().wait_for(shard, timeout_seconds, poll_seconds)
            finally:
                if shard == 1:
                    write(1)

    def write(shard: int) -> None:
        rows = examples[4 * shard : 4 * shard + 4]
        store.write_shard(shard, rows, [expected_scores(row, TOP_K) for row in rows])

    work = ScoringWork(path, OvertakenStore(Path(store.place)), window=2, lease_seconds=60.0)
    ended = FileLeases(Path(store.place))
    ended.take(0)
    write(0)  # its holder was killed before it could give the lease back
    assert work.next([], proven=True, others_proven=False) == 2
    assert not work.waits
    ended.release(0)
    assert [lease.name for lease in Path(store.place).glob("*.lease")] == ["shard-00002.lease"]


def test_the_rows_of_a_large_shard_are_named_as_far_as_a_message_should_go(tmp_path: Path) -> None:
    path, store = fake_store(tmp_path, fake_examples(40), 40, TOP_K)
    work = ScoringWork(path, store, window=2, lease_seconds=60.0)
    assert work.describe_set_aside() == ""
    for _ in range(TRIES):
        work.died_on([0], "gone")
    wanted = ", ".join(str(row) for row in range(32))
    assert work.describe_set_aside() == (
        "shard 0 (rows 0 to 39 of train.arrow) was set aside after 3 replicas died on it, the last with: gone; "
        f"it holds the dataset's rows {wanted} and 8 more"
    )


def test_what_another_job_declared_failed_is_not_gone_on_with(tmp_path: Path) -> None:
    path, store = fake_store(tmp_path, fake_examples(ROWS), 4, TOP_K)
    work = ScoringWork(path, store, window=2, lease_seconds=60.0)
    store.declare_failed("row 7 holds nan")
    with pytest.raises(ScoringFailed, match="^row 7 holds nan$"):
        work.next([], proven=True, others_proven=False)


def test_leases_are_refreshed_by_the_way(tmp_path: Path) -> None:
    path, store = fake_store(tmp_path, fake_examples(ROWS), 4, TOP_K)
    work = ScoringWork(path, store, window=2, lease_seconds=0.0)
    assert work.next([], proven=True, others_proven=False) == 0
    os.utime(Path(store.place) / "shard-00000.lease", (0, 0))
    work.keep_up()
    assert (Path(store.place) / "shard-00000.lease").stat().st_mtime > 0
