"""Leases as claims in object storage, against servers on the loopback."""

import logging
import threading

import pytest

from actors.score_store.object_leases import ObjectLeases
from actors.score_store.open_leases import open_leases
from actors.storage.folder import open_folder
from actors.storage.object_folder import ObjectFolder


@pytest.fixture
def place(anywhere: str) -> str:
    return f"{anywhere}/store"


def leases_of(place: str, seconds: float = 60.0) -> ObjectLeases:
    leases = open_leases(open_folder(place), seconds)
    assert isinstance(leases, ObjectLeases)
    return leases


def claims_at(place: str) -> list[str]:
    folder = open_folder(place)
    assert isinstance(folder, ObjectFolder)
    return sorted(folder.written_ns("leases"))


def test_a_lease_is_one_jobs_until_it_is_given_back(place: str) -> None:
    ours, theirs = leases_of(place), leases_of(place)
    assert ours.take(7) and not theirs.take(7) and theirs.take(8)
    assert len(claims_at(place)) == 2
    ours.release(7)
    assert theirs.take(7)
    theirs.release_all()
    assert claims_at(place) == []


def test_a_stale_claim_and_one_of_a_dead_process_give_way(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, ours = leases_of(place), leases_of(place)
    assert dead.take(1)
    monkeypatch.setattr("actors.score_store.leases._is_running", lambda pid: False)
    assert ours.take(1)
    monkeypatch.undo()
    assert len(claims_at(place)) == 1
    assert not dead.keep_alive(1) and ours.keep_alive(1)
    elsewhere, quick = leases_of(place), leases_of(place, seconds=-1.0)  # as if a minute had passed
    assert elsewhere.take(2) and quick.take(2)
    assert not elsewhere.keep_alive(2)


def test_a_claim_that_says_nothing_lives_until_it_is_stale(place: str) -> None:
    open_folder(place).write("leases/00003/someone", b"rubbish")
    assert not leases_of(place).take(3)
    assert leases_of(place, seconds=-1.0).take(3)


def test_what_was_left_on_finished_shards_goes(place: str) -> None:
    killed = leases_of(place)
    assert killed.take(0) and killed.take(1)
    leases_of(place).clear_away_dead([0, 5])
    assert [claim.split("/")[1] for claim in claims_at(place)] == ["00001"]


def test_a_lease_that_was_lost_is_told_once(place: str, caplog: pytest.LogCaptureFixture) -> None:
    ours = leases_of(place, seconds=0.0)
    ours.held.add(4)  # another job took it for stale, and removed the claim
    with caplog.at_level(logging.WARNING, "atkd"):
        ours.refresh()
        ours.refresh()
    assert [record.message for record in caplog.records] == [
        f"another job took over the lease of shard 4 of {place} and may score it too"
    ]


def test_of_jobs_that_claim_at_once_at_most_one_gets_a_shard(place: str) -> None:
    takers, got = [leases_of(place) for _ in range(4)], [[] for _ in range(4)]  # type: list[ObjectLeases], list[list[int]]

    def work(number: int) -> None:
        got[number] += [shard for shard in range(12) if takers[number].take(shard)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shards = [shard for mine in got for shard in mine]
    assert len(shards) == len(set(shards))
    left = sorted(set(range(12)) - set(shards))
    assert [shard for shard in left if takers[0].take(shard)] == left  # who yielded comes again
