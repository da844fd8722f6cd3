"""The score store in object storage: a real S3 server on the loopback, and what goes wrong on the way to one."""

import logging
import threading
from pathlib import Path

import numpy as np
import pytest

from actors.config.places import within
from actors.records import Example
from actors.score_store.store import ScoreStore, ScoringFailed
from actors.storage import object_folder
from actors.storage.clouds import CloudStorage
from actors.storage.folder import open_folder
from actors.storage.object_folder import StorageError
from tests.fakes import FAKE_VOCAB, expected_scores, fake_examples
from tests.s3_world import BUCKET, KEYS, Faults, environment, s3_server

ROWS, ROWS_PER_SHARD, TOP_K = 10, 4, 6
IDENTITY = {"teacher": "t", "top_k": TOP_K, "vocab_size": FAKE_VOCAB}


@pytest.fixture
def place(faults: Faults, tmp_path: Path) -> str:
    return f"s3://{BUCKET}/{tmp_path.name}/store"


@pytest.fixture
def any_place(anywhere: str) -> str:
    return f"{anywhere}/store"


@pytest.fixture
def examples() -> list[Example]:
    return fake_examples(ROWS)


def begin(place: str) -> ScoreStore:
    return ScoreStore.open_or_create(place, IDENTITY, ROWS, ROWS_PER_SHARD)


def write(store: ScoreStore, examples: list[Example], *shards: int) -> None:
    for shard in shards:
        rows = [examples[position] for position in store.positions(shard)]
        store.write_shard(shard, rows, [expected_scores(row, TOP_K) for row in rows])


def assert_read(store: ScoreStore, examples: list[Example]) -> None:
    for position, example in enumerate(examples):
        wanted, found = expected_scores(example, TOP_K), store.scores_at(position)
        assert found.key == example.key
        np.testing.assert_array_equal(found.target_logprob, wanted.target_logprob)
        np.testing.assert_array_equal(found.topk_ids, wanted.topk_ids)


def objects_of(faults: Faults, method: str) -> list[str]:
    return [line.rpartition("/")[2] for line in faults.seen if line.startswith(f"{method} ") and "list-type" not in line]


def test_a_store_is_begun_filled_found_again_and_whole(any_place: str, examples: list[Example]) -> None:
    store = begin(any_place)
    assert store.missing_shards() == [0, 1, 2] and store.known_range() is None
    write(store, examples, 0, 2)
    again = begin(any_place)
    assert again.missing_shards() == [1] and again.is_there(2) and not again.is_there(1)
    write(again, examples, 1)
    fresh = ScoreStore(any_place)
    assert fresh.complete and [info.rows for info in fresh.shard_infos()] == [4, 4, 2]
    fresh.verify()
    assert_read(fresh, examples)
    fresh.discard_shard(1)
    assert fresh.missing_shards() == [1] and not ScoreStore(any_place).is_there(1)


def test_the_folder_of_stores_is_listed(any_place: str) -> None:
    begin(any_place)
    root = open_folder(any_place.rpartition("/")[0])
    assert root.folders() == ["store"] and root.sizes() == {}
    assert open_folder(within(any_place, "nothing/here")).folders() == []


def test_rows_are_read_from_one_copy_on_the_node(place: str, faults: Faults, examples: list[Example]) -> None:
    write(begin(place), examples, 0, 1, 2)
    assert_read(ScoreStore(place), examples)
    faults.seen.clear()
    assert_read(ScoreStore(place), examples)  # another process of the node
    assert set(objects_of(faults, "GET")) == {"manifest.json", "shard-00000.json", "shard-00001.json", "shard-00002.json"}


def test_without_room_for_copies_each_row_is_read_alone(place: str, faults: Faults, examples: list[Example]) -> None:
    write(begin(place), examples, 0, 1, 2)
    with environment({"ATKD_CACHE_GIB": "0"}):
        store = ScoreStore(place)
        faults.seen.clear()
        assert_read(store, examples)
    assert objects_of(faults, "GET").count("shard-00000.rows") == ROWS_PER_SHARD
    assert objects_of(faults, "GET").count("shard-00000.arrow") == 1


def test_a_damaged_copy_is_fetched_anew_and_damage_in_the_storage_told(
    any_place: str, tmp_path: Path, examples: list[Example]
) -> None:
    store = begin(any_place)
    write(store, examples, 0, 1, 2)
    assert_read(ScoreStore(any_place), examples)
    for copy in (tmp_path / "cache").rglob("shard-*"):
        copy.write_bytes(b"\0" * copy.stat().st_size)
    assert_read(ScoreStore(any_place), examples)
    store.folder.write("shard-00001.rows", b"\0" * store.shard_info(1).row_bytes)
    for copy in (tmp_path / "cache").rglob("shard-00001.rows"):
        copy.unlink()
    with pytest.raises(ValueError, match=rf"{any_place}/shard-00001.rows is damaged: the checksum of its row 0 .*; delete shard"):
        ScoreStore(any_place).scores_at(ROWS_PER_SHARD)


def test_a_shard_scored_again_replaces_the_copy_of_the_first_scoring(any_place: str, examples: list[Example]) -> None:
    write(begin(any_place), examples, 0, 1, 2)
    assert_read(ScoreStore(any_place), examples)
    other_rows = fake_examples(ROWS + 5)[5:]
    ScoreStore(any_place).discard_shard(0)
    write(ScoreStore(any_place), other_rows, 0)
    assert_read(ScoreStore(any_place), other_rows[:ROWS_PER_SHARD])


