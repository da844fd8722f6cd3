"""The score store: what the teacher said, on disk, keyed by content; a log that readers follow while it grows.

A folder holds ``manifest.json`` (the full identity in plain fields, its hash, the plan of shards), and for each finished
shard ``shard-00042.arrow`` and ``shard-00042.json`` (its checksum and counts). A shard exists from the moment its json
does: that file is renamed into place last. N targets, K top-k, V vocabulary.
"""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actors.files import write_atomically
from actors.records import NO_TOKEN, Example, TeacherScores, check_scores, keep_mass, truncate_scores
from actors.score_store.encoding import ShardView, encode_shard
from actors.score_store.identity import Identity, StoreMismatch, identity_difference, identity_hash
from actors.score_store.leases import filesystem_time_ns
from actors.score_store.sanity import RowMeans, ScoreRange, Spread, require_rows_differ

FORMAT = 2  # 1, of version 0.1.0, knew no spreads over rows and no top_mass
LEFTOVER_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What is known of one finished shard."""

    shard: int
    """Its number."""
    rows: int
    """Examples in it."""
    targets: int
    """Targets in it."""
    bytes: int
    """Size of its file."""
    sha256: str
    """Checksum of its file."""
    mean_tail_mass: float
    """Mass outside target and kept tokens, averaged over the targets."""
    mean_kept: float
    """Tokens kept besides the target, averaged over the targets: K, or fewer with ``top_mass``."""
    target_logprob: Spread
    """Of the rows' mean log-probabilities of the target."""
    entropy: Spread
    """Of the rows' mean entropies."""


class ScoringFailed(RuntimeError):
    """The teacher gave up for good; the message is the teacher's own."""


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; {remedy}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is damaged: it holds {type(fields).__name__} in the place of named fields; {remedy}")
    return fields


