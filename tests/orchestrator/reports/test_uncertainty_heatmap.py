"""The heat map of uncertainty by task and place in the answer."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from orchestrator.reports.svg import INK, SERIES
from orchestrator.reports.uncertainty_heatmap import (
    PLACES,
    heat_table,
    mean_by_task_and_place,
    shortened_name,
    uncertainty_places,
)
from tests.orchestrator.pages import TARGET_PROBABILITIES, whole_run


def test_means_are_by_task_and_place_and_the_most_uncertain_come_first() -> None:
    rows = [np.array([0.1, 0.2]), np.array([0.3]), np.array([0.2, 0.4]), np.array([0.9]), np.array([0.6]), np.array([0.9])]
    found = mean_by_task_and_place(["a", "a", "a", "b", "b", "b"], rows)
    assert list(found) == ["b", "a"]
    assert found["a"][0] == pytest.approx(0.2) and found["b"][0] == pytest.approx(0.8)
    assert np.isnan(found["a"][1]), "two targets are too few"


def test_late_targets_share_the_last_place_and_rows_without_a_task_a_line() -> None:
    long = np.arange(PLACES + 2, dtype=np.float32) / 100
    found = mean_by_task_and_place([None], [long])
    assert list(found) == ["all rows"]
    assert found["all rows"][-1] == pytest.approx(long[PLACES - 1 :].mean())
    assert mean_by_task_and_place(["a"], [np.array([0.5])]) == {}, "nothing but cells of too few targets"


def test_a_run_has_its_map_while_rows_and_scores_are_there(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    chart = uncertainty_places(run)
    assert chart is not None
    assert f">{1 - np.mean(TARGET_PROBABILITIES):.2f}<" in chart.svg
    assert "&lt;script&gt;" in chart.svg and "<script" not in chart.svg
    shutil.rmtree(run / "store")
    assert uncertainty_places(run) is None


def test_cells_take_the_colours_of_the_page() -> None:
    drawing = heat_table("one", ["a", "b"], ["1", "2"], [np.array([0.0, 1.0]), np.array([np.nan, 0.5])], "place")
    assert drawing.count("var(--series-2)") == 3 and "currentColor" in drawing
    assert not any(colour in drawing for colour in (INK, *SERIES)) and "<image" not in drawing
    assert sorted(float(found) for found in re.findall(r"opacity: ([\d.]+)", drawing) if float(found) < 1)[-1] == 0.5


def test_long_names_of_tasks_are_shortened() -> None:
    assert shortened_name("a\nb") == "a b"
    assert shortened_name("x" * 40) == "x" * 17 + "…"
