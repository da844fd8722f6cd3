"""The report of a run: one page that needs nothing but itself, made from what stands in the run's folder.

Each part is a function from the run's folder to what the template shows; where its files are missing, the part is left out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from actors.format import duration
from orchestrator import __version__
from orchestrator.reports.classes_report import calibration_notes, class_charts
from orchestrator.reports.page import Chart, read_json_lines, write_page
from orchestrator.reports.provenance import about_run
from orchestrator.reports.rollouts_report import student_text
from orchestrator.reports.run_charts import Uncertainties, read_uncertainties, training_charts, uncertainty_chart
from orchestrator.reports.token_texts import read_reading
from orchestrator.reports.uncertainty_heatmap import uncertainty_places
from orchestrator.run.benchmarking import read_benchmarks
from orchestrator.run.judging import read_judging
from orchestrator.run.results_table import COLUMNS, MODEL_NAMES, ComparisonTable, TableRow, read_table

ANSWERS_SHOWN = 10

DECISIVE = (
    ("heldout_loss", "Held-out loss", True), ("kl_to_teacher", "KL to the teacher", True),
    ("exact_match", "Exact match of {answers:,} answers", False), ("accuracy", "Accuracy", False),
)  # fmt: skip
"""Metrics that are put into words: name in the table, name in the sentence, and whether less is better."""


@dataclass(frozen=True, slots=True)
class AnswerGroup:
    """One held-out prompt and what the three models answered."""

    task: str | None
    prompt: str
    reference: str
    answers: tuple[tuple[str, str, bool], ...]
    """Model, its answer, and whether it is right."""


@dataclass(frozen=True, slots=True)
class StageTime:
    """How long a stage took, the last time it was done."""

    stage: str
    seconds: float
    starts: int
    tokens_per_second: float | None

    @property
    def duration(self) -> str:
        """The time as people write it."""
        return duration(self.seconds)


def write_report(run_path: Path) -> Path:
    """Write ``report.html`` into the run's folder and return its path."""
    path = run_path / "report.html"
    write_page(path, "report.html.j2", report_content(run_path))
    return path


def report_content(run_path: Path) -> dict[str, Any]:
    """Return what the template shows, by the names it uses."""
    config = yaml.safe_load((run_path / "config.yaml").read_text(encoding="utf-8"))
    events = read_json_lines(run_path / "events.jsonl")
    uncertainties = read_uncertainties(run_path, config)
    table = read_table(run_path) if (run_path / "table.json").exists() else ComparisonTable((), ())
    return {
        "name": config["name"],
        "started": started_at(events),
        "version": __version__,
        "subtitle": subtitle(config),
        "columns": COLUMNS,
        "findings": [*findings(table, answers_count(run_path)), *calibration_notes(run_path)],
        "table": table,
        "judge": judging.lines() if (judging := read_judging(run_path)) is not None else [],
        "benchmarks": found.lines() if (found := read_benchmarks(run_path)) is not None else [],
        "training": training_charts(run_path),
        "teacher": teacher_charts(run_path, uncertainties),
        "classes": class_charts(run_path),
        "student_text": student_text(run_path, config),
        "reading": read_reading(run_path, uncertainties.border if uncertainties else None),
        "answers": answer_groups(run_path),
        "stages": stage_times(events),
        "about": about_run(run_path),
    }


def findings(table: ComparisonTable, answers: int) -> list[str]:
    """Return in words what became of the student: how far it came towards the teacher by loss, divergence and ``answers``."""
    rows = {row.metric: row for row in table.rows if None not in row.values}
    return [
        finding(rows[metric], name.format(answers=answers), less_is_better)
        for metric, name, less_is_better in DECISIVE
        if metric in rows
    ]


def answers_count(run_path: Path) -> int:
    """Return how many prompts the student after answered; 0 if it was not evaluated."""
    path = run_path / "evaluation" / f"{MODEL_NAMES[-1]}.json"
    return len(json.loads(path.read_text(encoding="utf-8"))["answers"]) if path.exists() else 0


