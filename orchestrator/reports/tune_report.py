"""The parts of a page that only a search has: the best trial, the plane of settings, curves by trial, what mattered."""

import math
import shlex
from typing import Any

import yaml
from markupsafe import Markup

from orchestrator.reports.page import Chart, Column, Grid, Headline, PageSection
from orchestrator.reports.search_charts import Trace, size_chart, trace_chart
from orchestrator.reports.setting_charts import heat_map, parallel_chart
from orchestrator.search.analysis import (
    Snapshot,
    at_the_end,
    importances,
    learning_curve,
    numeric_axes,
    plane,
    settings_at_an_end,
    varied,
    where_all_were,
)
from orchestrator.search.ledger import Search, Trial
from orchestrator.search.results import (
    best_trial,
    completed_trials,
    describe_best,
    label_of,
    sizes_of,
    written_metric,
)
from orchestrator.search.statistics import FEWEST_FOR_CORRELATION

HARDLY = 0.1
"""Size of a rank correlation below which it has no direction worth naming."""

MOST_PARALLEL = 8
"""Axes of the parallel chart; more would not be told apart."""


def tune_headline(search: Search) -> Headline:
    """Return which trial is the best, by how much, and what to bear in mind."""
    best = best_trial(search)
    if best is None:
        return Headline("Best trial", ("No trial has come to a measured end yet.",))
    notes = []
    if not completed_trials(search):
        notes.append("No trial was completed; this one came furthest of those that were stopped.")
    if rest := completed_trials(search)[1:]:
        metric, second = search.spec.metric, rest[0]
        notes.append(f"Second is trial {second.number} with {written_metric(metric, search.value(second))}.")
    if ends := settings_at_an_end(search, best):
        notes.append(f"At an end of what was searched, beyond which there may be better: {', '.join(ends)}.")
    notes.append("Each trial ran once: small differences may be chance, and a comparison with several seeds would tell.")
    return Headline("Best trial", (f"{describe_best(search, best)}.",), tuple(notes), overrides_of(best))


def overrides_of(trial: Trial) -> str:
    """Return the trial's point as overrides of the command line, quoted for a shell."""
    point = sorted(trial.begun.point.items(), key=lambda setting: setting[0].count("."))
    return " ".join(shlex.quote(f"{path}={_as_yaml(value)}") for path, value in point)


def tune_parts(search: Search) -> list[PageSection]:
    """Return the parts of the page between the best trial and the table of all."""
    parts = [
        PageSection("Settings", charts=tuple(setting_charts(search))),
        PageSection("Size", charts=tuple(size_charts(search))),
        PageSection("Learning", charts=tuple(learning_charts(search))),
    ]
    return [*(part for part in parts if part.charts), importance_part(search)]


def setting_charts(search: Search) -> list[Chart]:
    """Return planes of the first two numeric settings, and all settings as parallel axes.

    Where trials were stopped, values at the end are those of the few that got there; so the same is shown after the last step at
    which all were measured.
    """
    axes, snapshots = numeric_axes(search), [at_the_end(search)]
    early = where_all_were(search)
    if early is not None and early.step < search.spec.total_steps:
        snapshots.append(early)
    charts = []
    for snapshot in snapshots:
        when = f"after {snapshot.step:,} steps"
        if len(axes) > 1 and (places := plane(search, snapshot, axes[0], axes[1])):
            name, label = f"plane-{snapshot.step}", label_of(search.spec.metric)
            drawing = heat_map(name, axes[0], axes[1], places, label, search.spec.mode)
            note = f"{_who(snapshot, search)} The best is framed."
            if len(varied(search)) > 2:
                note += " Other settings vary too: each place shows its best trial."
            charts.append(Chart(f"{axes[0].path} and {axes[1].path}, {when}", Markup(drawing), note))
        shown = [trial for trial in search.trials if trial.number in snapshot.values]
        if axes and len(shown) > 1:
            rows = [[_number_or_nan(trial.begun.point.get(axis.path)) for axis in axes[:MOST_PARALLEL]] for trial in shown]
            charts += parallel_charts(search, snapshot, shown, rows, when)
    return charts


