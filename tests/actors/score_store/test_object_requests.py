"""How many requests object storage gets for a shard: what they cost, and how long they take, is the cloud's own affair."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.records import Example
from actors.score_store.open_leases import open_leases
from actors.score_store.store import ScoreStore
from tests.actors.score_store.test_object_store import ROWS, begin, write
from tests.fakes import fake_examples
from tests.s3_world import BUCKET, Faults, faulty_storage, s3_server

PLACE = f"s3://{BUCKET}/counted"


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Faults]:
    with s3_server(tmp_path) as endpoint, faulty_storage(tmp_path, endpoint) as storage:
        yield storage


def counted(storage: Faults) -> dict[str, int]:
    """Return how many requests of each kind there were since this was last asked."""
    kinds = ["LIST" if "list-type" in line else line.split()[0] for line in storage.seen]
    storage.seen.clear()
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def test_requests_of_a_shard_are_few(storage: Faults) -> None:
    examples: list[Example] = fake_examples(ROWS)
    writer, reader = begin(PLACE), ScoreStore(PLACE)
    leases = open_leases(writer.folder)
    counted(storage)
    assert leases.take(0)
    assert counted(storage) == {"LIST": 1, "PUT": 1}
    write(writer, examples, 0)
    assert counted(storage) == {"PUT": 3}
    leases.release(0)
    assert counted(storage) == {"DELETE": 1, "HEAD": 1, "PUT": 1}  # the library marks the folder, lest it vanish
    assert reader.is_there(0)
    assert counted(storage) == {"HEAD": 1}
    for position in reader.positions(0):
        reader.scores_at(position)
    assert counted(storage) == {"GET": 3, "HEAD": 5}
    another = ScoreStore(PLACE)  # a worker beside it
    counted(storage)
    for position in another.positions(0):
        another.scores_at(position)
    assert counted(storage) == {"GET": 1, "HEAD": 1}
    assert not reader.is_there(1)  # a look of who waits
    assert counted(storage) == {"HEAD": 1}
