"""The report of a run: one page that needs nothing but itself, made from what stands in the run's folder.

Each part is a function from the run's folder to what the template shows; where its files are missing, the part is left out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from actors.examples import write_atomically
from actors.score_store import ScoreStore
from orchestrator import __version__
from orchestrator.plots import Curve, histogram_chart, line_chart
from orchestrator.table import COLUMNS, MODEL_NAMES, ComparisonTable, read_table

UNCERTAINTY_BINS = 30
MOST_TARGETS = 2_000_000  # of a large store, a part spread evenly over it is counted
ANSWERS_SHOWN = 10

TRAININGS = {"fit_teacher": "fitting the teacher", "fit_student": "fitting the student", "train": "distillation"}
"""Metrics files by name, and what each is about."""

FIELDS = {"loss": ("Loss", "loss (nats)"), "learning_rate": ("Learning rate", "learning rate")}
"""Fields of a step that every training has: heading and axis."""

TERMS = {
    "divergence": "divergence from the teacher",
    "easy_diversity": "easy tokens: diversity",
    "hard_target": "hard tokens: target",
    "hard_diversity": "hard tokens: diversity",
    "cross_entropy": "cross entropy to the data",
}
"""Fields of a step that are means over its tokens, and their names in the chart."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture with its heading and a sentence below it."""

    heading: str
    svg: Markup
    note: str = ""


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
        if self.seconds < 60:
            return f"{self.seconds:.1f} s"
        minutes, seconds = divmod(round(self.seconds), 60)
        return f"{minutes} min {seconds:02} s"


def write_report(run_path: Path) -> Path:
    """Write ``report.html`` into the run's folder and return its path."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "pages"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report.html.j2").render(report_content(run_path))
    path = run_path / "report.html"
    write_atomically(path, page.encode())
    return path


def report_content(run_path: Path) -> dict[str, Any]:
    """Return what the template shows, by the names it uses."""
    config_text = (run_path / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(config_text)
    events = read_json_lines(run_path / "events.jsonl")
    return {
        "name": config["name"],
        "started": started_at(events),
        "version": __version__,
        "subtitle": subtitle(config),
        "columns": COLUMNS,
        "table": read_table(run_path) if (run_path / "table.json").exists() else ComparisonTable((), ()),
        "charts": [*training_charts(run_path), *uncertainty_charts(run_path, config)],
        "answers": answer_groups(run_path),
        "stages": stage_times(events),
        "config": config_text,
    }


def subtitle(config: Mapping[str, Any]) -> str:
    """Return the run in a few words: its teaching, teacher and student."""
    names = []
    for role in ("teacher", "student"):
        model = config[role]["model"]
        shape = f"{model.get('layers')} layers of width {model.get('hidden_size')}"
        names.append(model["name"] if model["kind"] == "pretrained" else shape)
    divergence = config["loss"].get("divergence", {}).get("kind", "forward_kl")
    teaching = config["loss"]["teaching"] + ("" if divergence == "forward_kl" else f", {divergence}")
    return f"{teaching} · teacher {names[0]} · student {names[1]}"


def training_charts(run_path: Path) -> list[Chart]:
    """Return loss, terms and learning rate of each training there was."""
    charts = []
    for name, about in TRAININGS.items():
        steps = read_json_lines(run_path / "metrics" / f"{name}.jsonl")
        for field, (heading, unit) in FIELDS.items():
            if curve := curve_of(steps, field, about):
                drawing = line_chart(f"{name}-{field.replace('_', '-')}", [curve], "step", unit, smooth=field == "loss")
                charts.append(Chart(f"{heading}, {about}", Markup(drawing)))
        terms = [curve for field, label in TERMS.items() if name == "train" and (curve := curve_of(steps, field, label))]
        if terms:
            drawing = line_chart(f"{name}-terms", terms, "step", "mean over their tokens (nats)", smooth=True)
            note = "Unweighted, over the tokens that are taught: target and diversity are the two terms of a KL divergence."
            charts.append(Chart("Terms of the loss", Markup(drawing), note))
    return charts


def curve_of(steps: Sequence[Mapping[str, Any]], field: str, label: str) -> Curve | None:
    """Return a field over the steps that have it as a finite number; None if none has."""
    points = {step["step"]: step[field] for step in steps if math.isfinite(step.get(field, math.nan))}
    return Curve(label, list(points), list(points.values())) if points else None


def uncertainty_charts(run_path: Path, config: Mapping[str, Any]) -> list[Chart]:
    """Return the histogram of the teacher's uncertainty over the training targets, if their store is still there."""
    pointers_path = run_path / "scores.json"
    pointers = json.loads(pointers_path.read_text()) if pointers_path.exists() else {}
    split = "train" if "train" in pointers else "heldout"
    if split not in pointers or not (Path(pointers[split]) / "manifest.json").exists():
        return []
    store = ScoreStore(Path(pointers[split]))
    values = sampled_uncertainties(store)
    if len(values) == 0:
        return []
    counts, edges = uncertainty_histogram(values)
    easy_ratio = config["loss"].get("easy_ratio")
    border = None if easy_ratio is None else float(np.quantile(values, easy_ratio))
    drawing = histogram_chart(
        "uncertainty", edges, 100 * counts / counts.sum(), "UNC = 1 − teacher's probability of the target", "targets (%)",
        border, ("easy", "hard"),
    )  # fmt: skip
    note = f"{len(values):,} {'training' if split == 'train' else 'held-out'} targets; median {np.median(values):.2g}."
    if border is not None:
        note += f" The line at {border:.2g} parts easy from hard over all of them (easy_ratio {easy_ratio})."
    return [Chart("Uncertainty of the teacher", Markup(drawing), note)]


def sampled_uncertainties(store: ScoreStore, most_targets: int = MOST_TARGETS) -> np.ndarray:
    """Return UNC of the targets of a store's finished shards, float32 [targets]; of evenly spaced shards if there are more."""
    missing = set(store.missing_shards())
    shards = [shard for shard in range(store.shard_count) if shard not in missing]
    targets = sum(store.shard_info(shard).targets for shard in shards)
    chosen = shards[:: max(1, math.ceil(targets / most_targets))]
    values = [store.uncertainty_at(position) for shard in chosen for position in store.positions(shard)]
    return np.concatenate(values) if values else np.zeros(0, dtype=np.float32)


def uncertainty_histogram(values: np.ndarray, bins: int = UNCERTAINTY_BINS) -> tuple[np.ndarray, np.ndarray]:
    """Return counts, int64 [bins], and edges, float64 [bins + 1], of UNC over 0 to 1."""
    counts, edges = np.histogram(np.clip(values, 0.0, 1.0), bins=bins, range=(0.0, 1.0))
    return counts, edges


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


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file, one a line, none if there is no file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]