def finding(row: TableRow, name: str, less_is_better: bool) -> str:
    """Return one sentence on a metric that all three models have."""
    teacher, before, after = (value or 0.0 for value in row.values)
    gained, gap = (before - after, before - teacher) if less_is_better else (after - before, teacher - before)
    words = f"{name}: {row.cells[1]} before, {row.cells[2]} after"
    if gained <= 0:
        words += ", worse than before" if gained < 0 else ", as before"
    elif gap > 0 and row.metric == "kl_to_teacher":
        return f"{words}, {100 * gained / gap:.0f} % less."
    elif 0 < gap < gained:
        return f"{words}, beyond the teacher's {row.cells[0]}."
    elif gap > 0:
        return f"{words}, {100 * gained / gap:.0f} % of the way to the teacher's {row.cells[0]}."
    return f"{words}." if row.metric == "kl_to_teacher" else f"{words}; the teacher has {row.cells[0]}."


def teacher_charts(run_path: Path, uncertainties: Uncertainties | None) -> list[Chart]:
    """Return how unsure the teacher is: over all targets, and by task and place in the answer."""
    spread = [uncertainty_chart(uncertainties)] if uncertainties else []
    places = uncertainty_places(run_path)
    return [*spread, places] if places else spread


def subtitle(config: Mapping[str, Any]) -> str:
    """Return the run in a few words: its loss, teacher and student."""
    names = []
    for role in ("teacher", "student"):
        model = config[role]["model"]
        names.append(_model_in_words(model))
    divergence = config["loss"].get("divergence", {}).get("kind", "forward_kl")
    loss = config["loss"]["kind"] + ("" if divergence == "forward_kl" else f", {divergence}")
    return f"{loss} · teacher {names[0]} · student {names[1]}"


def _model_in_words(model: Mapping[str, Any]) -> str:
    if model["kind"] == "pretrained":
        return str(model["name"])
    if model["kind"] == "soft_labels":
        return f"soft labels by {model['similarity']}"
    if "hidden_size" not in model and model["kind"] != "cut":
        return str(model["kind"])
    layers = model["layers"]
    if model["kind"] == "cut":
        return f"{layers if isinstance(layers, int) else len(layers)} of its layers"
    return f"{layers} layers of width {model['hidden_size']}"


def answer_groups(run_path: Path) -> list[AnswerGroup]:
    """Return a few prompts with the models' answers, of as many tasks as possible."""
    by_model: dict[str, dict[int, Any]] = {}
    for column, name in zip(COLUMNS, MODEL_NAMES, strict=True):
        path = run_path / "evaluation" / f"{name}.json"
        if path.exists():
            answers = json.loads(path.read_text(encoding="utf-8"))["answers"]
            by_model[column] = {answer["row"]: answer for answer in answers}
    rows: dict[int, Any] = {row: answer for answers in by_model.values() for row, answer in answers.items()}
    groups = []
    for row in spread_over_tasks({row: answer["task"] for row, answer in rows.items()})[:ANSWERS_SHOWN]:
        answered = [(model, answers[row]) for model, answers in by_model.items() if row in answers]
        given = tuple((model, answer["generated"], answer["correct"]) for model, answer in answered)
        groups.append(AnswerGroup(rows[row]["task"], rows[row]["prompt"], rows[row]["reference"], given))
    return groups


def spread_over_tasks(task_of_row: Mapping[int, str | None]) -> list[int]:
    """Return the rows so that each task comes once before any comes twice, otherwise in their order."""
    seen: dict[str | None, int] = {}
    rounds = {}
    for row, task in task_of_row.items():
        rounds[row] = seen[task] = seen.get(task, -1) + 1
    return sorted(task_of_row, key=lambda row: rounds[row])


def stage_times(events: Sequence[Mapping[str, Any]]) -> list[StageTime]:
    """Return each finished stage, in the order in which they were finished."""
    starts = [event["stage"] for event in events if event["event"] == "stage_started"]
    finished = {event["stage"]: event for event in events if event["event"] == "stage_finished"}
    return [
        StageTime(stage, event["seconds"], starts.count(stage), event.get("tokens_per_second"))
        for stage, event in finished.items()
    ]


def started_at(events: Sequence[Mapping[str, Any]]) -> str:
    """Return when the run began, local time; empty if no event says."""
    if not events:
        return ""
    return datetime.fromtimestamp(events[0]["time"]).astimezone().strftime("%Y-%m-%d %H:%M %Z")
