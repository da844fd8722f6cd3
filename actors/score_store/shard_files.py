"""The files of a store's shards. N targets, K top-k.

``shard-00042.rows`` holds the scores, row after row; ``shard-00042.arrow``, the index, says where each row stands, what its
checksum is, and what ranks its targets; ``shard-00042.json`` has the index's checksum, and counts. A shard exists from the moment
its json does: that file is renamed into place last. Each row is compared with its checksum whenever it is read.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from actors.records import NO_TOKEN, TeacherScores
from actors.score_store.encoding import RowEncoding
from actors.score_store.sanity import RowMeans, Spread
from actors.score_store.shard_index import ShardIndex, checksum, encode_index
from actors.storage.folder import Folder


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


def parse_json(content: bytes, place: str, remedy: str) -> dict[str, Any]:
    """Return the named fields that the file at ``place`` holds; ``remedy`` ends the error if it holds none."""
    try:
        fields = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{place} is damaged: {error}; {remedy}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{place} is damaged: it holds {type(fields).__name__} in the place of named fields; {remedy}")
    return fields


class ShardFiles:
    """The files of all shards of one store.

    Args:
        folder: the store's.
        encoding: of its rows.
    """

    def __init__(self, folder: Folder, encoding: RowEncoding) -> None:
        self._folder, self._encoding = folder, encoding
        self._infos: dict[int, ShardInfo] = {}
        self._indexes: dict[int, ShardIndex] = {}

    def is_there(self, shard: int) -> bool:
        """Whether a shard is finished."""
        return shard in self._infos or self._folder.size(_info_name(shard)) is not None

    def finished(self) -> list[int]:
        """Return the numbers of the shards that are there, ascending; one look at the folder."""
        names = (re.fullmatch(r"shard-(\d{5,})\.json", name) for name in self._folder.names())
        return sorted(int(name[1]) for name in names if name)

    def info(self, shard: int) -> ShardInfo:
        """Return the counts and the checksum of a finished shard."""
        return self.infos([shard])[0]

    def infos(self, shards: Sequence[int]) -> list[ShardInfo]:
        """Return the counts and the checksums of some finished shards."""
        unknown = [shard for shard in shards if shard not in self._infos]
        for shard, content in zip(unknown, self._folder.read_all([_info_name(shard) for shard in unknown]), strict=True):
            self._infos[shard] = self._parse_info(shard, content)
        return [self._infos[shard] for shard in shards]

    def _parse_info(self, shard: int, content: bytes) -> ShardInfo:
        place, remedy = self._folder.place_of(_info_name(shard)), "delete that file and run again to have the shard scored anew"
        fields = parse_json(content, place, remedy)
        try:
            fields |= {name: Spread(**fields[name]) for name in ("target_logprob", "entropy")}
            return ShardInfo(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{place} is damaged: {type(error).__name__}: {error}; {remedy}") from error

    def index(self, shard: int) -> ShardIndex:
        """Return the index of a finished shard.

        Raises:
            ValueError: if it is not what was written.
        """
        if shard not in self._indexes:
            name = _index_name(shard)
            buffer, wanted, found = self._index_file(shard)
            if wanted != found and self._renew(shard):
                buffer, wanted, found = self._index_file(shard)
            if wanted != found:
                raise self._damaged(name, f"its sha256 is {found[:16]}…, {wanted[:16]}…")
            self._indexes[shard] = ShardIndex(buffer)
        return self._indexes[shard]

    def _index_file(self, shard: int) -> tuple[pa.Buffer, str, str]:
        """Return the index of a shard, the checksum that it should have, and its own."""
        name = _index_name(shard)
        try:
            buffer = self._folder.mapped(name)
        except FileNotFoundError:
            raise self._missing(name) from None
        return buffer, self.info(shard).index_sha256, hashlib.sha256(buffer).hexdigest()

    def scores(self, shard: int, row: int) -> TeacherScores:
        """Return the scores of a row of a finished shard.

        Raises:
            ValueError: if its bytes are not those that were written.
        """
        index, content = self._row_bytes(shard, row)
        if checksum(content) != index.checksum(row) and self._renew(shard):
            index, content = self._row_bytes(shard, row)
        if (found := checksum(content)) != index.checksum(row):
            raise self._damaged(_rows_name(shard), f"the checksum of its row {row} is {found:08x}, {index.checksum(row):08x}")
        return self._encoding.decode(content, index.key(row), index.targets(row))

    def _row_bytes(self, shard: int, row: int) -> tuple[ShardIndex, bytes]:
        index, name = self.index(shard), _rows_name(shard)
        try:
            return index, self._folder.read_range(name, *index.place(row))
        except FileNotFoundError:
            raise self._missing(name) from None

    def _renew(self, shard: int) -> bool:
        """Drop what this node has kept of a shard, which may be damaged, or of an earlier scoring; False if it keeps none."""
        if not self._folder.forget([_index_name(shard), _rows_name(shard)]):
            return False
        self._infos.pop(shard, None)
        self._indexes.pop(shard, None)
        return True

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
            self._folder.write(_rows_name(shard), b"".join(rows))
            self._folder.write(_index_name(shard), index)
            self._folder.write(_info_name(shard), json.dumps(asdict(info)).encode())
        except BaseException:
            self.discard(shard)
            raise
        return info

    def require_whole(self, shards: Sequence[int]) -> None:
        """Raise a ``ValueError`` if the index of a finished shard is not what was written, or the size of its rows is another."""
        self.infos(shards)
        self._folder.fetch([_index_name(shard) for shard in shards])
        sizes = self._folder.sizes()
        for shard in shards:
            self.index(shard)
            name = _rows_name(shard)
            found = sizes[name] if name in sizes else self._folder.size(name)
            if found is None:
                raise self._missing(name)
            if (wanted := self.info(shard).row_bytes) != found:
                raise self._damaged(name, f"it has {found} bytes, {wanted}")

    def discard(self, shard: int) -> None:
        """Remove a shard, so that it is missing again."""
        for name in (_info_name(shard), _index_name(shard), _rows_name(shard)):
            self._folder.remove(name)
        self._infos.pop(shard, None)
        self._indexes.pop(shard, None)

    def _missing(self, name: str) -> ValueError:
        return ValueError(f"{self._folder.place_of(name)} is missing, though it was written; {_remedy(name)}")

    def _damaged(self, name: str, how: str) -> ValueError:
        return ValueError(f"{self._folder.place_of(name)} is damaged: {how} was written; {_remedy(name)}")


def _rows_name(shard: int) -> str:
    return f"shard-{shard:05d}.rows"


def _index_name(shard: int) -> str:
    return f"shard-{shard:05d}.arrow"


def _info_name(shard: int) -> str:
    return f"shard-{shard:05d}.json"


def _remedy(name: str) -> str:
    return f"delete {name.rpartition('.')[0]}.json there and run again to have it scored anew"