def test_a_reader_follows_a_store_that_grows(any_place: str, examples: list[Example]) -> None:
    store, writer = begin(any_place), begin(any_place)
    timer = threading.Timer(0.3, write, (writer, examples, 0))
    timer.start()
    assert 0.2 < store.wait_for(0, timeout_seconds=20, poll_seconds=0.05) < 10
    timer.join()
    with pytest.raises(TimeoutError, match=rf"shard 1 of {any_place} did not come within 0 s"):
        store.wait_for(1, timeout_seconds=0)
    writer.declare_failed("the teacher's own words")
    with pytest.raises(ScoringFailed, match="the teacher's own words"):
        store.wait_for(1, timeout_seconds=20)
    writer.clear_failure()
    writer.clear_failure()


def test_lost_files_are_named(any_place: str, tmp_path: Path, examples: list[Example]) -> None:
    store = begin(any_place)
    write(store, examples, 0, 1, 2)
    store.folder.remove("shard-00001.rows")
    store.folder.remove("shard-00002.arrow")
    fresh = ScoreStore(any_place)
    for read in (fresh.verify, lambda: fresh.scores_at(ROWS_PER_SHARD)):
        with pytest.raises(ValueError, match=rf"{any_place}/shard-00001.rows is missing, though it was written"):
            read()
    with pytest.raises(ValueError, match=rf"{any_place}/shard-00002.arrow is missing, though it was written"):
        fresh.scores_at(2 * ROWS_PER_SHARD)
    with pytest.raises(ValueError, match=rf"no score store at {any_place}x: manifest.json is missing"):
        ScoreStore(f"{any_place}x")


def test_throttling_and_cut_connections_cost_time_alone(
    place: str, faults: Faults, examples: list[Example]
) -> None:
    store = begin(place)
    faults.cut_uploads = 3
    write(store, examples, 0)
    faults.slow_down = 3
    write(store, examples, 1, 2)
    faults.cut_answers = 3
    assert_read(ScoreStore(place), examples)
    assert faults.cut_uploads == faults.slow_down == faults.cut_answers == 0
    ScoreStore(place).verify()


def test_what_the_library_gives_up_is_tried_again(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(object_folder, "FIRST_PAUSE_SECONDS", 0.01)
    folder, troubles = open_folder(place), [OSError("AWS Error NETWORK_CONNECTION"), OSError("AWS Error SLOW_DOWN")]
    real = CloudStorage.write

    def troubled(self: CloudStorage, path: str, content: bytes) -> None:
        if troubles:
            raise troubles.pop(0)
        real(self, path, content)

    monkeypatch.setattr(CloudStorage, "write", troubled)
    with caplog.at_level(logging.WARNING, "atkd"):
        folder.write("a", b"content")
    assert folder.read("a") == b"content"
    assert [record.message for record in caplog.records] == [
        f"{place}: cannot write a, trying again in 0.0 s: AWS Error NETWORK_CONNECTION",
        f"{place}: cannot write a, trying again in 0.0 s: AWS Error SLOW_DOWN",
    ]


@pytest.mark.slow
def test_a_half_upload_does_not_count(
    place: str, faults: Faults, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_folder, "PATIENCE_SECONDS", 0.0)
    store = begin(place)
    faults.cut_uploads = 1000
    with pytest.raises(StorageError, match=rf"{place}: cannot write shard-00000.rows, tried for 0 s: "):
        write(store, examples, 0)
    faults.cut_uploads = 0
    assert ScoreStore(place).missing_shards() == [0, 1, 2]
    assert not [name for name in store.folder.names() if name.startswith("shard")]
    write(ScoreStore(place), examples, 0)
    assert ScoreStore(place).missing_shards() == [1, 2]


def test_an_old_listing_hides_a_shard_and_harms_nothing(place: str, faults: Faults, examples: list[Example]) -> None:
    store = begin(place)
    write(store, examples, 0)
    assert store.missing_shards() == [1, 2]
    faults.old_listings = True
    write(store, examples, 1, 2)
    late = ScoreStore(place)
    assert late.missing_shards() == [1, 2]  # who asks for a shard by its name sees it
    assert late.wait_until_complete(timeout_seconds=0) < 5
    assert_read(late, examples)
    late.verify()


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ((403, "AccessDenied"), "access is denied: keys are missing in this node's environment, or their owner may not"),
        ((403, "SignatureDoesNotMatch"), "(the keys are not valid there|access is denied)"),
        ((301, "PermanentRedirect"), "the bucket is in another region; AWS_REGION=… in the environment, or .?region=…"),
    ],
)
def test_who_is_refused_is_told_what_would_do(faults: Faults, refused: tuple[int, str], message: str) -> None:
    place = f"s3://{BUCKET}/refused"
    store = begin(place)
    faults.refuse = refused
    with pytest.raises(ValueError, match=rf"{place}: cannot .*: {message}"):
        store.folder.read("manifest.json")


def test_a_bucket_that_is_not_there_is_told(faults: Faults) -> None:
    with pytest.raises(ValueError, match=r"s3://no-such-bucket/a: cannot write manifest.json: there is no such bucket; make it"):
        begin("s3://no-such-bucket/a")
    with pytest.raises(ValueError, match=r"s3://bucket/a\?colour=red is not accepted: .*colour"):
        open_folder("s3://bucket/a?colour=red")


def test_keys_that_the_storage_does_not_know_are_refused(tmp_path: Path) -> None:
    with (
        s3_server(tmp_path, knows_users=True) as endpoint,
        environment({**KEYS, "AWS_ENDPOINT_URL": endpoint, "ATKD_CACHE": str(tmp_path / "cache")}),
        pytest.raises(ValueError, match=rf"s3://{BUCKET}/a: cannot look for manifest.json: access is denied: keys are missing"),
    ):
        begin(f"s3://{BUCKET}/a")
