"""The score store: what the teacher said, wherever it is kept, keyed by content; a log that readers follow while it grows.

A folder (``actors/storage``) holds ``manifest.json`` (the full identity in plain fields, its hash, the plan of shards), and for
each finished shard its three files (``shard_files``). N targets, K top-k, V vocabulary.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.records import Example, TeacherScores, check_scores, keep_mass, truncate_scores
from actors.score_store.encoding import RowEncoding
from actors.score_store.identity import Identity, StoreMismatch, identity_difference, identity_hash
from actors.score_store.sanity import RowMeans, ScoreRange, require_rows_differ
from actors.score_store.shard_files import ShardFiles, ShardInfo, parse_json
from actors.storage.folder import open_folder

FORMAT = 3  # 2 had no indexes, 1 knew no spreads over rows and no top_mass
MANIFEST, FAILURE = "manifest.json", "failed.txt"
LEFTOVER_SECONDS = 3600.0
MOST_SHARDS = 10_000
"""A folder is listed, and each shard mapped, by all who read it."""


class ScoringFailed(RuntimeError):
    """The teacher gave up for good; the message is the teacher's own."""


def is_store(place: str | Path) -> bool:
    """Return whether there is a store at a path or an address."""
    return open_folder(place).size(MANIFEST) is not None


