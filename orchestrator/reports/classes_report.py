"""What the report of a run of classification shows: which labels are taken for which, and what soft labels taught."""

import json
from pathlib import Path

import numpy as np
from markupsafe import Markup

from orchestrator.classification.calibration import in_words
from orchestrator.reports.page import Chart
from orchestrator.reports.uncertainty_heatmap import heat_table
from orchestrator.run.evaluation import read_evaluation
from orchestrator.run.results_table import COLUMNS, MODEL_NAMES
from orchestrator.run.run_dir import result_path

MOST_LABELS = 20
"""Of more labels the tables would not be readable."""


def class_charts(run_path: Path) -> list[Chart]:
    """Return the soft labels and the models' confusion of labels, as far as they are there."""
    return [*soft_label_chart(run_path), *confusion_charts(run_path)]


def calibration_notes(run_path: Path) -> list[str]:
    """Return in words how the teacher was calibrated; nothing where it was not."""
    path = result_path(run_path, "calibrate")
    return in_words(json.loads(path.read_text())) if path.exists() else []


def soft_label_chart(run_path: Path) -> list[Chart]:
    """Return the table that taught in a teacher's place; nothing where a model taught."""
    path = result_path(run_path, "soft_labels")
    table = json.loads(path.read_text()) if path.exists() else None
    evaluation = run_path / "evaluation" / "teacher.json"
    if table is None or not evaluation.exists():
        return []
    classes = read_evaluation(evaluation).classes
    assert classes is not None, "the run classifies"
    if len(classes.labels) > MOST_LABELS:
        return []
    probabilities = list(np.array(table["probabilities"]))
    drawing = heat_table("soft-labels", classes.labels, classes.labels, probabilities, "taught probability of")
    return [Chart("Soft labels", Markup(drawing), "A line for each label: the distribution that its rows are taught.")]


def confusion_charts(run_path: Path) -> list[Chart]:
    """Return for each model that was measured the share of each label's rows that are taken for each."""
    charts = []
    for name, column in zip(MODEL_NAMES, COLUMNS, strict=True):
        path = run_path / "evaluation" / f"{name}.json"
        classes = read_evaluation(path).classes if path.exists() else None
        if classes is None or len(classes.labels) > MOST_LABELS:
            continue
        counts = np.array(classes.confusion, dtype=np.float64)
        rows = counts.sum(axis=1, keepdims=True)
        shares = np.divide(counts, rows, out=np.full_like(counts, np.nan), where=rows > 0)
        chart = f"confusion-{name.replace('_', '-')}"
        drawing = heat_table(chart, classes.labels, classes.labels, list(shares), "predicted label")
        note = "A line for each label: the share of its rows that is taken for each."
        charts.append(Chart(f"Confusion, {column}", Markup(drawing), note))
    return charts
