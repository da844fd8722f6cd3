"""What pages are put together from: charts, tables, and for a search an answer; and how they are written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from actors.files import write_atomically
from orchestrator.cluster.redaction import without_private_values


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture with its heading and a sentence below it."""

    heading: str
    svg: Markup
    note: str = ""


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
class PageSection:
    """A section of the page: a table, charts, or both."""

    heading: str
    table: Grid | None = None
    charts: tuple[Chart, ...] = ()
    classes: str = "plain"


@dataclass(frozen=True, slots=True)
class Headline:
    """What stands first: the result in plain words."""

    heading: str
    sentences: tuple[str, ...]
    notes: tuple[str, ...] = ()
    overrides: str = ""
    """Overrides of the best trial, as the command line takes them."""


def write_page(path: Path, template: str, content: Mapping[str, Any]) -> None:
    """Write a page from a template of the folder ``pages``; every text in it is escaped, and no secret of this process stays."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "pages"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template(template).render(content)
    write_atomically(path, without_private_values(page).encode())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file, one a line, none if there is no file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]
