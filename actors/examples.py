"""Tokenized rows on disk, memory-mapped: one file a split, read by teachers and students alike. B rows of a batch.

A file is an Arrow IPC stream of record batches of bounded size, so that neither writing nor opening it takes memory for all rows.
Its schema's metadata holds what is known when all are written: the name of the rows, and their counts.
"""

import hashlib
import io
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from actors.files import whole_file
from actors.records import Example

FORMAT = 2  # 1 was a single batch with 32-bit offsets
FILE_OF_FORMAT_1 = b"ARROW1"  # as such a file begins; a stream begins otherwise
MOST_TOKENS, MOST_ROWS = 1 << 21, 1 << 14
"""Of a batch. A row of more tokens has a batch of its own."""
KEY_BYTES = 16

SCHEMA = pa.schema([
    ("row", pa.int64()), ("key", pa.binary(KEY_BYTES)), ("token_ids", pa.large_list(pa.int32())),
    ("loss_mask", pa.large_list(pa.uint8())),
])  # fmt: skip


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write examples in their order to ``path``, in one rename; of an iterator no more than a batch is held."""
    write_batches(path, map(record_batch, _some_at_a_time(examples)))


def write_batches(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Write the examples of record batches, in their order, to ``path``, in one rename.

    However the examples are cut into batches, the file is the same, byte for byte.
    """
    with whole_file(path) as file:
        _write_stream(file, batches)


def file_of_examples(examples: Iterable[Example]) -> bytes:
    """Return what ``write_examples`` writes."""
    file = io.BytesIO()
    _write_stream(file, map(record_batch, _some_at_a_time(examples)))
    return file.getvalue()


def _write_stream(file: BinaryIO, batches: Iterable[pa.RecordBatch]) -> None:
    digest, rows, tokens = hashlib.blake2b(digest_size=KEY_BYTES), 0, 0
    # The final schema takes the place of this one, and is as long: its values are.
    with pa.ipc.new_stream(file, _schema(digest.hexdigest(), rows, tokens)) as writer:
        for batch in _cut_anew(batches):
            writer.write_batch(batch)
            digest.update(batch_keys(batch).data)
            rows, tokens = rows + len(batch), tokens + len(batch["token_ids"].values)
    file.seek(0)
    file.write(_schema(digest.hexdigest(), rows, tokens).serialize())


def record_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """Return examples as they are written."""
    keys = b"".join(bytes.fromhex(example.key) for example in examples)
    assert len(keys) == KEY_BYTES * len(examples), "keys are of one length"
    offsets = pa.array(np.cumsum([0, *(len(example.token_ids) for example in examples)]), pa.int64())
    ids = np.concatenate([np.zeros(0, np.int32), *(example.token_ids for example in examples)])
    mask = np.concatenate([np.zeros(0, bool), *(example.loss_mask for example in examples)]).astype(np.uint8)
    columns = [
        pa.array([example.row for example in examples], pa.int64()),
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(examples), [None, pa.py_buffer(keys)]),
        pa.LargeListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
        pa.LargeListArray.from_arrays(offsets, pa.array(mask, pa.uint8())),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def batch_keys(batch: pa.RecordBatch) -> np.ndarray:
    """Return the keys of a batch that is no slice, uint8 [B, 16]."""
    count = len(batch)
    return np.frombuffer(batch["key"].buffers()[1], np.uint8, count * KEY_BYTES).reshape(count, KEY_BYTES)


