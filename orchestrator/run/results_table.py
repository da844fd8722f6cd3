"""The table at the end of a run: teacher, student before and student after, metric by metric and task by task."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from actors.files import write_atomically

MODEL_NAMES = ("teacher", "student_before", "student_after")
"""The models, as their files are called."""

COLUMNS = ("teacher", "student before", "student after")
"""The models, as people call them, in the same order."""

Show = Literal["nats", "share", "score", "count", "milliseconds"]
"""How values are written: 1.2345, 56.7 %, 0.567, 1,234,567 or 1.23 ms."""

METRICS: tuple[tuple[str, str, Show], ...] = (
    ("heldout_loss", "held-out loss (nats per target)", "nats"),
    ("kl_to_teacher", "KL to teacher (nats per target)", "nats"),
    ("top1_agreement", "top-1 agreement with teacher", "share"),
    ("calibration_error", "calibration error (ECE)", "share"),
    ("exact_match", "exact match of answers", "share"),
    ("rouge_l", "Rouge-L of answers", "score"),
    ("parameters", "parameters", "count"),
)
"""Name among the metrics, label in the table, and how values are written; the table has a row for each, in this order."""

CLASS_METRICS: tuple[tuple[str, str, Show], ...] = (
    ("accuracy", "accuracy", "share"),
    ("macro_f1", "macro F1", "score"),
    ("weighted_kappa", "quadratic weighted kappa", "score"),
    ("heldout_loss", "log loss (nats)", "nats"),
    ("kl_to_teacher", "KL to teacher (nats)", "nats"),
    ("top1_agreement", "agreement with teacher", "share"),
    ("calibration_error", "calibration error (ECE)", "share"),
    ("parameters", "parameters", "count"),
    ("bytes", "bytes on disk", "count"),
    ("milliseconds_a_row", "time of one row", "milliseconds"),
    ("rows_per_second", "rows a second", "count"),
)
"""The same of classifiers; a row of which no model has a value is left out."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One metric of the three models."""

    metric: str
    """Name among the metrics, or of the task."""

    label: str
    """What it is, with its unit."""

    show: Show
    """How values are written."""

    values: tuple[float | None, ...]
    """One a column; None where it was not measured."""

    @property
    def cells(self) -> tuple[str, ...]:
        """The values as they are written."""
        return tuple(written(value, self.show) for value in self.values)


@dataclass(frozen=True, slots=True)
class ComparisonTable:
    """All that the three models are compared by."""

    rows: tuple[TableRow, ...]
    """One a metric."""

    tasks: tuple[TableRow, ...]
    """Exact match by kind of task; empty where the data names none, nothing was generated or Rouge-L is asked for."""

    judge: tuple[TableRow, ...] = ()
    """What a judge says of the answers; empty where none was asked."""

    groups: tuple[TableRow, ...] = ()
    """Accuracy of classifiers by group; empty where rows have none."""

    benchmarks: tuple[TableRow, ...] = ()
    """Figures of benchmarks; empty where none were measured."""

    tasks_by_rouge_l: tuple[TableRow, ...] = ()
    """Rouge-L by kind of task; empty unless it is asked for instead of exact match."""


def written(value: float | None, show: Show) -> str:
    """Return a value as it stands in tables."""
    if value is None:
        return "–"
    return {"nats": f"{value:.4f}", "share": f"{100 * value:.1f} %", "score": f"{value:.3f}", "count": f"{value:,.0f}",
            "milliseconds": f"{value:.2f} ms"}[show]  # fmt: skip


def metric_rows(metrics: Sequence[Mapping[str, float | None]]) -> tuple[TableRow, ...]:
    """Return a row for each metric from the fields of the models' ``Metrics``, teacher first."""
    if any(one.get("accuracy") is not None for one in metrics):
        rows = [TableRow(name, label, show, tuple(one[name] for one in metrics)) for name, label, show in CLASS_METRICS]
        return tuple(row for row in rows if any(value is not None for value in row.values))
    return tuple(TableRow(name, label, show, tuple(one[name] for one in metrics)) for name, label, show in METRICS)


def write_table(folder: Path, table: ComparisonTable) -> None:
    """Write ``table.json`` and ``table.md``."""
    content = {"columns": COLUMNS, **asdict(table)}
    write_atomically(folder / "table.md", markdown(table).encode())
    write_atomically(folder / "table.json", json.dumps(content, indent=1, ensure_ascii=False).encode())


def read_table(folder: Path) -> ComparisonTable:
    """Return the table that ``write_table`` left in a folder."""
    content = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    parts = (_rows(content.get(name, ())) for name in ("rows", "tasks", "judge", "groups", "benchmarks", "tasks_by_rouge_l"))
    return ComparisonTable(*parts)


def markdown(table: ComparisonTable) -> str:
    """Return the table, and those of tasks, judge and benchmarks if there are any, as Markdown."""
    return "\n".join(_markdown_of(heading, rows) for heading, rows in _parts(table))


def print_table(table: ComparisonTable, console: Console | None = None) -> None:
    """Print the table for people: with rules and colours on a terminal, plain where the output goes elsewhere."""
    console = console or Console()
    console = console if console.is_terminal else Console(file=console.file, width=120)
    for heading, rows in _parts(table):
        shown = Table(box=SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
        shown.add_column(heading)
        for column in COLUMNS:
            shown.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            shown.add_row(row.label, *row.cells)
        console.print(shown)


def _parts(table: ComparisonTable) -> list[tuple[str, tuple[TableRow, ...]]]:
    further = [
        ("exact match by task", table.tasks), ("Rouge-L by task", table.tasks_by_rouge_l),
        ("accuracy by group", table.groups), ("judge", table.judge), ("benchmark", table.benchmarks),
    ]  # fmt: skip
    return [("", table.rows), *((heading, rows) for heading, rows in further if rows)]


def _markdown_of(heading: str, rows: Sequence[TableRow]) -> str:
    lines = [(heading, *COLUMNS), ("---", *("---:" for _ in COLUMNS)), *((_cell(row.label), *row.cells) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _rows(rows: Sequence[Mapping[str, Any]]) -> tuple[TableRow, ...]:
    return tuple(TableRow(row["metric"], row["label"], row["show"], tuple(row["values"])) for row in rows)
