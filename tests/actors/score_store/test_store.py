import json
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.records import NO_TOKEN, Example, keep_mass, uncertainty
from actors.score_store.identity import StoreMismatch, identity_difference, identity_hash
from actors.score_store.store import ScoreStore, ScoringFailed
from tests.fakes import FAKE_VOCAB, expected_scores, fake_examples

ROWS, ROWS_PER_SHARD, TOP_K = 10, 4, 6


def identity(**changed: Any) -> dict[str, Any]:
    return {"teacher": {"name": "t", "revision": "r"}, "top_k": TOP_K, "vocab_size": FAKE_VOCAB, **changed}


def begin(path: Path, **changed: Any) -> ScoreStore:
    return ScoreStore.open_or_create(path, identity(**changed), ROWS, ROWS_PER_SHARD)


def write(store: ScoreStore, examples: list[Example], shard: int) -> None:
    rows = [examples[position] for position in store.positions(shard)]
    store.write_shard(shard, rows, [expected_scores(row, TOP_K) for row in rows])


@pytest.fixture
def examples() -> list[Example]:
    return fake_examples(ROWS)


@pytest.fixture
def store(tmp_path: Path, examples: list[Example]) -> ScoreStore:
    store = begin(tmp_path / "store")
    for shard in range(store.shard_count):
        write(store, examples, shard)
    return store


def test_what_was_written_is_read_by_position(store: ScoreStore, examples: list[Example]) -> None:
    again = begin(Path(store.place))
    assert again.complete
    for position, example in enumerate(examples):
        wanted, found = expected_scores(example, TOP_K), again.scores_at(position)
        assert found.key == example.key
        np.testing.assert_array_equal(found.target_logprob, wanted.target_logprob)
        np.testing.assert_array_equal(found.topk_ids, wanted.topk_ids)
        np.testing.assert_allclose(found.topk_logprobs, wanted.topk_logprobs, atol=2.5e-4)
        np.testing.assert_array_equal(again.uncertainty_at(position), uncertainty(wanted))


