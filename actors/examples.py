"""Tokenized rows on disk, memory-mapped: one Arrow IPC file a split, read by teachers and students alike."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from actors.files import write_atomically
from actors.records import Example, examples_hash

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
    ]
)


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples in their order to ``path``, in one rename."""
    table = pa.table(
        {
            "row": [example.row for example in examples],
            "key": [example.key for example in examples],
            "token_ids": pa.array([example.token_ids for example in examples], SCHEMA.field("token_ids").type),
            "loss_mask": pa.array([example.loss_mask.astype(np.uint8) for example in examples], SCHEMA.field("loss_mask").type),
        },
        schema=SCHEMA,
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table.combine_chunks())
    write_atomically(path, sink.getvalue().to_pybytes())


class ExampleFile:
    """The examples of one split, by position. Arrays are views into the mapped file."""

    def __init__(self, path: Path) -> None:
        batches = pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks().to_batches()
        self._columns = batches[0] if batches else pa.RecordBatch.from_pylist([], schema=SCHEMA)
        ids, mask = self._columns["token_ids"], self._columns["loss_mask"]
        self._offsets = np.asarray(ids.offsets)
        self._token_ids = np.asarray(ids.values)
        self._loss_mask = np.asarray(mask.values).view(bool)
        self.keys: list[str] = self._columns["key"].to_pylist()
        self.rows: list[int] = self._columns["row"].to_pylist()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, position: int) -> Example:
        start, stop = self._offsets[position], self._offsets[position + 1]
        return Example(self._token_ids[start:stop], self._loss_mask[start:stop], self.keys[position], self.rows[position])

    @property
    def lengths(self) -> np.ndarray:
        """int64 [rows], tokens of each row."""
        return np.diff(self._offsets).astype(np.int64)

    @property
    def tokens_hash(self) -> str:
        """Name of the tokens of these examples in this order, for keys that do not stand for them."""
        digest = hashlib.blake2b(digest_size=16)
        for column in (self._offsets, self._token_ids[: self._offsets[-1]]):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    @property
    def hash(self) -> str:
        """Name of these examples in this order."""
        return examples_hash(self.keys)


def spread_over_lengths(examples: ExampleFile, count: int) -> list[Example]:
    """Return ``count`` of the rows, or all where there are fewer: the shortest, the longest, and some between."""
    order = np.argsort(examples.lengths, kind="stable")
    places = np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))
    return [examples[int(order[place])] for place in places]


def with_shortest_prompts(examples: ExampleFile, count: int) -> list[Example]:
    """Return ``count`` of the rows, or all where there are fewer: those with the fewest tokens before their first target."""
    prompts = np.array([int(examples[position].loss_mask.argmax()) for position in range(len(examples))])
    return [examples[int(position)] for position in np.argsort(prompts, kind="stable")[:count]]
