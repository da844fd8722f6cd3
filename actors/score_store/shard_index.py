"""What a shard's index says of its rows: where their bytes stand, and what ranks their targets. N targets of a row.

A step's targets are ranked by the teacher's uncertainty at all of them, on every worker. A worker reads the indexes of all rows,
4 bytes a target, and the scores of its own rows alone.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from actors.records import TeacherScores, uncertainty

SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("bytes", pa.int64()),
        ("checksum", pa.uint32()),
        ("teacher_loss", pa.float64()),
        ("uncertainty", pa.large_list(pa.float32())),
    ]
)


def checksum(content: bytes) -> int:
    """Return the CRC-32 of a row's bytes."""
    return zlib.crc32(content)


def encode_index(scores: Sequence[TeacherScores], rows: Sequence[bytes]) -> bytes:
    """Return the index of a shard as an Arrow IPC file.

    Args:
        scores: of its rows, in their order.
        rows: the same as they are stored.
    """
    offsets = np.concatenate([[0], np.cumsum([len(score.target_logprob) for score in scores])])
    columns = [
        pa.array([bytes.fromhex(score.key) for score in scores], pa.binary(16)),
        pa.array([len(row) for row in rows], pa.int64()),
        pa.array([checksum(row) for row in rows], pa.uint32()),
        pa.array([-float(score.target_logprob.mean(dtype=np.float64)) for score in scores], pa.float64()),
        pa.LargeListArray.from_arrays(
            pa.array(offsets, pa.int64()), pa.array(np.concatenate([uncertainty(score) for score in scores]))
        ),
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
    return sink.getvalue().to_pybytes()


class ShardIndex:
    """The index of one shard, by row; arrays are views into the file."""

    def __init__(self, buffer: pa.Buffer) -> None:
        batch = pa.ipc.open_file(buffer).get_batch(0)
        self._keys = batch["key"]
        self._bytes = np.asarray(batch["bytes"])
        self._checksums = np.asarray(batch["checksum"])
        self._teacher_losses = np.asarray(batch["teacher_loss"])
        self._offsets = np.asarray(batch["uncertainty"].offsets)
        self.uncertainties = np.asarray(batch["uncertainty"].values)
        """float32, the teacher's mass off the target at all targets of the shard, row after row."""

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, row: int) -> str:
        """Return the key of a row's example."""
        return self._keys[row].as_py().hex()

    def place(self, row: int) -> tuple[int, int]:
        """Return where the row's bytes begin and end."""
        start = int(self._bytes[:row].sum())  # not kept: 8 bytes a row of the whole store, on every worker
        return start, start + int(self._bytes[row])

    def checksum(self, row: int) -> int:
        """Return the CRC-32 of the row's bytes."""
        return int(self._checksums[row])

    def targets(self, row: int) -> int:
        """Return N."""
        return int(self._offsets[row + 1] - self._offsets[row])

    def first_target(self, row: int) -> int:
        """Return the place of the row's first target among those of the shard."""
        return int(self._offsets[row])

    def uncertainty(self, row: int) -> np.ndarray:
        """Return the teacher's mass off the target at each of them, float32 [N]; a view."""
        return self.uncertainties[self._offsets[row] : self._offsets[row + 1]]

    def teacher_loss(self, row: int) -> float:
        """Return the teacher's own mean loss on the row's targets, in nats."""
        return float(self._teacher_losses[row])
