"""Which rows a run has: those of one source or of several in the shares that their weights ask for, and those held out."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orchestrator.config.data import DataConfig, SourceConfig
from orchestrator.data.sources import Row, read_rows, source_hash


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


def read_splits(data: DataConfig) -> tuple[list[NumberedRow], list[NumberedRow]]:
    """Return the rows to train on and the held-out rows, which are drawn from the same sources or have one of their own.

    Raises:
        ValueError: naming the file and the line, or the key, if there is nothing to read.
    """
    rows = read_training_rows(data)
    if data.heldout is None:
        return choose_rows(rows, data)
    heldout = numbered(read_rows(data.heldout.source, data.seed, "data.heldout.source"), "data.heldout")
    heldout = _shuffled(heldout, f"{data.seed} heldout")[: data.heldout.max_rows]
    return _shuffled(rows, f"{data.seed} split")[: data.max_rows], heldout


def numbered(rows: Sequence[Row], source: str = "data.source", first: int = 0) -> list[NumberedRow]:
    """Return the rows of a source, in their order."""
    return [NumberedRow(first + index, row, source, first) for index, row in enumerate(rows)]


def read_training_rows(data: DataConfig) -> list[NumberedRow]:
    """Return the rows of all sources, one source after the other, as many of each as its weight and its limit leave.

    Raises:
        ValueError: as ``read_rows`` does, or if the weights leave a source without a row.
    """
    rows_of: dict[str, list[NumberedRow]] = {}
    first = 0
    for key, share in data.training_sources.items():
        rows = read_rows(share.source, data.seed, source_key(key))
        rows_of[key] = _drawn(numbered(rows, key, first), share.max_rows, f"{data.seed} {key} limit")
        first += len(rows)
    weights = {key: share.weight for key, share in data.training_sources.items() if share.weight is not None}
    if weights:
        counts = rows_by_weight({key: len(rows) for key, rows in rows_of.items()}, weights, data.max_rows)
        for key, count in counts.items():
            if count == 0:
                raise ValueError(
                    f"{key}.weight {weights[key]:g} leaves no row of its {len(rows_of[key])}, since the shares allow "
                    f"{sum(counts.values())} rows in all; {key}.weight={max(weights.values()):g} would do"
                )
            rows_of[key] = _drawn(rows_of[key], count, f"{data.seed} {key} share")
    return [row for rows in rows_of.values() for row in rows]


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


def choose_rows(rows: Sequence[NumberedRow], data: DataConfig) -> tuple[list[NumberedRow], list[NumberedRow]]:
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


def _drawn(rows: list[NumberedRow], count: int | None, seed: str) -> list[NumberedRow]:
    """Return so many of the rows, or all that there are, in their order."""
    return rows if count is None or count >= len(rows) else sorted(_shuffled(rows, seed)[:count], key=lambda row: row.number)


def _shuffled(rows: Sequence[NumberedRow], seed: str) -> list[NumberedRow]:
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return shuffled
