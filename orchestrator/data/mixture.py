"""Which rows a run has: those of one source or of several in the shares that their weights ask for, and those held out.

Rows are read once, into a temporary file; what is drawn and shuffled are their numbers.
"""

import math
import pickle
import random
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import Any, NamedTuple, cast, overload

from orchestrator.config.data import DataConfig, SourceConfig
from orchestrator.data.sources import Row, rows_of, source_hash

IN_MEMORY = 8 << 20
"""Bytes of rows that are kept in memory before they go to disk."""


class NumberedRow(NamedTuple):
    """A row and where it comes from."""

    number: int
    """Its index, counted through all sources of its split in their order."""

    fields: Mapping[str, Any]
    """Its values by name."""

    source: str = "data.source"
    """Key of its source; ``data.formats`` has its format."""

    first: int = 0
    """The number of its source's first row."""

    @property
    def place(self) -> str:
        """Where it stands, for errors."""
        index = f"row {self.number - self.first}"
        return index if self.source == "data.source" else f"{index} of {self.source}"


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Some rows as bytes, which are quick to send to another process."""

    rows: tuple[tuple[int, bytes, str, int], ...]
    """Number, fields as ``pickle`` writes them, key of the source and number of its first row, of each."""

    def unpacked(self) -> list[NumberedRow]:
        """Return the rows."""
        return [NumberedRow(number, pickle.loads(fields), source, first) for number, fields, source, first in self.rows]


class RowSpool:
    """The rows of all sources of a split, by number; on disk where they are many."""

    def __init__(self) -> None:
        self._file = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 (it lives as long as its rows)
        self._ends = array("q")
        self._firsts: list[int] = []
        self._sources: list[str] = []

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, source: str, rows: Iterable[Row]) -> "SpooledRows":
        """Write the rows of a source behind those of the others; return them."""
        first, end = len(self), self._ends[-1] if self._ends else 0
        self._file.seek(end)
        for row in rows:
            end += self._file.write(pickle.dumps(row, pickle.HIGHEST_PROTOCOL))
            self._ends.append(end)
        self._firsts.append(first)
        self._sources.append(source)
        return SpooledRows(self, array("q", range(first, len(self))))

    def packed(self, numbers: Iterable[int]) -> PackedRows:
        """Return some rows as they were written."""
        return PackedRows(tuple(map(self._packed_row, numbers)))

    def _packed_row(self, number: int) -> tuple[int, bytes, str, int]:
        start = self._ends[number - 1] if number else 0
        self._file.seek(start)
        place = bisect_right(self._firsts, number) - 1
        return number, self._file.read(self._ends[number] - start), self._sources[place], self._firsts[place]

    def source(self, number: int) -> str:
        """Return the source of a row."""
        return self._sources[bisect_right(self._firsts, number) - 1]


class SpooledRows(Sequence[NumberedRow]):
    """Some rows of a spool, in an order of their own; each is read when it is asked for."""

    def __init__(self, spool: RowSpool, numbers: "array[int]") -> None:
        self._spool, self._numbers = spool, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> NumberedRow: ...
    @overload
    def __getitem__(self, place: slice) -> "SpooledRows": ...
    def __getitem__(self, place: int | slice) -> "NumberedRow | SpooledRows":
        if isinstance(place, slice):
            return SpooledRows(self._spool, self._numbers[place])
        return self._spool.packed([self._numbers[place]]).unpacked()[0]

    def packed(self, rows_at_once: int) -> Iterator[PackedRows]:
        """Yield all rows, in their order, so many at a time."""
        for start in range(0, len(self), rows_at_once):
            yield self._spool.packed(self._numbers[start : start + rows_at_once])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __add__(self, other: "SpooledRows") -> "SpooledRows":
        """Return these rows and, behind them, others of the same spool."""
        return SpooledRows(self._spool, self._numbers + other._numbers)

    def at(self, places: Iterable[int]) -> "SpooledRows":
        """Return the rows at some places."""
        return SpooledRows(self._spool, array("q", (self._numbers[place] for place in places)))

    def by_source(self) -> Counter[str]:
        """Return how many rows each source has."""
        return Counter(self._spool.source(number) for number in self._numbers)


def read_splits(data: DataConfig) -> tuple[SpooledRows, SpooledRows]:
    """Return the rows to train on and the held-out rows, which are drawn from the same sources or have one of their own.

    Raises:
        ValueError: naming the file and the line, or the key, if there is nothing to read.
    """
    rows = read_training_rows(data)
    if data.heldout is None:
        return choose_rows(rows, data)
    heldout = RowSpool().add("data.heldout", rows_of(data.heldout.source, data.seed, "data.heldout.source"))
    heldout = _shuffled(heldout, f"{data.seed} heldout")[: data.heldout.max_rows]
    return _shuffled(rows, f"{data.seed} split")[: data.max_rows], heldout


def numbered(rows: Iterable[Row], source: str = "data.source") -> SpooledRows:
    """Return the rows of a source, in their order."""
    return RowSpool().add(source, rows)


def read_training_rows(data: DataConfig) -> SpooledRows:
    """Return the rows of all sources, one source after the other, as many of each as its weight and its limit leave.

    Raises:
        ValueError: as ``rows_of`` does, or if the weights leave a source without a row.
    """
    spool, by_source = RowSpool(), dict[str, SpooledRows]()
    for key, share in data.training_sources.items():
        rows = spool.add(key, rows_of(share.source, data.seed, source_key(key)))
        by_source[key] = _drawn(rows, share.max_rows, f"{data.seed} {key} limit")
    weights = {key: share.weight for key, share in data.training_sources.items() if share.weight is not None}
    if weights:
        counts = rows_by_weight({key: len(rows) for key, rows in by_source.items()}, weights, data.max_rows)
        for key, count in counts.items():
            if count == 0:
                raise ValueError(
                    f"{key}.weight {weights[key]:g} leaves no row of its {len(by_source[key])}, since the shares allow "
                    f"{sum(counts.values())} rows in all; {key}.weight={max(weights.values()):g} would do"
                )
            by_source[key] = _drawn(by_source[key], count, f"{data.seed} {key} share")
    every = SpooledRows(spool, array("q"))
    for rows in by_source.values():
        every += rows
    return every


def source_key(key: str) -> str:
    """Return under which key the source itself stands."""
    return key if key == "data.source" else f"{key}.source"


def sources_of(data: DataConfig) -> dict[str, SourceConfig]:
    """Return where rows come from, by the keys that say so."""
    sources = {source_key(key): share.source for key, share in data.training_sources.items()}
    return sources if data.heldout is None else sources | {"data.heldout.source": data.heldout.source}


def source_hashes(data: DataConfig) -> dict[str, str | None]:
    """Return the hashes of the files that rows come from, by the keys that name them; None for other sources."""
    return {key: source_hash(source) for key, source in sources_of(data).items()}


def rows_by_weight(available: Mapping[str, int], weights: Mapping[str, float], most: int | None) -> dict[str, int]:
    """Return how many rows to take of each source: in the weights' proportions, none twice, and together at most ``most``.

    Proportions are met to less than a row.
    """
    total = sum(weights.values())
    rows = min(available[key] * total / weight for key, weight in weights.items())
    if most is not None:
        rows = min(rows, most)
    return {key: min(available[key], math.floor(rows * weight / total + 1e-9)) for key, weight in weights.items()}


def choose_rows(rows: SpooledRows, data: DataConfig) -> tuple[SpooledRows, SpooledRows]:
    """Draw the rows to train on and those to hold out; shuffle the former.

    One shuffle by ``data.seed`` decides all: held-out rows first, then training rows, up to ``max_rows``. So a smaller
    ``max_rows`` keeps the same held-out rows.

    Raises:
        ValueError: if holding out ``heldout_rows`` leaves nothing to train on.
    """
    assert data.heldout_rows is not None, "data.heldout names a source of its own"
    order = _shuffled(rows, f"{data.seed} split")[: data.max_rows]
    if data.heldout_rows >= len(order):
        raise ValueError(
            f"data.heldout_rows {data.heldout_rows} leaves none of {len(order)} rows to train on; "
            + (f"data.heldout_rows={max(1, len(order) // 10)} would do" if len(order) > 1 else "at least two rows are needed")
        )
    return order[data.heldout_rows :], order[: data.heldout_rows]


def _drawn(rows: SpooledRows, count: int | None, seed: str) -> SpooledRows:
    """Return so many of the rows, or all that there are, in their order."""
    return rows if count is None or count >= len(rows) else rows.at(sorted(_order(len(rows), seed)[:count]))


def _shuffled(rows: SpooledRows, seed: str) -> SpooledRows:
    return rows.at(_order(len(rows), seed))


def _order(count: int, seed: str) -> "array[int]":
    places = array("q", range(count))
    random.Random(seed).shuffle(cast("list[int]", places))  # 8 bytes a row, where a list has 36
    return places
