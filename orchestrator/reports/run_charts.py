"""The charts of a run's report: its trainings step by step, and how unsure the teacher is of the targets.

Each is made from files of the run's folder; where they are missing, it is left out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from actors.score_store.store import ScoreStore, is_store
from orchestrator.reports.page import Chart, read_json_lines
from orchestrator.reports.svg import Curve, histogram_chart, line_chart

UNCERTAINTY_BINS = 30
MOST_TARGETS = 2_000_000  # of a large store, a part spread evenly over it is counted

TRAININGS = {
    "finetune_teacher": "fine-tuning the teacher",
    "finetune_student": "fine-tuning the student",
    "train": "distillation",
}
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
class Uncertainties:
    """UNC of the targets of a store."""

    values: np.ndarray
    """float32 [targets]; of a large store, those of evenly spaced shards."""

    split: str
    """Which rows they are of: training or held-out."""

    easy_ratio: float | None
    """Share of the targets that is easy; None where the loss does not part them by the teacher's uncertainty."""

    @property
    def border(self) -> float | None:
        """UNC that parts easy from hard over all these targets."""
        return None if self.easy_ratio is None else float(np.quantile(self.values, self.easy_ratio))


def training_charts(run_path: Path) -> list[Chart]:
    """Return loss, terms, easy and hard shares, and learning rate of each training there was."""
    charts = []
    for name, about in TRAININGS.items():
        steps = read_json_lines(run_path / "metrics" / f"{name}.jsonl")
        for field, (heading, unit) in FIELDS.items():
            if curve := curve_of(steps, field, about):
                drawing = line_chart(f"{name}-{field.replace('_', '-')}", [curve], "step", unit, smooth=field == "loss")
                charts.append(Chart(f"{heading}, {about}", Markup(drawing)))
        if name == "train":
            charts += [*terms_charts(steps), *shares_charts(steps)]
    return charts


def terms_charts(steps: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return the terms of the distillation loss, in one chart."""
    terms = [curve for field, label in TERMS.items() if (curve := curve_of(steps, field, label))]
    if not terms:
        return []
    drawing = line_chart("train-terms", terms, "step", "mean over their tokens (nats)", smooth=True)
    note = "Unweighted, over the tokens that are taught: target and diversity are the two terms of a KL divergence."
    return [Chart("Terms of the loss", Markup(drawing), note)]


def shares_charts(steps: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return how many of a step's tokens are easy, and how much of its loss they make; nothing where none are told apart."""
    tokens = [{"step": step["step"], "share": 100 * step["easy_share"]} for step in steps if "easy_share" in step]
    of_loss = [
        {"step": step["step"], "share": 100 * step["easy_loss"] / step["loss"]}
        for step in steps
        if "easy_loss" in step and step["loss"] > 0
    ]
    both = [(tokens, "easy tokens, of all tokens"), (of_loss, "easy tokens' loss, of the loss")]
    shares = [curve for points, label in both if (curve := curve_of(points, "share", label))]
    if not shares:
        return []
    drawing = line_chart("train-shares", shares, "step", "share of the step (%)", smooth=True, y_limits=(0, 100))
    note = "The rest is hard. Where the loss's line is low, the step learns from hard tokens; where it is high, from easy ones."
    return [Chart("Easy and hard", Markup(drawing), note), *border_charts(steps)]


def border_charts(steps: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return up to which uncertainty tokens were easy, step by step; nothing where uncertainty does not part them."""
    border = curve_of(steps, "easy_border", "border")
    if border is None:
        return []
    drawing = line_chart("train-border", [border], "step", "highest UNC of an easy token", smooth=True)
    note = "It follows from the teacher's scores alone, and differs between steps as their rows do."
    return [Chart("Border between easy and hard", Markup(drawing), note)]


def curve_of(steps: Sequence[Mapping[str, Any]], field: str, label: str) -> Curve | None:
    """Return a field over the steps that have it as a finite number; None if none has."""
    points = {step["step"]: step[field] for step in steps if math.isfinite(step.get(field, math.nan))}
    return Curve(label, list(points), list(points.values())) if points else None


def read_uncertainties(run_path: Path, config: Mapping[str, Any]) -> Uncertainties | None:
    """Return the teacher's uncertainty of the training targets, else of the held-out ones; None if no store is there."""
    pointers_path = run_path / "scores.json"
    pointers = json.loads(pointers_path.read_text()) if pointers_path.exists() else {}
    split = "train" if "train" in pointers else "heldout"
    if split not in pointers or not is_store(pointers[split]):
        return None
    values = sampled_uncertainties(ScoreStore(pointers[split]))
    if len(values) == 0:
        return None
    loss = config["loss"]
    easy_ratio = loss.get("easy_ratio") if loss.get("split") == "uncertainty" else None
    return Uncertainties(values, "training" if split == "train" else "held-out", easy_ratio)


def uncertainty_chart(found: Uncertainties) -> Chart:
    """Return the histogram, with the line between easy and hard if there is one."""
    counts, edges = uncertainty_histogram(found.values)
    drawing = histogram_chart(
        "uncertainty", edges, 100 * counts / counts.sum(), "UNC = 1 − teacher's probability of the target", "targets (%)",
        found.border, ("easy", "hard"),
    )  # fmt: skip
    note = f"{len(found.values):,} {found.split} targets; median {np.median(found.values):.2g}."
    if found.border is not None:
        note += f" The line at {found.border:.2g} parts easy from hard over all of them (easy_ratio {found.easy_ratio})."
    return Chart("Uncertainty of the teacher", Markup(drawing), note)


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
