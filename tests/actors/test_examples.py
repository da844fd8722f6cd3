import hashlib
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from actors import examples as examples_module
from actors.examples import SCHEMA, ExampleFile, record_batch, with_shortest_prompts, write_batches, write_examples
from actors.records import Example, example_key
from tests.fakes import fake_examples


def read_slowly(path: Path) -> list[Example]:
    """What a file holds, by Arrow's own Python objects."""
    rows = pa.ipc.open_stream(path.read_bytes()).read_all().to_pylist()
    return [
        Example(np.array(row["token_ids"], np.int32), np.array(row["loss_mask"], bool), row["key"].hex(), row["row"])
        for row in rows
    ]


def assert_same(found: Example, wanted: Example) -> None:
    np.testing.assert_array_equal(found.token_ids, wanted.token_ids)
    np.testing.assert_array_equal(found.loss_mask, wanted.loss_mask)
    assert (found.key, found.row) == (wanted.key, wanted.row)
    assert type(found.row) is int
    assert (found.token_ids.dtype, found.loss_mask.dtype) == (np.int32, np.bool_)


def in_small_batches(monkeypatch: pytest.MonkeyPatch, tokens: int, rows: int) -> None:
    monkeypatch.setattr(examples_module, "MOST_TOKENS", tokens)
    monkeypatch.setattr(examples_module, "MOST_ROWS", rows)


@pytest.mark.parametrize(("tokens", "rows"), [(10**6, 10**6), (60, 10**6), (10**6, 3), (1, 10**6), (40, 4)])
def test_examples_come_back_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, rows: int) -> None:
    in_small_batches(monkeypatch, tokens, rows)
    examples = fake_examples(17)
    write_examples(tmp_path / "train.arrow", iter(examples))
    file, slowly = ExampleFile(tmp_path / "train.arrow"), read_slowly(tmp_path / "train.arrow")
    assert len(file) == len(slowly) == 17
    for position, example in enumerate(examples):
        assert_same(file[position], example)
        assert_same(slowly[position], example)
        assert (file.key(position), file.row(position)) == (example.key, example.row)
    assert file.rows.tolist() == list(range(17)) and file.rows.dtype == np.int64
    assert file.lengths.tolist() == [len(example.token_ids) for example in examples] and file.lengths.dtype == np.int64
    assert file.target_counts.tolist() == [len(example.targets) for example in examples]
    assert file.tokens == sum(len(example.token_ids) for example in examples)
    assert file.largest_id == max(int(example.token_ids.max()) for example in examples)
    assert [path.name for path in tmp_path.iterdir()] == ["train.arrow"]


@pytest.mark.parametrize(("tokens", "rows"), [(10**6, 10**6), (40, 4), (1, 1)])
def test_the_names_of_rows_and_tokens_are_those_that_stores_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, rows: int
) -> None:
    in_small_batches(monkeypatch, tokens, rows)
    examples = fake_examples(7)
    write_examples(tmp_path / "train.arrow", examples)
    file = ExampleFile(tmp_path / "train.arrow")
    assert file.hash == "a9b9a45c650e912ca8c4f98c30a6d0cf"
    assert file.tokens_hash == "605e0650207201ff188c67b09efc58cd"
    assert file.hash == hashlib.blake2b(b"".join(bytes.fromhex(one.key) for one in examples), digest_size=16).hexdigest()
    ends = np.cumsum([0, *(len(example.token_ids) for example in examples)]).astype("<i4")
    content = ends.tobytes() + np.concatenate([example.token_ids for example in examples]).astype("<i4").tobytes()
    assert file.tokens_hash == hashlib.blake2b(content, digest_size=16).hexdigest()
    write_examples(tmp_path / "turned.arrow", examples[::-1])
    assert ExampleFile(tmp_path / "turned.arrow").hash != file.hash


def test_offsets_have_64_bits_and_batches_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_batches(monkeypatch, 40, 4)
    write_examples(tmp_path / "train.arrow", fake_examples(50))
    reader = pa.ipc.open_stream((tmp_path / "train.arrow").read_bytes())
    assert reader.schema.field("token_ids").type == pa.large_list(pa.int32())
    assert reader.schema.field("loss_mask").type == pa.large_list(pa.uint8())
    assert reader.schema.field("key").type == pa.binary(16)
    sizes = [(len(batch), len(batch["token_ids"].values)) for batch in reader]
    assert len(sizes) > 10 and sum(rows for rows, _ in sizes) == 50
    assert all(rows <= 4 and tokens <= 40 for rows, tokens in sizes)