class ScoreStore:
    """One store, for writing shards and for following them.

    Args:
        place: the path of its folder, or its address in object storage.
    """

    def __init__(self, place: str | Path) -> None:
        self.folder, self.place = open_folder(place), str(place)
        try:
            content = self.folder.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"no score store at {place}: manifest.json is missing") from None
        manifest_place, remedy = self.folder.place_of(MANIFEST), "delete the folder and score again"
        manifest = parse_json(content, manifest_place, remedy)
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"the store at {place} has format {manifest.get('format')}, this version reads format {FORMAT}; name another "
                "folder to score again"
            )
        try:
            self.identity: dict[str, Any] = manifest["identity"]
            self.rows: int = manifest["rows"]
            self.rows_per_shard: int = manifest["rows_per_shard"]
            self.top_k: int = self.identity["top_k"]
            self.top_mass: float | None = self.identity.get("top_mass")
            self.wire: str = self.identity.get("wire", "top_k")
            self.vocab_size: int = self.identity["vocab_size"]
            self.exact: bool = self.identity.get("exact", False)
            self.ids_below: int = self.identity.get("ids_below", self.vocab_size)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{manifest_place} is damaged: {type(error).__name__}: {error}; {remedy}") from error
        if manifest.pop("sha256", None) != identity_hash(manifest):
            raise ValueError(f"manifest.json of {place} was changed: its fields do not give its checksum; {remedy}")
        self._files = ShardFiles(self.folder, self._encoding())

    @classmethod
    def open_or_create(
        cls, place: str | Path, identity: Identity, rows: int, rows_per_shard: int, most_shards: int = MOST_SHARDS
    ) -> "ScoreStore":
        """Open the store at a path or an address, or begin it there.

        Raises:
            StoreMismatch: with one line for each field in which the store's identity differs.
            ValueError: if it would begin with more shards than a folder should hold.
        """
        folder = open_folder(place)
        if folder.size(MANIFEST) is None:
            if (shards := math.ceil(rows / rows_per_shard)) > most_shards:
                raise ValueError(
                    f"scores.rows_per_shard is {rows_per_shard}, which makes {shards} shards of {rows} rows, more than "
                    f"{most_shards}; scores.rows_per_shard={math.ceil(rows / most_shards)} would do"
                )
            folder.begin()
            manifest = {
                "format": FORMAT,
                "identity": dict(identity),
                "rows": rows,
                "rows_per_shard": rows_per_shard,
            }
            with_hash = {**manifest, "sha256": identity_hash(manifest)}
            folder.write(MANIFEST, json.dumps(with_hash, indent=1, sort_keys=True).encode())
        store = cls(place)
        store.require(identity)
        return store

    def require(self, identity: Identity) -> None:
        """Raise if the identity is another; a store with a larger K serves a smaller one."""
        wanted, found = dict(identity), dict(self.identity)
        if wanted["top_k"] <= found["top_k"]:
            wanted.pop("top_k"), found.pop("top_k")
        if lines := identity_difference(wanted, found):
            raise StoreMismatch(
                f"the store at {self.place} holds other scores than these; name another folder, or score again:\n  "
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
        return sorted(set(range(self.shard_count)) - set(self._files.finished()))

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return not self.missing_shards()

    def is_there(self, shard: int) -> bool:
        """Whether a shard is finished."""
        return self._files.is_there(shard)

    def shard_info(self, shard: int) -> ShardInfo:
        """Return the counts and the checksum of a finished shard."""
        return self._files.info(shard)

    def shard_infos(self) -> list[ShardInfo]:
        """Return the counts and the checksums of the finished shards, in their order."""
        return self._files.infos(self._files.finished())

    def known_range(self) -> ScoreRange | None:
        """Return where the rows of the finished shards lie; None if there is none."""
        return ScoreRange.over((info.target_logprob, info.entropy) for info in self.shard_infos())

    def write_shard(
        self, shard: int, examples: Sequence[Example], scores: Sequence[TeacherScores], known: ScoreRange | None = None
    ) -> ShardInfo:
        """Check, encode and store the scores of the shard's examples, in their order, in one rename.

        A shard of a log that grows step by step may have fewer rows than others.

        Args:
            shard: its number.
            examples: the rows of the shard.
            scores: their scores with all K tokens, and the candidates if the store keeps some; what ``top_mass`` leaves out is
                dropped here.
            known: where the rows of other shards of this store lie.

        Raises:
            ValueError: naming the row, if a score cannot come from a working teacher (see ``check_scores``), all rows have
                the same scores, or most of them lie outside ``known``.
        """
        assert len(examples) == len(scores) <= len(self.positions(shard))
        for example, score in zip(examples, scores, strict=True):
            check_scores(example, score, self.ids_below)
        require_rows_differ(examples, [truncate_scores(score, self.top_k) for score in scores])  # candidates do in any case
        means = RowMeans.of(scores)
        if known is not None:
            known.require(examples, means)
        if self.top_mass is not None:
            scores = [keep_mass(score, self.top_mass) for score in scores]
        return self._files.write(shard, scores, means)

    def scores_at(self, position: int, top_k: int | None = None) -> TeacherScores:
        """Return the scores of the example at ``position``, with the store's K or a smaller one; those with candidates whole.

        Raises:
            ValueError: if the row's bytes are not those that were written, or ``top_k`` exceeds the store's K.
        """
        scores = self._files.scores(*divmod(position, self.rows_per_shard))
        if top_k is None or top_k == self.top_k or self.wire == "candidates":
            return scores
        return truncate_scores(scores, top_k)

    def uncertainty_at(self, position: int) -> np.ndarray:
        """Return UNC of each target of the example at ``position``, float32 [N], from the index alone."""
        shard, row = divmod(position, self.rows_per_shard)
        return self._files.index(shard).uncertainty(row)

    def uncertainties(self, shard: int) -> np.ndarray:
        """Return UNC of all targets of a shard, row after row, float32, from the index alone; a view."""
        return self._files.index(shard).uncertainties

    def first_target_at(self, position: int) -> tuple[int, int]:
        """Return the shard of the example at ``position``, and the place of its first target among those of the shard."""
        shard, row = divmod(position, self.rows_per_shard)
        return shard, self._files.index(shard).first_target(row)

    def teacher_loss_at(self, position: int) -> float:
        """Return the teacher's own mean loss on the targets of the example at ``position``, in nats, from the index alone."""
        shard, row = divmod(position, self.rows_per_shard)
        return self._files.index(shard).teacher_loss(row)

    def wait_for(self, shard: int, timeout_seconds: float, poll_seconds: float | None = None) -> float:
        """Wait until a shard is there; return the seconds waited.

        Raises:
            ScoringFailed: with the teacher's own error, if scoring was given up.
            TimeoutError: if the shard did not come in time.
        """
        start = time.monotonic()
        while not self._files.is_there(shard):
            if self.folder.size(FAILURE) is not None:
                raise ScoringFailed(self.folder.read(FAILURE).decode())
            if time.monotonic() - start > timeout_seconds:
                raise TimeoutError(
                    f"shard {shard} of {self.place} did not come within {timeout_seconds:.0f} s; "
                    "raise scores.wait_seconds if the teacher is slow, or look for its error in the event log"
                )
            time.sleep(self.folder.poll_seconds if poll_seconds is None else poll_seconds)
        return time.monotonic() - start

    def wait_until_complete(self, timeout_seconds: float) -> float:
        """Wait until every shard is there; return the seconds waited. Each may take as long, and fails, as ``wait_for`` says."""
        return sum(self.wait_for(shard, timeout_seconds) for shard in self.missing_shards())

    def declare_failed(self, error: str) -> None:
        """Tell all readers that no further shard will come, and why."""
        self.folder.write(FAILURE, error.encode())

    def clear_failure(self) -> None:
        """Begin again after a failure."""
        self.folder.remove(FAILURE)

    def remove_leftovers(self) -> None:
        """Remove what processes left that were killed while they wrote; files of the last hour may still be written."""
        self.folder.remove_leftovers(LEFTOVER_SECONDS)

    def verify(self, most_bytes: float = math.inf) -> None:
        """Compare the finished shards with what was written: all files' sizes, all indexes, and the rows of as many shards,
        spread over the store, as make about ``most_bytes``.

        Raises:
            ValueError: naming the first file that differs.
        """
        finished = self._files.finished()
        self._files.require_whole(finished)
        total = sum(info.row_bytes for info in self._files.infos(finished))
        for shard in finished[:: max(1, math.ceil(total / most_bytes))]:
            for row in range(self.shard_info(shard).rows):
                self._files.scores(shard, row)

    def discard_shard(self, shard: int) -> None:
        """Forget a shard, so that it is scored again."""
        self._files.discard(shard)

    def _encoding(self) -> RowEncoding:
        unions = self.wire == "candidates"  # of K tokens and as many candidates, some of which are the same
        width, ragged = (2 * self.top_k, True) if unions else (self.top_k, self.top_mass is not None)
        return RowEncoding(width, self.vocab_size, ragged, self.identity.get("hidden_size", 0), self.exact)