class ScoreStore:
    """One store, for writing shards and for following them."""

    def __init__(self, path: Path) -> None:
        manifest_path = path / "manifest.json"
        if not manifest_path.is_file():
            raise ValueError(f"no score store at {path}: manifest.json is missing")
        remedy = "delete the folder and score again"
        manifest = _read_json(manifest_path, remedy)
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"the store at {path} has format {manifest.get('format')}, this version reads format {FORMAT}; name another "
                "folder to score again"
            )
        self.path = path
        try:
            self.identity: dict[str, Any] = manifest["identity"]
            self.rows: int = manifest["rows"]
            self.rows_per_shard: int = manifest["rows_per_shard"]
            self.top_k: int = self.identity["top_k"]
            self.top_mass: float | None = self.identity.get("top_mass")
            self.vocab_size: int = self.identity["vocab_size"]
            self.ids_below: int = self.identity.get("ids_below", self.vocab_size)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{manifest_path} is damaged: {type(error).__name__}: {error}; {remedy}") from error
        if manifest.pop("sha256", None) != identity_hash(manifest):
            raise ValueError(f"manifest.json of {path} was changed: its fields do not give its checksum; {remedy}")
        self._shards: dict[int, ShardView] = {}

    @classmethod
    def open_or_create(cls, path: Path, identity: Identity, rows: int, rows_per_shard: int) -> "ScoreStore":
        """Open the store at ``path``, or begin it there.

        Raises:
            StoreMismatch: with one line for each field in which the store's identity differs.
        """
        if not (path / "manifest.json").exists():
            path.mkdir(parents=True, exist_ok=True)
            manifest = {
                "format": FORMAT,
                "identity": dict(identity),
                "rows": rows,
                "rows_per_shard": rows_per_shard,
            }
            with_hash = {**manifest, "sha256": identity_hash(manifest)}
            write_atomically(path / "manifest.json", json.dumps(with_hash, indent=1, sort_keys=True).encode())
        store = cls(path)
        store.require(identity)
        return store

    def require(self, identity: Identity) -> None:
        """Raise if the identity is another; a store with a larger K serves a smaller one."""
        wanted, found = dict(identity), dict(self.identity)
        if wanted["top_k"] <= found["top_k"]:
            wanted.pop("top_k"), found.pop("top_k")
        if lines := identity_difference(wanted, found):
            raise StoreMismatch(
                f"the store at {self.path} holds other scores than these; name another folder, or score again:\n  "
                + "\n  ".join(lines)
            )

    @property
    def shard_count(self) -> int:
        """Shards of the complete store."""
        return math.ceil(self.rows / self.rows_per_shard)

    def positions(self, shard: int) -> range:
        """Positions, in the example file, of the rows of a shard."""
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.rows))

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are still to be scored, ascending."""
        return [shard for shard in range(self.shard_count) if not self._info_path(shard).exists()]

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return not self.missing_shards()

    def shard_info(self, shard: int) -> ShardInfo:
        """Return the counts and the checksum of a finished shard."""
        remedy = "delete that file and run again to have the shard scored anew"
        fields = _read_json(self._info_path(shard), remedy)
        try:
            fields |= {name: Spread(**fields[name]) for name in ("target_logprob", "entropy")}
            return ShardInfo(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self._info_path(shard)} is damaged: {type(error).__name__}: {error}; {remedy}") from error

    def known_range(self) -> ScoreRange | None:
        """Return where the rows of the finished shards lie; None if there is none."""
        infos = (self.shard_info(shard) for shard in range(self.shard_count) if self._info_path(shard).exists())
        return ScoreRange.over((info.target_logprob, info.entropy) for info in infos)

    def write_shard(
        self, shard: int, examples: Sequence[Example], scores: Sequence[TeacherScores], known: ScoreRange | None = None
    ) -> ShardInfo:
        """Check, encode and store the scores of the shard's examples, in their order, in one rename.

        Args:
            shard: its number.
            examples: the rows of the shard.
            scores: their scores with all K tokens; what ``top_mass`` leaves out is dropped here.
            known: where the rows of other shards of this store lie.

        Raises:
            ValueError: naming the row, if a score cannot come from a working teacher (see ``check_scores``), all rows have
                the same scores, or most of them lie outside ``known``.
        """
        assert len(examples) == len(scores) == len(self.positions(shard))
        for example, score in zip(examples, scores, strict=True):
            check_scores(example, score, self.ids_below)
        require_rows_differ(examples, scores)
        means = RowMeans.of(scores)
        if known is not None:
            known.require(examples, means)
        if self.top_mass is not None:
            scores = [keep_mass(score, self.top_mass) for score in scores]
        content = encode_shard(scores, self.vocab_size, ragged=self.top_mass is not None)
        tails = np.concatenate([score.tail_logmass for score in scores]).astype(np.float64)
        info = ShardInfo(
            shard=shard,
            rows=len(scores),
            targets=len(tails),
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            mean_tail_mass=float(np.exp(tails).mean()),
            mean_kept=sum(int((score.topk_ids != NO_TOKEN).sum()) for score in scores) / len(tails),
            target_logprob=means.spread("target_logprob"),
            entropy=means.spread("entropy"),
        )
        write_atomically(self._shard_path(shard), content)
        write_atomically(self._info_path(shard), json.dumps(asdict(info)).encode())
        return info

    def scores_at(self, position: int, top_k: int | None = None) -> TeacherScores:
        """Return the scores of the example at ``position``, with the store's K or a smaller one.

        Raises:
            ValueError: if the shard's bytes are not those that were written, or ``top_k`` exceeds the store's K.
        """
        shard, row = divmod(position, self.rows_per_shard)
        scores = self._view(shard)[row]
        return scores if top_k is None or top_k == self.top_k else truncate_scores(scores, top_k)

    def uncertainty_at(self, position: int) -> np.ndarray:
        """Return UNC of each target of the example at ``position``, float32 [N], without reading the top-K."""
        shard, row = divmod(position, self.rows_per_shard)
        return self._view(shard).uncertainty(row)

    def teacher_loss_at(self, position: int) -> float:
        """Return the teacher's own mean loss on the targets of the example at ``position``, in nats."""
        shard, row = divmod(position, self.rows_per_shard)
        return -float(self._view(shard).target_logprob(row).mean(dtype=np.float64))

    def wait_for(self, shard: int, timeout_seconds: float, poll_seconds: float = 0.2) -> float:
        """Wait until a shard is there; return the seconds waited.

        Raises:
            ScoringFailed: with the teacher's own error, if scoring was given up.
            TimeoutError: if the shard did not come in time.
        """
        if shard in self._shards:
            return 0.0
        start = time.monotonic()
        while not self._info_path(shard).exists():
            if self._failure_path.exists():
                raise ScoringFailed(self._failure_path.read_text())
            if time.monotonic() - start > timeout_seconds:
                raise TimeoutError(
                    f"shard {shard} of {self.path} did not come within {timeout_seconds:.0f} s; "
                    "raise scores.wait_seconds if the teacher is slow, or look for its error in the event log"
                )
            time.sleep(poll_seconds)
        return time.monotonic() - start

    def declare_failed(self, error: str) -> None:
        """Tell all readers that no further shard will come, and why."""
        write_atomically(self._failure_path, error.encode())

    def clear_failure(self) -> None:
        """Begin again after a failure."""
        self._failure_path.unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Remove what processes left that were killed while they wrote; files of the last hour may still be written."""
        now_ns = filesystem_time_ns(self.path)
        for path in self.path.glob("*.tmp"):
            with suppress(FileNotFoundError):  # another job may be as tidy
                if now_ns - path.stat().st_mtime_ns > LEFTOVER_SECONDS * 1e9:
                    path.unlink()

    def verify(self) -> None:
        """Read every finished shard and compare its checksum; raises ValueError naming the first that differs."""
        for shard in range(self.shard_count):
            if self._info_path(shard).exists():
                self._verified_bytes(shard)

    def discard_shard(self, shard: int) -> None:
        """Forget a shard, so that it is scored again."""
        self._info_path(shard).unlink(missing_ok=True)
        self._shard_path(shard).unlink(missing_ok=True)
        self._shards.pop(shard, None)

    def _view(self, shard: int) -> ShardView:
        if shard not in self._shards:
            self._shards[shard] = ShardView(self._verified_bytes(shard), self.top_k)
        return self._shards[shard]

    def _verified_bytes(self, shard: int) -> pa.Buffer:
        if not self._shard_path(shard).exists():
            raise ValueError(
                f"{self._shard_path(shard)} is missing, though it was written; "
                f"delete shard-{shard:05d}.json there and run again to have it scored anew"
            )
        buffer = pa.memory_map(str(self._shard_path(shard))).read_buffer()
        wanted, found = self.shard_info(shard).sha256, hashlib.sha256(buffer).hexdigest()
        if wanted != found:
            raise ValueError(
                f"{self._shard_path(shard)} is damaged: its sha256 is {found[:16]}…, {wanted[:16]}… was written; "
                f"delete shard-{shard:05d}.json there and run again to have it scored anew"
            )
        return buffer

    def _shard_path(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05d}.arrow"

    def _info_path(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05d}.json"

    @property
    def _failure_path(self) -> Path:
        return self.path / "failed.txt"
