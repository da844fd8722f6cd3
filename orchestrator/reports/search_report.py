"""The report of a search or a comparison: one page that needs nothing but itself, and that a person can decide by.

It is made from ``ledger.jsonl`` and, where they are there, ``cost.json`` and the configuration and events of the run above it.
Only what was measured on the held-out rows is shown: kinds of loss differ in scale.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from actors.format import duration
from orchestrator import __version__
from orchestrator.reports.compare_report import compare_headline, compare_parts
from orchestrator.reports.page import Column, Grid, PageSection, write_page
from orchestrator.reports.provenance import about_run
from orchestrator.reports.tune_report import tune_headline, tune_parts
from orchestrator.run.results_table import written
from orchestrator.search.analysis import numeric_axes
from orchestrator.search.ledger import Search, Trial, read_ledger
from orchestrator.search.results import axes_of, label_of, metrics_of, ranked, sizes_of, written_metric, written_setting

LEDGER, COST, REPORT = "ledger.jsonl", "cost.json", "report.html"
TITLES = {"tune": "search", "compare": "comparison"}


@dataclass(frozen=True, slots=True)
class Cost:
    """What the scores of a search took; None where nothing says."""

    teacher_tokens_scored: float | None = None
    """Tokens that went through the teacher."""

    dataset_tokens: float | None = None
    """Tokens of the data set, held-out rows included."""

    scoring_seconds: float | None = None
    """Time of scoring."""

    written_tokens_scored: float | None = None
    """Tokens of responses that students of trials wrote, each scored for its trial alone."""


def write_search_report(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a search or comparison, from what stands there, and return its path.

    Raises:
        ValueError: if the ledger or ``cost.json`` is missing or damaged; the message names the file.
    """
    content = search_content(read_ledger(folder / LEDGER), read_cost(folder / COST))
    write_page(folder / REPORT, "search.html.j2", {**content, "about": about_run(folder.parent)})
    return folder / REPORT


def search_content(search: Search, cost: Cost) -> dict[str, Any]:
    """Return what the template shows, by the names it uses."""
    tunes = search.spec.kind == "tune"
    headline = tune_headline(search) if tunes else compare_headline(search)
    parts = tune_parts(search) if tunes else compare_parts(search)
    return {
        "name": search.spec.name,
        "title": TITLES[search.spec.kind],
        "subtitle": subtitle(search),
        "started": datetime.fromisoformat(search.starts[0]).astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "version": __version__,
        "headline": headline,
        "parts": [*parts, trials_part(search), cost_part(search, cost)],
        "failures": [(described(trial), search.error(trial)) for trial in search.with_status("failed")],
    }


def subtitle(search: Search) -> str:
    """Return the search in a line: what it goes by, and how its trials stand."""
    plan = search.spec
    way = "less is better" if plan.mode == "min" else "more is better"
    counts = [f"{len(search.with_status(status))} {status}" for status in ("completed", "stopped", "failed", "unfinished")]
    standing = [count for count in counts if not count.startswith("0 ")]
    if missing := max(0, plan.trials - len(search.trials)):
        standing.append(f"{missing} not begun")
    again = f" · resumed {len(search.starts) - 1} ×" if len(search.starts) > 1 else ""
    return f"{TITLES[plan.kind]} by {label_of(plan.metric)}, {way} · {plan.trials} trials: {', '.join(standing)}{again}"


def trials_part(search: Search) -> PageSection:
    """Return all trials, best first."""
    compares = search.spec.kind == "compare"
    metrics, axes, sizes = metrics_of(search), [] if compares else axes_of(search), sizes_of(search)
    numbers = {"seed", "parameters", *metrics, *(axis.path for axis in numeric_axes(search))}
    names = [*(["arm", "seed"] if compares else axes), *(["parameters"] if sizes else []), *metrics]
    columns = (
        Column("trial", True), *(Column(name, name in numbers) for name in names), Column("steps", True), Column("time", True),
        Column("status"),
    )  # fmt: skip
    rows = []
    for trial in ranked(search):
        point, begun = trial.begun.point, trial.begun
        settings = [begun.arm or "", str(begun.seed)] if compares else [
            written_setting(point[path]) if path in point else "" for path in axes
        ]  # fmt: skip
        settings += [written(sizes.get(trial.number), "count")] if sizes else []
        measured = [written_metric(metric, trial.metrics.get(metric)) for metric in metrics]
        end = [f"{trial.step:,}", duration(trial.seconds), search.status(trial)]
        rows.append((str(trial.number), *settings, *measured, *end))
    note = "Best first. Stopped trials show what they measured last, after fewer steps, and are ordered by how far they came."
    stopped = search.with_status("stopped")
    return PageSection("Trials", Grid(columns, tuple(rows), (note,) if stopped else ()), classes="plain trials")


def cost_part(search: Search, cost: Cost) -> PageSection:
    """Return what was spent: the teacher's part once, the students' part by trial."""
    ended = [trial.ended for trial in search.trials if trial.ended]
    student_tokens = sum(end.student_tokens for end in ended)
    seconds = sum(trial.seconds for trial in search.trials)
    rows = [
        ("teacher: tokens scored", _tokens(cost.teacher_tokens_scored, cost.dataset_tokens)),
        ("teacher: time of scoring", duration(cost.scoring_seconds)),
        ("students: tokens trained on, all trials", _tokens(student_tokens, cost.dataset_tokens)),
        ("students: time, summed over trials", duration(seconds)),
        ("students: time of a trial, mean", duration(seconds / len(search.trials) if search.trials else None)),
    ]
    notes = ["All trials read the same scores: the teacher's part does not grow with their number."]
    if cost.written_tokens_scored is not None:
        rows.insert(2, ("teacher: tokens of students' own text scored, all trials", _tokens(cost.written_tokens_scored, None)))
        notes = ["All trials read the same scores of the data's rows; what a student writes is scored for its trial alone."]
    if unfinished := len(search.trials) - len(ended):
        notes.append(f"The tokens of unfinished trials ({unfinished}) are not counted.")
    return PageSection("Cost", Grid((Column(""), Column("", True)), tuple(rows), tuple(notes)), classes="plain narrow")


def described(trial: Trial) -> str:
    """Return the number of a trial with what it was of."""
    begun = trial.begun
    if begun.arm is not None:
        return f"Trial {trial.number}: {begun.arm}, seed {begun.seed}"
    settings = ", ".join(f"{path}={written_setting(value)}" for path, value in begun.point.items())
    return f"Trial {trial.number}: {settings}" if settings else f"Trial {trial.number}"


def read_cost(path: Path) -> Cost:
    """Return what ``cost.json`` says; all None if there is no such file.

    Raises:
        ValueError: naming the file, if it holds no object of numbers.
    """
    if not path.exists():
        return Cost()
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return Cost(**{name: None if said.get(name) is None else float(said[name]) for name in Cost.__slots__})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} holds no object of numbers, such as {{"dataset_tokens": 812000}}: {error}') from None


def _tokens(count: float | None, of: float | None) -> str:
    if count is None:
        return "–"
    return f"{count:,.0f}" + (f" ({count / of:.2f} × the data set)" if of else "")
