"""Where the teacher is unsure: its mean uncertainty by kind of task and by the target's place in the answer, as a heat map."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from actors.evaluation.answers import read_heldout_texts
from actors.examples import ExampleFile
from actors.score_store.store import ScoreStore, is_store
from orchestrator.reports.page import Chart
from orchestrator.reports.svg import INK, SERIES, STYLE, svg_of

PLACES = 12
"""Columns of the heat map; the last one holds all later targets."""

MOST_TASKS = 16
MOST_ROWS = 5000
FEWEST_TARGETS = 3
"""A cell of fewer targets stays empty."""

FAINTEST, STRONGEST = 0.04, 0.5
"""Opacity of the colour of uncertainty 0 and 1; the numbers stay readable on both, on light and dark pages."""

WHOLE = "all rows"


def uncertainty_places(run_path: Path) -> Chart | None:
    """Return the heat map over the held-out rows; None if their tokens, texts or scores are not there."""
    data, pointers_path = run_path / "data", run_path / "scores.json"
    pointers = json.loads(pointers_path.read_text()) if pointers_path.exists() else {}
    files = (data / "heldout.arrow", data / "heldout_texts.jsonl")
    if not all(file.exists() for file in files) or "heldout" not in pointers or not is_store(pointers["heldout"]):
        return None
    store, examples = ScoreStore(pointers["heldout"]), ExampleFile(files[0])
    if store.missing_shards() or store.rows != len(examples):
        return None
    tasks = [text.task for text in read_heldout_texts(files[1], examples.rows.tolist())]
    every = range(0, len(tasks), max(1, -(-len(tasks) // MOST_ROWS)))
    means = mean_by_task_and_place([tasks[row] for row in every], [store.uncertainty_at(row) for row in every])
    if not means:
        return None
    columns = [*(str(place + 1) for place in range(PLACES - 1)), f"{PLACES}+"]
    drawing = heat_table("places", list(means), columns, list(means.values()), "target's place in the answer")
    note = (
        "Mean UNC of held-out targets, from 0 (pale) to 1 (strong). Rows are tasks, the most uncertain first; "
        f"cells with fewer than {FEWEST_TARGETS} targets are empty."
    )
    return Chart("Where the teacher is uncertain", Markup(drawing), note)


def mean_by_task_and_place(tasks: Sequence[str | None], uncertainties: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return mean UNC by place, float64 [places], NaN where too few; of the tasks with most rows, the most uncertain first.

    Args:
        tasks: of each row; rows without one stand together.
        uncertainties: of each row UNC of its targets, float32 [N].
    """
    by_task: dict[str, list[np.ndarray]] = {}
    for task, values in zip(tasks, uncertainties, strict=True):
        by_task.setdefault(task or WHOLE, []).append(values)
    most_rows = sorted(by_task, key=lambda task: -len(by_task[task]))[:MOST_TASKS]
    overall = {task: float(np.concatenate(by_task[task]).mean()) for task in most_rows}
    means = {task: _mean_by_place(by_task[task]) for task in sorted(most_rows, key=lambda task: -overall[task])}
    return {task: values for task, values in means.items() if not np.isnan(values).all()}


def heat_table(
    name: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[np.ndarray], x_label: str
) -> str:
    """Return an SVG of cells with their values written in them, 0 to 1 as the opacity of one colour of the page.

    Args:
        name: of the chart, unique on its page; letters, digits and hyphens.
        rows: names of the rows, from the top.
        columns: names of the columns.
        values: of each row its cells, float [columns]; NaN stays empty.
        x_label: what the columns are.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(5.4, max(1.3, 0.75 + 0.235 * len(rows))), layout="constrained")
        axes = figure.subplots()
        for row, cells in enumerate(values):
            for column, value in enumerate(cells):
                if not np.isnan(value):
                    opacity = FAINTEST + (STRONGEST - FAINTEST) * float(value)
                    axes.add_patch(Rectangle((column, row), 0.94, 0.9, facecolor=SERIES[1], alpha=opacity, linewidth=0))
                    axes.text(column + 0.47, row + 0.47, f"{value:.2f}", ha="center", va="center", fontsize=7, color=INK)
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), xlabel=x_label)
        axes.set_xticks(np.arange(len(columns)) + 0.47, list(columns))
        axes.set_yticks(np.arange(len(rows)) + 0.47, [shortened_name(row) for row in rows])
        axes.grid(False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return svg_of(figure, name)


def shortened_name(name: str, longest: int = 18) -> str:
    """Return the beginning of a long name, in one line."""
    name = " ".join(name.split())
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _mean_by_place(rows: Sequence[np.ndarray]) -> np.ndarray:
    by_place: Mapping[int, list[float]] = {place: [] for place in range(PLACES)}
    for values in rows:
        for place, value in enumerate(values.tolist()):
            by_place[min(place, PLACES - 1)].append(value)
    return np.array([np.mean(found) if len(found) >= FEWEST_TARGETS else np.nan for found in by_place.values()])
