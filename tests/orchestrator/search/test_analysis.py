"""What is read from trials: axes, planes, importances and curves."""

from pathlib import Path

import pytest

from orchestrator.search.analysis import (
    Axis,
    at_the_end,
    difference_curves,
    importances,
    learning_curve,
    mean_curves,
    numeric_axes,
    plane,
    settings_at_an_end,
    values_of_arms,
)
from orchestrator.search.ledger import Ledger, Search, read_ledger
from tests.orchestrator.searches import (
    begin,
    measures,
    run_trial,
    tuned_at_random,
)


def search_of(ledger: Ledger) -> Search:
    return read_ledger(ledger.path)


def test_settings_that_vary_and_are_numbers_are_axes(tmp_path: Path) -> None:
    search = search_of(tuned_at_random(tmp_path))
    assert numeric_axes(search) == [
        Axis("loss.easy_ratio"), Axis("train.optimizer.learning_rate", log=True), Axis("train.batch_rows"),
        Axis("train.optimizer.weight_decay"), Axis("train.optimizer.warmup_ratio"),
    ]  # fmt: skip


def test_axes_within_branches_are_found(tmp_path: Path) -> None:
    one, two = {"x": {"low": 1e-4, "high": 1.0, "log": True}, "fixed": [1]}, {"y": [1, 2, 3], "flag": [True, False]}
    ledger = begin(tmp_path, space={"branches": {"one": one, "two": two}})
    points = [{"x": 1.1e-4, "fixed": 1}, {"x": 0.5, "fixed": 1}, {"y": 3, "flag": True}, {"y": 2, "flag": False}]
    for number, point in enumerate(points):
        run_trial(ledger, number, point, 2.0 + number)
    search = search_of(ledger)
    assert numeric_axes(search) == [Axis("x", log=True), Axis("y")]
    assert [settings_at_an_end(search, trial) for trial in search.trials] == [["x"], [], ["y"], []]


def test_a_place_shows_its_best_trial(tmp_path: Path) -> None:
    for mode, expected in (("min", 2.0), ("max", 4.0)):
        ledger = begin(tmp_path / mode, mode=mode)
        for number, loss in enumerate((3.0, 2.0, 4.0)):
            run_trial(ledger, number, {"x": 1, "y": 0.5}, loss)
        run_trial(ledger, 3, {"x": 2}, 1.0)
        search = search_of(ledger)
        places = plane(search, at_the_end(search), Axis("x"), Axis("y"))
        assert places == {(1.0, 0.5): pytest.approx(measures(expected, 500)["heldout_loss"])}


def test_importance_takes_eight_trials_and_orders_by_size(tmp_path: Path) -> None:
    ledger = begin(tmp_path)
    for number in range(8):
        run_trial(ledger, number, {"weak": (number * 3) % 8, "strong": -number, "same": 1}, 2.0 + number)
        search = search_of(ledger)
        if number < 7:
            assert importances(search, at_the_end(search)) == []
    strong, weak = importances(search, at_the_end(search))
    assert (strong.path, strong.correlation, strong.trials) == ("strong", pytest.approx(-1), 8)
    assert weak.path == "weak" and abs(weak.correlation) < 0.5


def test_curves_of_arms_are_means_over_completed_seeds(tmp_path: Path) -> None:
    ledger = begin(tmp_path, kind="compare", baseline="base")
    for number, (arm, seed, loss) in enumerate([("base", 0, 2.0), ("base", 1, 3.0), ("new", 0, 1.5), ("new", 2, 9.0)]):
        run_trial(ledger, number, {}, loss, arm=arm, seed=seed)
    search = search_of(ledger)
    assert mean_curves(search)["base"][-1] == (500, pytest.approx(measures(2.5, 500)["heldout_loss"]))
    assert difference_curves(search, "base") == {"new": [(step, pytest.approx(-0.5)) for step in (125, 250, 375, 500)]}
    assert learning_curve(search, search.trials[0])[0] == (125, measures(2.0, 125)["heldout_loss"])


def test_two_trials_of_one_arm_and_seed_are_refused(tmp_path: Path) -> None:
    ledger = begin(tmp_path, kind="compare", baseline="a")
    for number in range(2):
        run_trial(ledger, number, {}, 2.0, arm="a", seed=7)
    with pytest.raises(ValueError, match="trial 1 is the second of arm 'a' with seed 7; a comparison has one of each"):
        values_of_arms(search_of(ledger), "heldout_loss")
