"""What the page of a search is put together from: an answer, and parts of tables and charts."""

from dataclasses import dataclass

from orchestrator.reporting import Chart


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    heading: str
    number: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """A table with notes below it."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """A section of the page: a table, charts, or both."""

    heading: str
    table: Grid | None = None
    charts: tuple[Chart, ...] = ()
    classes: str = "plain"


@dataclass(frozen=True, slots=True)
class Answer:
    """What stands first: the result in plain words."""

    heading: str
    sentences: tuple[str, ...]
    notes: tuple[str, ...] = ()
    overrides: str = ""
    """Overrides of the best trial, as the command line takes them."""
