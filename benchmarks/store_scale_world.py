"""What ``benchmarks.store_scale`` measures: rows, and a store whose shards have own indexes and share the bytes of their rows."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from actors.examples import write_examples
from actors.records import Example, TeacherScores, tail_logmass
from actors.score_store.shard_index import SCHEMA
from actors.score_store.store import ScoreStore

TOP_K, VOCAB = 2, 32_000


@dataclass(frozen=True)
class Size:
    """What is measured."""

    rows: int
    targets: int
    shards: int
    batch_rows: int

    @property
    def row_targets(self) -> int:
        """Targets of a row."""
        return self.targets // self.rows

    @property
    def shard_rows(self) -> int:
        """Rows of a shard."""
        return self.rows // self.shards


def rows_of(count: int, tokens: int) -> Iterator[Example]:
    """Yield rows that begin at different places of one long text; their keys count them, and all but one token are targets."""
    text = np.random.default_rng(0).integers(0, VOCAB, tokens + 997).astype(np.int32)
    mask = np.arange(tokens) > 0
    return (Example(text[row % 997 :][:tokens], mask, f"{row:032x}", row) for row in range(count))


def write_store(folder: Path, size: Size) -> None:
    """Write a store whose shards have real indexes and share the bytes of their rows."""
    identity = {"top_k": TOP_K, "vocab_size": VOCAB}
    store = ScoreStore.open_or_create(folder / "store", identity, size.rows, size.shard_rows)
    examples = list(rows_of(size.shard_rows, size.row_targets + 1))
    generator = np.random.default_rng(0)
    store.write_shard(0, examples, [made_up(example, generator) for example in examples])
    first = store.shard_info(0)
    template = pa.ipc.open_file((Path(store.place) / "shard-00000.arrow").read_bytes()).get_batch(0)
    for shard in range(store.shard_count):
        name = f"shard-{shard:05d}"
        index = drawn_index(template, shard * size.shard_rows, generator)
        (Path(store.place) / f"{name}.arrow").write_bytes(index)
        if shard:
            os.link(Path(store.place) / "shard-00000.rows", Path(store.place) / f"{name}.rows")
        info = replace(first, shard=shard, index_bytes=len(index), index_sha256=hashlib.sha256(index).hexdigest())
        (Path(store.place) / f"{name}.json").write_text(json.dumps(asdict(info)))
    write_examples(folder / "rows.arrow", rows_of(size.rows, 2))


def drawn_index(template: pa.RecordBatch, first_row: int, generator: np.random.Generator) -> memoryview:
    """Return the index of a shard like another one's, with keys that count its rows, and uncertainties drawn for it."""
    keys = np.zeros((len(template), 2), ">u8")
    keys[:, 1] = first_row + np.arange(len(template))
    offsets = template["uncertainty"].offsets
    drawn = generator.random(offsets[-1].as_py(), np.float32)
    columns = dict(zip(SCHEMA.names, template.columns, strict=True))
    columns["key"] = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(keys), [None, pa.py_buffer(keys.tobytes())])
    columns["uncertainty"] = pa.LargeListArray.from_arrays(offsets, pa.array(drawn))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.record_batch(list(columns.values()), schema=SCHEMA))
    return memoryview(sink.getvalue())


def made_up(example: Example, generator: np.random.Generator) -> TeacherScores:
    """Return scores of a row."""
    target = np.log(generator.uniform(0.2, 0.9, len(example.targets))).astype(np.float32)
    shares = np.log(np.array([0.5, 0.25])) + np.log1p(-np.exp(target.astype(np.float64)))[:, None]
    ids = (example.targets[:, None] + np.array([1, 2])) % VOCAB
    logprobs = shares.astype(np.float32)
    return TeacherScores(example.key, target, ids.astype(np.int32), logprobs, tail_logmass(target, logprobs))