def parallel_charts(search: Search, snapshot: Snapshot, shown: list[Trial], rows: list[list[float]], when: str) -> list[Chart]:
    """Return the chart of parallel axes over the settings that any of the trials has; none if there is no such setting."""
    axes = numeric_axes(search)[:MOST_PARALLEL]
    present = [index for index in range(len(axes)) if not all(math.isnan(row[index]) for row in rows)]
    if not present:
        return []
    values = [snapshot.values[trial.number] for trial in shown]
    drawing = parallel_chart(
        f"parallel-{snapshot.step}", [axes[index] for index in present], [[row[index] for index in present] for row in rows],
        values, label_of(search.spec.metric), search.spec.mode,
    )  # fmt: skip
    note = f"{_who(snapshot, search)} A line for each, from the best (blue, thick) to the worst (orange)."
    return [Chart(f"All numeric settings, {when}", Markup(drawing), note)]


def size_charts(search: Search) -> list[Chart]:
    """Return how good completed trials are by the size of their students; none where all are of one size."""
    sizes, values = sizes_of(search), at_the_end(search).values
    trials = [(sizes[number], value) for number, value in values.items() if number in sizes]
    if len({size for size, _ in trials}) < 2:
        return []
    drawing = size_chart("sizes", trials, label_of(search.spec.metric), search.spec.mode)
    note = f"{len(trials)} completed trials. The line joins those that no student of their size or less is better than."
    return [Chart("What a larger student brings", Markup(drawing), note)]


def learning_charts(search: Search) -> list[Chart]:
    """Return the learning curves of all trials that were measured."""
    best, traces = best_trial(search), []
    for trial in search.trials:
        if curve := learning_curve(search, trial):
            look = "best" if trial is best else search.status(trial)
            steps, values = zip(*curve, strict=True)
            traces.append(Trace(f"best: trial {trial.number}", steps, values, look))
    if not traces:
        return []
    drawing = trace_chart("curves", traces, "step", label_of(search.spec.metric))
    return [Chart("Learning curves by trial", Markup(drawing), "Measured at each rung; where a trial was stopped, it is marked.")]


def importance_part(search: Search) -> PageSection:
    """Return how closely each numeric setting and the metric go together."""
    snapshot = where_all_were(search)
    found = importances(search, snapshot) if snapshot else []
    heading = "Which settings matter: rank correlation"
    if not found or snapshot is None:
        few = len(snapshot.values) if snapshot else 0
        needed = f"It takes {FEWEST_FOR_CORRELATION} measured trials with a setting that varies and is a number"
        return PageSection(heading, Grid((), (), (f"{needed}; measured so far: {few}.",)))
    rows = tuple(
        (one.path, f"{abs(one.correlation):.2f}", _better_when(one.correlation, search), str(one.trials)) for one in found
    )
    columns = (Column("setting"), Column("|Spearman|", True), Column("better when", True), Column("trials", True))
    notes = (
        f"Values after {snapshot.step:,} steps, the last at which all were measured. A rank correlation sees each setting alone, "
        "and only a steady rise or fall: a setting whose best lies in the middle, or that acts together with another, can matter "
        "and be near 0 here. Where the search chose its points by earlier ones, they are no even sample.",
    )
    return PageSection(heading, Grid(columns, rows, notes), classes="plain narrow")


def _who(snapshot: Snapshot, search: Search) -> str:
    count = len(snapshot.values)
    if snapshot.step == search.spec.total_steps:
        return f"{count} completed trials." if search.with_status("stopped") else f"{count} trials."
    return f"{count} trials, stopped ones included, all after the same number of steps."


def _better_when(correlation: float, search: Search) -> str:
    if abs(correlation) < HARDLY:
        return "–"
    return "larger" if (correlation < 0) == (search.spec.mode == "min") else "smaller"


def _number_or_nan(value: Any) -> float:
    return math.nan if value is None else float(value)


def _as_yaml(value: Any) -> str:
    """Return a value in one line, as an override reads it."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()
