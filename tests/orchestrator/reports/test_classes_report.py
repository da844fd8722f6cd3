"""What pages and tables show of classifiers, from what evaluations leave."""

import json
from pathlib import Path

import numpy as np
import pytest

from actors.evaluation.class_metrics import view_of
from actors.evaluation.evaluator import Evaluation, Metrics
from orchestrator.reports.classes_report import MOST_LABELS, class_charts
from orchestrator.run.evaluation import comparison_table, read_evaluation, write_evaluation
from orchestrator.run.results_table import COLUMNS, MODEL_NAMES, markdown, read_table, write_table

LABELS, RIGHT = ("bad", "fair", "<b>good"), np.array([0, 0, 1, 1])


def evaluated(predicted: list[int], groups: list[str | None], labels: tuple[str, ...] = LABELS, **measures: float) -> Evaluation:
    metrics = Metrics(
        heldout_loss=0.5, kl_to_teacher=0.1, top1_agreement=0.75, calibration_error=0.05, exact_match=None, rouge_l=None,
        parameters=1234, targets=4, seconds=1.0, tokens_per_second=50.0, rows_per_second=4.0, milliseconds_a_row=0.25,
        **{"accuracy": 0.5, "macro_f1": 0.4, **measures},
    )  # fmt: skip
    return Evaluation(metrics, (), (), view_of(RIGHT, np.array(predicted), labels, groups, ordered=False))


def run_in(folder: Path, labels: tuple[str, ...] = LABELS) -> list[Evaluation]:
    """Evaluations of three models, the last of which is right, in a run's folder."""
    (folder / "evaluation").mkdir(parents=True)
    groups = ["q1", "q1", "q2", None]
    models = [
        evaluated([0, 1, 1, 0], groups, labels),
        evaluated([2, 2, 2, 2], groups, labels),
        evaluated([0, 0, 1, 1], groups, labels),
    ]
    for name, model in zip(MODEL_NAMES, models, strict=True):
        write_evaluation(folder / "evaluation" / f"{name}.json", model)
        assert read_evaluation(folder / "evaluation" / f"{name}.json") == model
    return models


def test_each_model_has_its_confusion_and_labels_are_escaped(tmp_path: Path) -> None:
    run_in(tmp_path)
    charts = class_charts(tmp_path)
    assert [chart.heading for chart in charts] == [f"Confusion, {column}" for column in COLUMNS]
    assert all("<b>good" not in str(chart.svg) for chart in charts)
    assert "0.50" in str(charts[0].svg) and "0.50" not in str(charts[2].svg)


def test_soft_labels_are_shown_where_they_taught(tmp_path: Path) -> None:
    run_in(tmp_path)
    (tmp_path / "stages").mkdir()
    probabilities = [[0.81, 0.12, 0.07], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8]]
    (tmp_path / "stages" / "soft_labels.json").write_text(json.dumps({"probabilities": probabilities}))
    first = class_charts(tmp_path)[0]
    assert first.heading == "Soft labels" and "0.81" in str(first.svg) and "0.12" in str(first.svg)


def test_of_many_labels_and_of_no_evaluation_nothing_is_drawn(tmp_path: Path) -> None:
    assert class_charts(tmp_path) == []
    run_in(tmp_path, tuple(map(str, range(MOST_LABELS + 1))))
    assert class_charts(tmp_path) == []


def test_the_table_has_measures_of_classifiers_and_groups_and_leaves_out_what_nobody_has(tmp_path: Path) -> None:
    table = comparison_table(*run_in(tmp_path))
    names = [row.metric for row in table.rows]
    assert names[:3] == ["accuracy", "macro_f1", "heldout_loss"], "no kappa of labels without an order"
    assert "bytes" not in names and "exact_match" not in names
    assert [(row.label, row.values) for row in table.groups] == [
        ("q1 (2)", (0.5, 0.0, 1.0)),
        ("q2 (1)", (1.0, 0.0, 1.0)),
    ]
    text = markdown(table)
    assert "accuracy by group" in text and "0.25 ms" in text and "50.0 %" in text
    write_table(tmp_path, table)
    assert read_table(tmp_path) == table


def test_grades_have_a_kappa(tmp_path: Path) -> None:
    graded = evaluated([0, 1, 1, 0], [None] * 4, weighted_kappa=0.625)
    rows = {row.metric: row.values for row in comparison_table(graded, graded, graded).rows}
    assert rows["weighted_kappa"] == (0.625,) * 3 and rows["accuracy"] == pytest.approx((0.5,) * 3)