class ExampleFile:
    """The examples of one split, by position. Arrays are views into the mapped file; nothing is kept for single rows.

    Args:
        path: of the file, or its address if it is none of this machine.
        content: what such a file holds.

    Raises:
        ValueError: if the file has another format, or is cut short.
    """

    def __init__(self, path: Path | str, content: pa.Buffer | None = None) -> None:
        mapped = pa.memory_map(str(path)) if content is None else pa.BufferReader(content)
        if mapped.read(len(FILE_OF_FORMAT_1)) == FILE_OF_FORMAT_1:
            raise _other_format(path, "1")
        mapped.seek(0)
        reader = pa.ipc.open_stream(mapped)
        said = {name.decode(): value.decode() for name, value in (reader.schema.metadata or {}).items()}
        if said.get("format") != str(FORMAT):
            raise _other_format(path, said.get("format"))
        self.hash = said["hash"]
        """Name of these examples in this order: BLAKE2b of their keys."""
        self.tokens = int(said["tokens"])
        """Tokens of all rows."""
        self._rows = int(said["rows"])
        self._batches = [_Batch.of(batch) for batch in reader]
        self._ends = list(accumulate(len(batch.rows) for batch in self._batches))
        if (found := self._ends[-1] if self._ends else 0) != self._rows:
            raise ValueError(f"{path} is damaged: it holds {found} of {self._rows} rows; delete it, and prepare the data again")

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, position: int) -> Example:
        batch, row = self._place(position)
        tokens = slice(batch.offsets[row], batch.offsets[row + 1])
        return Example(batch.token_ids[tokens], batch.loss_mask[tokens], batch.key(row), int(batch.rows[row]))

    def key(self, position: int) -> str:
        """Return the key of the example at a position."""
        batch, row = self._place(position)
        return batch.key(row)

    def row(self, position: int) -> int:
        """Return the index, in the dataset it came from, of the row at a position."""
        batch, row = self._place(position)
        return int(batch.rows[row])

    @property
    def rows(self) -> np.ndarray:
        """int64 [rows], the index of each row in the dataset it came from; of a file of one batch a view."""
        return _joined([batch.rows for batch in self._batches])

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [rows], tokens of each row; read only."""
        lengths = np.empty(self._rows, np.int64)  # filled in place: of many rows there is no room for two
        for end, batch in zip(self._ends, self._batches, strict=True):
            np.subtract(batch.offsets[1:], batch.offsets[:-1], out=lengths[end - len(batch.rows) : end])
        lengths.flags.writeable = False
        return lengths

    @property
    def target_counts(self) -> np.ndarray:
        """int64 [rows], targets of each row; all masks are read."""
        return _joined([batch.target_counts() for batch in self._batches])

    @property
    def largest_id(self) -> int:
        """The largest token id of all rows, of which there is one; all tokens are read."""
        return max(int(batch.token_ids.max()) for batch in self._batches)

    @property
    def tokens_hash(self) -> str:
        """Name of the tokens of these examples in this order, for keys that do not stand for them; all tokens are read."""
        # Offsets count in 32 bits where these suffice: the name is of the tokens, and not of how they are cut into batches.
        kind, before, digest = "<i4" if self.tokens < 1 << 31 else "<i8", 0, hashlib.blake2b(digest_size=KEY_BYTES)
        digest.update(np.zeros(1, kind).data)
        for batch in self._batches:
            digest.update((before + batch.offsets[1:]).astype(kind).data)
            before += int(batch.offsets[-1])
        for batch in self._batches:
            digest.update(batch.token_ids.data)
        return digest.hexdigest()

    def _place(self, position: int) -> "tuple[_Batch, int]":
        """Return the batch of a position, and the row in it."""
        if not 0 <= position < self._rows:
            raise IndexError(f"there is no position {position} among {self._rows} examples")
        number = bisect_right(self._ends, position)
        return self._batches[number], position - (self._ends[number - 1] if number else 0)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Views of one record batch."""

    offsets: np.ndarray
    """int64 [B + 1], where rows begin and end among the tokens."""
    token_ids: np.ndarray
    """int32, of all rows."""
    loss_mask: np.ndarray
    """bool, of all rows."""
    keys: np.ndarray
    """uint8 [B, 16]"""
    rows: np.ndarray
    """int64 [B]"""

    @staticmethod
    def of(batch: pa.RecordBatch) -> "_Batch":
        """Take the views."""
        ids, mask = batch["token_ids"], np.asarray(batch["loss_mask"].values).view(bool)
        return _Batch(np.asarray(ids.offsets), np.asarray(ids.values), mask, batch_keys(batch), np.asarray(batch["row"]))

    def key(self, row: int) -> str:
        """Return the key of a row."""
        return self.keys[row].tobytes().hex()

    def target_counts(self) -> np.ndarray:
        """int64 [B], targets of each row."""
        targets_before = np.concatenate([[0], np.cumsum(self.loss_mask, dtype=np.int64)])
        return np.diff(targets_before[self.offsets])


def spread_over_lengths(examples: ExampleFile, count: int) -> list[Example]:
    """Return ``count`` of the rows, or all where there are fewer: the shortest, the longest, and some between."""
    order = np.argsort(examples.lengths, kind="stable")
    places = np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))
    return [examples[int(order[place])] for place in places]


def with_shortest_prompts(examples: ExampleFile, count: int) -> list[Example]:
    """Return ``count`` of the rows, or all where there are fewer: those with the fewest tokens before their first target."""
    prompts = np.array([int(examples[position].loss_mask.argmax()) for position in range(len(examples))])
    return [examples[int(position)] for position in np.argsort(prompts, kind="stable")[:count]]


def _schema(name: str, rows: int, tokens: int) -> pa.Schema:
    """Return the schema with what is known of the rows, in texts whose lengths do not depend on it."""
    return SCHEMA.with_metadata({"format": str(FORMAT), "hash": name, "rows": f"{rows:020}", "tokens": f"{tokens:020}"})


def _some_at_a_time(examples: Iterable[Example]) -> Iterator[list[Example]]:
    some: list[Example] = []
    tokens = 0
    for example in examples:
        some.append(example)
        tokens += len(example.token_ids)
        if len(some) >= MOST_ROWS or tokens >= MOST_TOKENS:
            yield some
            some, tokens = [], 0
    yield some


def _cut_anew(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Join and cut batches so that each has as many rows as ``MOST_TOKENS`` and ``MOST_ROWS`` allow; none is empty."""
    parts: list[pa.RecordBatch] = []
    rows = tokens = 0
    for batch in batches:
        lengths, start = np.diff(np.asarray(batch["token_ids"].offsets)).tolist(), 0
        for row, length in enumerate(lengths):
            if rows and (rows == MOST_ROWS or tokens + length > MOST_TOKENS):
                yield _joined_batches([*parts, batch.slice(start, row - start)])
                parts, rows, tokens, start = [], 0, 0, row
            rows, tokens = rows + 1, tokens + length
        parts.append(batch.slice(start))
    if rows:
        yield _joined_batches(parts)


def _joined_batches(parts: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.concat_batches([part for part in parts if len(part)])


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *parts])


def _other_format(path: Path | str, found: str | None) -> ValueError:
    return ValueError(
        f"{path} has format {found}, this version reads format {FORMAT}; give the run another name (name=...) or delete its "
        "folder, so that its data is prepared again"
    )
