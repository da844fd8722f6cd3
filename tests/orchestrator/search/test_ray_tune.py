"""Results of a ledger as Ray Tune's own."""

from pathlib import Path

import pytest

from orchestrator.search.ledger import read_ledger
from orchestrator.search.ray_tune import result_grid
from tests.orchestrator.searches import begin, fail_trial, run_trial


@pytest.mark.ray
@pytest.mark.slow
def test_the_trials_of_a_ledger_are_a_result_grid(local_ray: None, tmp_path: Path) -> None:
    ledger = begin(tmp_path)
    points = [{"loss.easy_ratio": ratio, "loss.easy_weight": 0.2} for ratio in (0.1, 0.5, 0.9)]
    run_trial(ledger, 0, points[0], loss=2.5)
    run_trial(ledger, 1, points[1], loss=2.2)
    run_trial(ledger, 2, points[2], loss=2.9, rungs=2)
    fail_trial(ledger, 3, points[2], error="the disk is full")
    ledger.begun(4, points[0], 0)  # runs still
    search = read_ledger(tmp_path / "ledger.jsonl")
    grid = result_grid(search, tmp_path / "ray_tune")
    assert (len(grid), grid.num_errors) == (4, 1) and "the disk is full" in str(grid.errors[0])
    best = grid.get_best_result()
    assert best.config == {"trial": 1, "point": points[1]}
    assert best.metrics["heldout_loss"] == search.value(search.trials[1])
    stopped = next(result for result in grid if result.config["trial"] == 2)
    assert stopped.metrics_dataframe["step"].tolist() == [rung.step for rung in search.trials[2].rungs]
    assert set(grid.get_dataframe()["config/point/loss.easy_ratio"]) == {0.1, 0.5, 0.9}