def test_shards_are_cut_and_counted(tmp_path: Path, examples: list[Example]) -> None:
    store = begin(tmp_path / "store")
    assert [list(store.positions(shard)) for shard in range(store.shard_count)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert store.missing_shards() == [0, 1, 2]
    write(store, examples, 1)
    assert store.missing_shards() == [0, 2] and not store.complete
    info = store.shard_info(1)
    assert info.rows == 4
    assert info.targets == sum(len(example.targets) for example in examples[4:8])
    assert info.row_bytes == (Path(store.place) / "shard-00001.rows").stat().st_size
    assert info.index_bytes == (Path(store.place) / "shard-00001.arrow").stat().st_size
    assert info.bytes == info.row_bytes + info.index_bytes
    tails = np.concatenate([np.exp(expected_scores(example, TOP_K).tail_logmass) for example in examples[4:8]])
    assert info.mean_tail_mass == pytest.approx(tails.mean(), abs=1e-6)


def test_the_same_identity_has_the_same_hash_in_any_order() -> None:
    assert identity_hash({"a": 1, "b": {"c": 2, "d": 3}}) == identity_hash({"b": {"d": 3, "c": 2}, "a": 1})
    assert identity_hash({"a": 1}) != identity_hash({"a": 2})


def test_another_identity_is_refused_field_by_field(store: ScoreStore) -> None:
    wanted = identity(teacher={"name": "t", "revision": "s"}, tokenizer="abc")
    lines = identity_difference(wanted, store.identity)
    assert lines == [
        "teacher.revision: wanted 's', the store has 'r'",
        "tokenizer: wanted 'abc', the store has None (other ids for the tokens)",
    ]
    with pytest.raises(StoreMismatch, match="(?s)holds other scores than these.*teacher.revision: wanted 's'.*tokenizer"):
        ScoreStore.open_or_create(Path(store.place), wanted, ROWS, ROWS_PER_SHARD)


def test_a_store_serves_a_smaller_k_and_refuses_a_larger_one(store: ScoreStore, examples: list[Example]) -> None:
    smaller = begin(Path(store.place), top_k=3)
    wanted, found = expected_scores(examples[2], 3), smaller.scores_at(2, top_k=3)
    np.testing.assert_array_equal(found.topk_ids, wanted.topk_ids)
    np.testing.assert_allclose(found.tail_logmass, wanted.tail_logmass, atol=1e-3)
    with pytest.raises(StoreMismatch, match="top_k: wanted 7, the store has 6"):
        begin(Path(store.place), top_k=7)
    with pytest.raises(ValueError, match="top_k 7 exceeds the K=6"):
        smaller.scores_at(2, top_k=7)


def test_no_store_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no score store at .*manifest.json is missing"):
        ScoreStore(tmp_path)


def _edit_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_another_format_is_refused(store: ScoreStore) -> None:
    _edit_manifest(Path(store.place), lambda manifest: manifest.update(format=99))
    with pytest.raises(ValueError, match="has format 99, this version reads format 3"):
        ScoreStore(store.place)


def test_an_edited_identity_is_refused(store: ScoreStore) -> None:
    _edit_manifest(Path(store.place), lambda manifest: manifest["identity"].update(top_k=99))
    with pytest.raises(ValueError, match="manifest.json of .* was changed"):
        ScoreStore(store.place)


@pytest.mark.parametrize("name", ["manifest.json", "shard-00001.json"])
def test_a_truncated_json_is_named(store: ScoreStore, name: str) -> None:
    path = Path(store.place) / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{name} is damaged: .*delete"):
        ScoreStore(store.place).verify()


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("offset", [0, 400, -20])
def test_a_flipped_byte_of_an_index_is_found_by_readers_and_by_verify(store: ScoreStore, offset: int) -> None:
    flip(Path(store.place) / "shard-00001.arrow", offset)
    fresh = ScoreStore(store.place)
    fresh.scores_at(0)
    for read in (fresh.verify, lambda: fresh.scores_at(5), lambda: fresh.uncertainty_at(5)):
        with pytest.raises(ValueError, match="shard-00001.arrow is damaged: its sha256 is .*delete shard-00001.json"):
            read()


def test_a_flipped_byte_of_a_row_is_found_by_who_reads_the_row_and_by_verify(store: ScoreStore) -> None:
    flip(Path(store.place) / "shard-00001.rows", -1)
    fresh = ScoreStore(store.place)
    fresh.scores_at(6), fresh.uncertainty_at(7)
    for read in (fresh.verify, lambda: fresh.scores_at(7)):
        with pytest.raises(ValueError, match="00001.rows is damaged: the checksum of its row 3 is .*delete shard-00001.json"):
            read()


def test_a_large_store_is_verified_in_part(store: ScoreStore) -> None:
    flip(Path(store.place) / "shard-00001.rows", 0)
    fresh, total = ScoreStore(store.place), sum(store.shard_info(shard).row_bytes for shard in range(3))
    fresh.verify(most_bytes=total // 2)  # every second shard
    with pytest.raises(ValueError, match="shard-00001.rows is damaged"):
        fresh.verify(most_bytes=total)
    (Path(store.place) / "shard-00001.rows").write_bytes(b"half")
    with pytest.raises(ValueError, match="shard-00001.rows is damaged: it has 4 bytes, .* was written; delete shard-00001.json"):
        fresh.verify(most_bytes=1)


@pytest.mark.parametrize("content", [b"", b"ARROW1"])
@pytest.mark.parametrize("kind", ["arrow", "rows"])
def test_a_truncated_shard_is_damaged(store: ScoreStore, kind: str, content: bytes) -> None:
    (Path(store.place) / f"shard-00001.{kind}").write_bytes(content)
    for read in (store.verify, lambda: store.scores_at(4)):
        with pytest.raises(ValueError, match=f"shard-00001.{kind} is damaged"):
            read()


@pytest.mark.parametrize("kind", ["arrow", "rows"])
def test_a_lost_shard_file_is_missed(store: ScoreStore, kind: str) -> None:
    (Path(store.place) / f"shard-00001.{kind}").unlink()
    for read in (store.verify, lambda: store.scores_at(4)):
        with pytest.raises(ValueError, match=f"shard-00001.{kind} is missing, though it was written; delete shard-00001.json"):
            read()


def test_too_many_shards_are_refused_before_the_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scores\.rows_per_shard is 4, which makes 10001 .*scores\.rows_per_shard=5 would do"):
        ScoreStore.open_or_create(tmp_path / "store", identity(), 4 * 10_000 + 1, 4)
    assert not (tmp_path / "store").exists()


def test_a_discarded_shard_is_missing_again(store: ScoreStore, examples: list[Example]) -> None:
    store.discard_shard(1)
    assert store.missing_shards() == [1]
    write(store, examples, 1)
    store.verify()
    assert store.scores_at(5).key == examples[5].key


def test_wrong_scores_are_not_written(store: ScoreStore, examples: list[Example]) -> None:
    store.discard_shard(2)
    scores = [expected_scores(example, TOP_K) for example in examples[8:]]
    with pytest.raises(ValueError, match="row 8 .*the scores carry key .* those of another row"):
        store.write_shard(2, examples[8:], scores[::-1])
    assert store.missing_shards() == [2]


def test_a_full_disk_leaves_no_half_shard_and_the_next_run_completes(tmp_path: Path, examples: list[Example]) -> None:
    store = begin(tmp_path / "store")
    write(store, examples, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(store, examples, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in Path(store.place).glob("*.json")) == ["manifest.json", "shard-00000.json"]
    assert not list(Path(store.place).glob("*.tmp"))
    for shard in begin(Path(store.place)).missing_shards():
        write(store, examples, shard)
    store.verify()
    assert store.complete


def test_a_reader_waits_for_its_shard(tmp_path: Path, examples: list[Example]) -> None:
    store = begin(tmp_path / "store")
    writer = threading.Timer(0.2, write, (ScoreStore(store.place), examples, 0))
    writer.start()
    assert store.wait_for(0, timeout_seconds=30, poll_seconds=0.01) > 0
    assert store.scores_at(0).key == examples[0].key
    writer.join()


def test_a_reader_does_not_wait_for_ever(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="shard 2 of .* did not come within 0 s; raise scores.wait_seconds"):
        begin(tmp_path / "store").wait_for(2, timeout_seconds=0.02, poll_seconds=0.01)


def test_a_reader_stops_with_the_teachers_own_error(tmp_path: Path, examples: list[Example]) -> None:
    store = begin(tmp_path / "store")
    write(store, examples, 0)
    store.declare_failed("row 7 holds nan")
    store.wait_for(0, timeout_seconds=1)
    with pytest.raises(ScoringFailed, match="row 7 holds nan"):
        store.wait_for(1, timeout_seconds=30)
    store.clear_failure()
    with pytest.raises(TimeoutError):
        store.wait_for(1, timeout_seconds=0.02, poll_seconds=0.01)


def test_a_store_keeps_only_as_many_tokens_as_hold_the_share_it_was_made_for(tmp_path: Path, examples: list[Example]) -> None:
    store, whole = begin(tmp_path / "share", top_mass=0.8), begin(tmp_path / "whole")
    for shard in range(store.shard_count):
        write(store, examples, shard)
        write(whole, examples, shard)
    kept = 0
    for position, example in enumerate(examples):
        wanted, found = keep_mass(expected_scores(example, TOP_K), 0.8), store.scores_at(position)
        np.testing.assert_array_equal(found.topk_ids, wanted.topk_ids)
        np.testing.assert_array_equal(found.tail_logmass, wanted.tail_logmass)
        np.testing.assert_array_equal(store.scores_at(position, 2).topk_ids, wanted.topk_ids[:, :2])
        kept += int((found.topk_ids != NO_TOKEN).sum())
    infos = [store.shard_info(shard) for shard in range(store.shard_count)]
    assert sum(info.mean_kept * info.targets for info in infos) == pytest.approx(kept)
    assert all(whole.shard_info(shard).mean_kept == TOP_K for shard in range(whole.shard_count))
    with pytest.raises(StoreMismatch, match="top_mass: wanted 0.9, the store has 0.8"):
        begin(Path(store.place), top_mass=0.9)


@pytest.mark.parametrize("content", ["{}", "[]", '{"shard": 1}', '{"target_logprob": 3, "entropy": 4}'])
def test_counts_that_were_tampered_with_are_named(store: ScoreStore, content: str) -> None:
    (Path(store.place) / "shard-00001.json").write_text(content)
    with pytest.raises(ValueError, match="shard-00001.json is damaged: .*; delete that file and run again"):
        store.shard_info(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "has format None, this version reads format 3"),
        ("[1]", "it holds list in the place of named fields; delete the folder"),
        ('{"format": 3, "identity": 3}', "KeyError: 'rows'"),
        ('{"format": 3, "identity": [], "rows": 1, "rows_per_shard": 1}', "TypeError: .*delete the folder"),
    ],
)
def test_a_manifest_that_is_none_is_named(store: ScoreStore, content: str, message: str) -> None:
    (Path(store.place) / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ScoreStore(store.place)


def test_a_clock_that_jumps_removes_no_file_that_is_being_written(store: ScoreStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Path(store.place) / "shard-00002.arrow.def.tmp"
    fresh.write_bytes(b"half a shard")
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + 1e6)
    store.remove_leftovers()
    assert fresh.exists()


def test_what_a_killed_writer_left_is_removed_once_it_is_old(store: ScoreStore) -> None:
    old, fresh = Path(store.place) / "shard-00001.arrow.abc.tmp", Path(store.place) / "shard-00002.arrow.def.tmp"
    for path in (old, fresh):
        path.write_bytes(b"half a shard")
    os.utime(old, (0, 0))
    store.remove_leftovers()
    assert not old.exists() and fresh.exists()
    store.verify()
