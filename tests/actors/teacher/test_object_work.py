"""Shards of a store in object storage handed out under claims: many requests at a time, each shard once, nothing left behind."""

import time
from pathlib import Path

import pytest

from actors.score_store.open_leases import open_leases
from actors.score_store.store import ScoreStore, ScoringFailed
from actors.storage.folder import open_folder
from actors.storage.object_folder import ObjectFolder
from actors.teacher.shard_queue import ScoringWork
from tests.fakes import FAKE_VOCAB
from tests.s3_world import BUCKET, Faults

SHARDS, AHEAD = 12, 5


@pytest.fixture
def store(faults: Faults, tmp_path: Path) -> ScoreStore:
    identity = {"examples": "none", "top_k": 5, "vocab_size": FAKE_VOCAB}
    return ScoreStore.open_or_create(f"s3://{BUCKET}/{tmp_path.name}/store", identity, SHARDS, 1)


def work_on(store: ScoreStore, ahead: int = AHEAD) -> ScoringWork:
    return ScoringWork(Path("/nowhere.arrow"), store, window=2, lease_seconds=60.0, ahead=ahead)


def take(work: ScoringWork) -> int | None:
    return work.next([], proven=True, others_proven=False)


def claims_at(store: ScoreStore) -> list[int]:
    folder = open_folder(store.place)
    assert isinstance(folder, ObjectFolder)
    return sorted(int(name.split("/")[1]) for name in folder.written_ns("leases"))


def test_leases_of_the_next_shards_are_taken_meanwhile_many_at_a_time(store: ScoreStore, faults: Faults) -> None:
    faults.answer_seconds, faults.most_at_once = 0.05, 0
    work = work_on(store)
    assert take(work) == 0
    assert 2 <= faults.most_at_once <= AHEAD + 1
    assert [take(work) for _ in range(SHARDS - 1)] == list(range(1, SHARDS)) and take(work) is None
    assert claims_at(store) == list(range(SHARDS))
    faults.most_at_once = 0
    work.close()
    assert claims_at(store) == [] and faults.most_at_once > 1


def test_no_more_are_taken_ahead_than_can_be_scored_here(store: ScoreStore) -> None:
    ours, theirs = work_on(store, ahead=2), work_on(store, ahead=2)
    assert take(ours) == 0
    ours.next([0], proven=True, others_proven=False)
    assert take(theirs) not in (0, 1, 2, None), "those are ours, or are just being taken"
    ours.close()
    theirs.close()
    assert claims_at(store) == [], "those that were taken ahead are given back too"


def test_two_jobs_share_a_store_and_each_shard_goes_to_one(store: ScoreStore) -> None:
    jobs, got = [work_on(store), work_on(store)], list[int]()
    while any(job.waits for job in jobs) and len(got) < SHARDS:
        for job in jobs:
            if (shard := take(job)) is not None:
                got.append(shard)
            job.keep_up()
    assert sorted(got) == list(range(SHARDS))
    for job in jobs:
        job.close()
    assert claims_at(store) == []


def test_what_is_given_back_later_is_given_back_and_an_error_of_that_is_not_lost(
    store: ScoreStore, faults: Faults
) -> None:
    leases = open_leases(store.folder)
    for shard in range(3):
        assert leases.take(shard)
    leases.release_soon(0)
    until = time.monotonic() + 60
    while claims_at(store) != [1, 2]:
        assert time.monotonic() < until
    faults.refuse = (403, "AccessDenied")
    leases.release_soon(1)
    with pytest.raises(ValueError, match="access is denied"):
        leases.release_all()
    another = open_leases(store.folder)
    another.release_soon(7)
    with pytest.raises(ValueError, match="access is denied"):
        while time.monotonic() < until:
            another.release_soon(7)


def test_a_failure_that_another_job_declared_ends_the_work(store: ScoreStore) -> None:
    work = work_on(store)
    assert take(work) == 0
    store.declare_failed("row 7 holds nan")
    with pytest.raises(ScoringFailed, match="^row 7 holds nan$"):
        for _ in range(SHARDS):
            take(work)
    work.close()
    assert claims_at(store) == []
