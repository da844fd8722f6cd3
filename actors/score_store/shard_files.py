"""The files of a store's shards. N targets, K top-k.

``shard-00042.rows`` holds the scores, row after row; ``shard-00042.arrow``, the index, says where each row stands, what its
checksum is, and what ranks its targets; ``shard-00042.json`` has the index's checksum, and counts. A shard exists from the moment
its json does: that file is renamed into place last. Each row is compared with its checksum whenever it is read.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actors.files import write_atomically
from actors.records import NO_TOKEN, TeacherScores
from actors.score_store.encoding import RowEncoding
from actors.score_store.sanity import RowMeans, Spread
from actors.score_store.shard_index import ShardIndex, checksum, encode_index


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What is known of one finished shard."""

    shard: int
    """Its number."""
    rows: int
    """Examples in it."""
    targets: int
    """Targets in it."""
    row_bytes: int
    """Size of the file of its rows."""
    index_bytes: int
    """Size of its index."""
    index_sha256: str
    """Checksum of its index, which holds those of the rows."""
    mean_tail_mass: float
    """Mass outside target and kept tokens, averaged over the targets."""
    mean_kept: float
    """Tokens kept besides the target, averaged over the targets: K, or fewer with ``top_mass``."""
    target_logprob: Spread
    """Of the rows' mean log-probabilities of the target."""
    entropy: Spread
    """Of the rows' mean entropies."""

    @property
    def bytes(self) -> int:
        """Size of both files."""
        return self.row_bytes + self.index_bytes


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return the named fields of a file; ``remedy`` ends the error if it holds none."""
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; {remedy}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is damaged: it holds {type(fields).__name__} in the place of named fields; {remedy}")
    return fields


class ShardFiles:
    """The files of all shards of one store.

    Args:
        folder: the store's.
        encoding: of its rows.
    """

    def __init__(self, folder: Path, encoding: RowEncoding) -> None:
        self._folder, self._encoding = folder, encoding
        self._infos: dict[int, ShardInfo] = {}
        self._indexes: dict[int, ShardIndex] = {}

    def is_there(self, shard: int) -> bool:
        """Whether a shard is finished."""
        return shard in self._infos or self._info_path(shard).exists()

    def finished(self) -> list[int]:
        """Return the numbers of the shards that are there, ascending; one look at the folder."""
        names = (re.fullmatch(r"shard-(\d{5,})\.json", entry.name) for entry in os.scandir(self._folder))
        return sorted(int(name[1]) for name in names if name)

    def info(self, shard: int) -> ShardInfo:
        """Return the counts and the checksum of a finished shard."""
        if shard not in self._infos:
            path, remedy = self._info_path(shard), "delete that file and run again to have the shard scored anew"
            fields = read_json(path, remedy)
            try:
                fields |= {name: Spread(**fields[name]) for name in ("target_logprob", "entropy")}
                self._infos[shard] = ShardInfo(**fields)
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}; {remedy}") from error
        return self._infos[shard]

    def index(self, shard: int) -> ShardIndex:
        """Return the index of a finished shard.

        Raises:
            ValueError: if it is not what was written.
        """
        if shard not in self._indexes:
            path = self._index_path(shard)
            if not path.exists():
                raise _missing(path)
            buffer = pa.memory_map(str(path)).read_buffer()
            wanted, found = self.info(shard).index_sha256, hashlib.sha256(buffer).hexdigest()
            if wanted != found:
                raise _damaged(path, f"its sha256 is {found[:16]}…, {wanted[:16]}…")
            self._indexes[shard] = ShardIndex(buffer)
        return self._indexes[shard]

    def scores(self, shard: int, row: int) -> TeacherScores:
        """Return the scores of a row of a finished shard.

        Raises:
            ValueError: if its bytes are not those that were written.
        """
        index, path = self.index(shard), self._rows_path(shard)
        content = read_range(path, *index.place(row))
        if (found := checksum(content)) != index.checksum(row):
            raise _damaged(path, f"the checksum of its row {row} is {found:08x}, {index.checksum(row):08x}")
        return self._encoding.decode(content, index.key(row), index.targets(row))

    def write(self, shard: int, scores: Sequence[TeacherScores], means: RowMeans) -> ShardInfo:
        """Write a shard: the scores of its rows, in their order, of which the means are known."""
        rows = [self._encoding.encode(score) for score in scores]
        index = encode_index(scores, rows)
        tails = np.concatenate([score.tail_logmass for score in scores]).astype(np.float64)
        info = ShardInfo(
            shard=shard,
            rows=len(scores),
            targets=len(tails),
            row_bytes=sum(len(row) for row in rows),
            index_bytes=len(index),
            index_sha256=hashlib.sha256(index).hexdigest(),
            mean_tail_mass=float(np.exp(tails).mean()),
            mean_kept=sum(int((score.topk_ids != NO_TOKEN).sum()) for score in scores) / len(tails),
            target_logprob=means.spread("target_logprob"),
            entropy=means.spread("entropy"),
        )
        try:
            write_atomically(self._rows_path(shard), b"".join(rows))
            write_atomically(self._index_path(shard), index)
            write_atomically(self._info_path(shard), json.dumps(asdict(info)).encode())
        except BaseException:
            self.discard(shard)
            raise
        return info

    def require_whole(self, shard: int) -> None:
        """Raise a ``ValueError`` if the index of a finished shard is not what was written, or the size of its rows is another."""
        self.index(shard)
        path = self._rows_path(shard)
        if not path.exists():
            raise _missing(path)
        wanted, found = self.info(shard).row_bytes, path.stat().st_size
        if wanted != found:
            raise _damaged(path, f"it has {found} bytes, {wanted}")

    def discard(self, shard: int) -> None:
        """Remove a shard, so that it is missing again."""
        for path in (self._info_path(shard), self._index_path(shard), self._rows_path(shard)):
            path.unlink(missing_ok=True)
        self._infos.pop(shard, None)
        self._indexes.pop(shard, None)

    def _rows_path(self, shard: int) -> Path:
        return self._folder / f"shard-{shard:05d}.rows"

    def _index_path(self, shard: int) -> Path:
        return self._folder / f"shard-{shard:05d}.arrow"

    def _info_path(self, shard: int) -> Path:
        return self._folder / f"shard-{shard:05d}.json"


def read_range(path: Path, start: int, end: int) -> bytes:
    """Return the bytes of a file from ``start`` up to ``end``."""
    try:
        with open(path, "rb") as file:
            return os.pread(file.fileno(), end - start, start)
    except FileNotFoundError:
        raise _missing(path) from None


def _missing(path: Path) -> ValueError:
    return ValueError(f"{path} is missing, though it was written; {_remedy(path)}")


def _damaged(path: Path, how: str) -> ValueError:
    return ValueError(f"{path} is damaged: {how} was written; {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"delete {path.stem}.json there and run again to have it scored anew"