@pytest.mark.parametrize("bounds", [(10**6, 10**6), (40, 4), (1, 1)])
@pytest.mark.parametrize("cuts", [(50,), (1,) * 50, (0, 7, 0, 0, 30, 13, 0)])
def test_a_file_does_not_tell_in_which_batches_its_rows_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounds: tuple[int, int], cuts: tuple[int, ...]
) -> None:
    in_small_batches(monkeypatch, *bounds)
    examples = fake_examples(50)
    ends = np.cumsum(cuts).tolist()
    batches = [record_batch(examples[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    write_batches(tmp_path / "cut.arrow", batches)
    write_examples(tmp_path / "whole.arrow", examples)
    assert (tmp_path / "cut.arrow").read_bytes() == (tmp_path / "whole.arrow").read_bytes()
    file = ExampleFile(tmp_path / "cut.arrow")
    assert [file.key(position) for position in range(len(file))] == [example.key for example in examples]


def test_a_writer_holds_one_batch_of_an_iterator(tmp_path: Path) -> None:
    def rows() -> Iterator[Example]:
        for row in range(12_000):
            token_ids = np.full(1000, row, np.int32)
            yield Example(token_ids, np.arange(1000) > 0, example_key(token_ids[:4], np.array([])), row)

    tracemalloc.start()
    write_examples(tmp_path / "train.arrow", rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = (tmp_path / "train.arrow").stat().st_size
    assert size > 60e6 and peak < 35e6, "a batch is 10 MB, and is there as rows, as columns and as bytes"
    assert ExampleFile(tmp_path / "train.arrow")[11_999].token_ids[0] == 11_999


def test_opening_a_file_makes_no_object_for_a_row(tmp_path: Path) -> None:
    rows = 100_000
    token_ids, mask = np.arange(4, dtype=np.int32), np.arange(4) > 1
    write_examples(tmp_path / "train.arrow", (Example(token_ids, mask, f"{row:032x}", row) for row in range(rows)))
    tracemalloc.start()
    file = ExampleFile(tmp_path / "train.arrow")
    assert len(file) == rows and file.hash and file.key(99_999) == f"{99_999:032x}"
    opened = tracemalloc.get_traced_memory()[0]
    assert file.lengths.sum() == file.tokens == 4 * rows
    counted = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert opened < 200_000
    assert counted - opened < 9 * rows


def test_a_file_without_rows_is_a_file(tmp_path: Path) -> None:
    write_examples(tmp_path / "none.arrow", [])
    file = ExampleFile(tmp_path / "none.arrow")
    assert (len(file), file.tokens, file.lengths.tolist(), file.rows.tolist()) == (0, 0, [], [])
    assert file.hash == hashlib.blake2b(digest_size=16).hexdigest()


@pytest.mark.parametrize("position", [-1, 3])
def test_there_is_no_position_outside(tmp_path: Path, position: int) -> None:
    write_examples(tmp_path / "train.arrow", fake_examples(3))
    with pytest.raises(IndexError, match=f"there is no position {position} among 3 examples"):
        ExampleFile(tmp_path / "train.arrow")[position]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def rows() -> Iterator[Example]:
        yield from fake_examples(3)
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        write_examples(tmp_path / "train.arrow", rows())
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_an_earlier_format_is_to_be_prepared_again(tmp_path: Path) -> None:
    path = tmp_path / "train.arrow"
    lists = pa.list_(pa.int32())
    old = pa.table(
        {"row": [0], "key": ["ab" * 16], "token_ids": pa.array([[1, 2]], lists), "loss_mask": pa.array([[0, 1]], lists)}
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, old.schema) as writer:
        writer.write_table(old)
    with pytest.raises(ValueError, match=r"train.arrow has format 1, this version reads format 2; .* its data is prepared again"):
        ExampleFile(path)
    for metadata, found in ((None, "None"), ({"format": "3"}, "3")):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA.with_metadata(metadata)):
            pass
        with pytest.raises(ValueError, match=f"has format {found}, this version reads format 2; give the run another name"):
            ExampleFile(path)


def test_a_file_that_lost_its_last_batches_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_batches(monkeypatch, 10**6, 2)
    path = tmp_path / "train.arrow"
    write_examples(path, fake_examples(6))
    content = path.read_bytes()
    starts = [found.start() for found in re.finditer(b"\xff\xff\xff\xff.\x01\x00\x00", content, re.DOTALL)]
    assert len(starts) == 3, "as many batches"
    path.write_bytes(content[: starts[-1]])
    with pytest.raises(ValueError, match="train.arrow is damaged: it holds 4 of 6 rows; delete it, and prepare the data again"):
        ExampleFile(path)


def test_arrays_are_views_into_the_mapped_file(tmp_path: Path) -> None:
    write_examples(tmp_path / "train.arrow", fake_examples(2))
    file = ExampleFile(tmp_path / "train.arrow")
    assert np.shares_memory(file[0].token_ids, file[0].token_ids)
    assert not file[0].token_ids.flags.writeable
    assert not file.lengths.flags.writeable and not file.rows.flags.writeable


def test_rows_are_found_by_the_length_of_their_prompts(tmp_path: Path) -> None:
    examples = fake_examples(20)
    write_examples(tmp_path / "rows.arrow", examples)
    file = ExampleFile(tmp_path / "rows.arrow")
    found = [int(row.target_positions[0]) for row in with_shortest_prompts(file, 6)]
    assert found == sorted(int(row.target_positions[0]) for row in examples)[:6]
    assert len(with_shortest_prompts(file, 50)) == 20 and with_shortest_prompts(file, 0) == []


def test_other_tokens_under_the_same_keys_have_another_name(tmp_path: Path) -> None:
    names = []
    for token in (1, 1, 2):
        example = Example(np.array([token, 7], dtype=np.int32), np.array([False, True]), "ab" * 16, 0)
        write_examples(tmp_path / "rows.arrow", [example])
        names.append(ExampleFile(tmp_path / "rows.arrow"))
    assert names[0].hash == names[2].hash
    assert names[0].tokens_hash == names[1].tokens_hash != names[2].tokens_hash
