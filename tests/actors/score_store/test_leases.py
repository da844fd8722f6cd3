"""Leases without a teacher: who holds a shard, and when another may take it."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from actors.score_store.leases import FileLeases

OLD = 100.0
"""Seconds; more than a lease lives."""


def lease_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.lease"


def set_age(path: Path, seconds: float) -> None:
    """Date a lease as if it had been refreshed so long ago, or as if its node's clock were ahead if negative."""
    when = path.stat().st_mtime - seconds
    os.utime(path, (when, when))


def test_a_lease_is_held_by_one_until_it_is_released(tmp_path: Path) -> None:
    ours, theirs = FileLeases(tmp_path), FileLeases(tmp_path)
    assert ours.take(3)
    assert not theirs.take(3)
    assert theirs.take(4)
    ours.release(3)
    assert theirs.take(3)
    theirs.release_all()
    assert list(tmp_path.iterdir()) == []


def test_a_lease_says_who_holds_it(tmp_path: Path) -> None:
    FileLeases(tmp_path).take(7)
    content = json.loads(lease_path(tmp_path, 7).read_text())
    assert set(content) == {"host", "pid", "holder", "taken"}
    assert content["pid"] == os.getpid()


@pytest.mark.parametrize("age", [OLD, -OLD], ids=["old", "ahead"])
def test_a_stale_lease_is_taken_over_and_its_holder_leaves_it_to_the_new_one(tmp_path: Path, age: float) -> None:
    slow, quick = FileLeases(tmp_path, lease_seconds=60.0), FileLeases(tmp_path, lease_seconds=60.0)
    slow.take(0)
    set_age(lease_path(tmp_path, 0), age)
    assert quick.take(0)
    content = lease_path(tmp_path, 0).read_text()
    slow.release(0)
    slow.release_all()
    assert lease_path(tmp_path, 0).read_text() == content
    assert not slow.take(0)


@pytest.mark.parametrize("skew", [20.0, -20.0])
def test_a_live_lease_stays_though_clocks_differ_by_less_than_its_life(tmp_path: Path, skew: float) -> None:
    ours, theirs = FileLeases(tmp_path), FileLeases(tmp_path)
    ours.take(0)
    set_age(lease_path(tmp_path, 0), skew)
    assert not theirs.take(0)


def test_age_is_judged_by_the_clock_of_the_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = FileLeases(tmp_path), FileLeases(tmp_path)
    ours.take(0)
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + 1e6)  # as on a node whose clock is wrong
    assert not theirs.take(0)


def test_leases_that_the_dead_left_on_some_shards_are_cleared_away(tmp_path: Path) -> None:
    ours, dead = FileLeases(tmp_path), FileLeases(tmp_path)
    assert ours.take(0) and dead.take(1) and dead.take(2)
    for shard in (1, 2):
        set_age(lease_path(tmp_path, shard), OLD)
    FileLeases(tmp_path).clear_away_dead([0, 1, 5])
    assert lease_path(tmp_path, 0).exists(), "it is held"
    assert not lease_path(tmp_path, 1).exists()
    assert lease_path(tmp_path, 2).exists(), "it was not asked about"


def test_refreshing_keeps_what_is_held_alive_and_nothing_else(tmp_path: Path) -> None:
    ours, theirs = FileLeases(tmp_path, lease_seconds=60.0), FileLeases(tmp_path, lease_seconds=60.0)
    at_once = FileLeases(tmp_path, lease_seconds=0.0)  # no time passes between its refreshes
    assert at_once.take(0) and ours.take(1) and ours.take(2)
    for shard in (0, 1, 2):
        set_age(lease_path(tmp_path, shard), OLD)
    at_once.refresh()
    ours.refresh()  # taken a moment ago: too soon to touch them again
    assert not theirs.take(0)
    assert theirs.take(1)


def test_a_lease_that_was_taken_over_is_not_refreshed_for_its_new_holder(tmp_path: Path) -> None:
    slow, quick = FileLeases(tmp_path, lease_seconds=0.0), FileLeases(tmp_path)
    slow.take(0)
    slow.take(1)
    set_age(lease_path(tmp_path, 0), OLD)
    assert quick.take(0)
    lease_path(tmp_path, 1).unlink()
    set_age(lease_path(tmp_path, 0), OLD)
    dated = lease_path(tmp_path, 0).stat().st_mtime_ns
    slow.refresh()
    assert lease_path(tmp_path, 0).stat().st_mtime_ns == dated
    assert not lease_path(tmp_path, 1).exists()


def test_a_lease_half_written_is_respected_while_it_is_young(tmp_path: Path) -> None:
    lease_path(tmp_path, 0).write_text('{"host": "elsew')
    assert not FileLeases(tmp_path).take(0)
    set_age(lease_path(tmp_path, 0), OLD)
    assert FileLeases(tmp_path).take(0)


def test_the_lease_of_a_process_killed_on_this_machine_is_free_at_once(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from actors.score_store.leases import FileLeases\n"
        "assert FileLeases(Path(sys.argv[1])).take(5); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[3])
    assert killed.returncode == -9 and lease_path(tmp_path, 5).exists()
    assert FileLeases(tmp_path).take(5)


def test_a_process_of_the_same_number_on_another_machine_is_no_reason_to_take_over(tmp_path: Path) -> None:
    FileLeases(tmp_path).take(0)
    content = json.loads(lease_path(tmp_path, 0).read_text())
    lease_path(tmp_path, 0).write_text(json.dumps({**content, "host": "another", "pid": 2**22 + 1}))
    assert not FileLeases(tmp_path).take(0)


def race(takers: list[FileLeases], shards: range) -> list[list[int]]:
    """Let all take the same shards at once; return what each got."""
    barrier, got = threading.Barrier(len(takers)), [list[int]() for _ in takers]

    def work(taker: FileLeases, mine: list[int]) -> None:
        for shard in shards:
            barrier.wait()
            if taker.take(shard):
                mine.append(shard)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(takers, got, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def test_of_many_that_take_a_free_shard_at_once_one_gets_it(tmp_path: Path) -> None:
    got = race([FileLeases(tmp_path) for _ in range(4)], range(50))
    assert sorted(sum(got, [])) == list(range(50))


def test_of_two_that_take_a_stale_lease_over_at_once_one_gets_it(tmp_path: Path) -> None:
    dead = FileLeases(tmp_path)
    for shard in range(100):
        dead.take(shard)
        set_age(lease_path(tmp_path, shard), OLD)
    takers = [FileLeases(tmp_path), FileLeases(tmp_path)]
    got = race(takers, range(100))
    assert sorted(sum(got, [])) == list(range(100))
    for taker in takers:
        taker.release_all()
    assert list(tmp_path.iterdir()) == []


def test_the_slower_of_two_takers_puts_back_the_lease_it_moved(tmp_path: Path) -> None:
    class SlowLeases(FileLeases):
        def _is_stale(self, seen: object) -> bool:
            set_age(lease_path(tmp_path, 0), OLD)
            assert quick.take(0)  # between its look and its move
            return True

    quick, slow = FileLeases(tmp_path), SlowLeases(tmp_path)
    FileLeases(tmp_path).take(0)
    assert not slow.take(0)
    content = json.loads(lease_path(tmp_path, 0).read_text())
    quick.release(0)
    assert content["pid"] == os.getpid() and list(tmp_path.iterdir()) == []
