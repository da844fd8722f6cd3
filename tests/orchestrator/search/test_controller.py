"""The controller without Ray: what it decides and writes, and that another one knows as much from the ledger alone."""

import math
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.schedulers import AsyncHyperBand, MedianStopping, NativeScheduler
from orchestrator.search.controller import Assignment, Outcome, SearchController
from orchestrator.search.ledger import Ledger, read_ledger
from orchestrator.search.ledger_records import SearchSpec
from orchestrator.search.schedulers import RayScheduler, RuleScheduler, StoppingRule

RUNGS = (4, 8, 12)
LOSSES = [[5.0, 4.0, 3.0], [5.5, 5.0, 4.0], [4.0, 3.0, 2.0], [5.2, 4.5, 3.5], [3.0, 2.0, 1.0], [4.5, 2.5, 1.5]]
"""Of each trial, rung after rung."""


NATIVE: dict[str, NativeScheduler] = {
    "halving": AsyncHyperBand(kind="async_hyperband", reduction_factor=2, grace_period=1),
    "median": MedianStopping(kind="median_stopping_rule", min_samples_required=2),
}


def native_judge_in(folder: Path, name: str) -> SearchController:
    judge_in(folder)
    spec = read_ledger(folder / "ledger.jsonl").spec
    return SearchController(folder / "ledger.jsonl", spec, RayScheduler(NATIVE[name], "min", len(RUNGS)))


def judge_in(folder: Path, scheduler: Any = "asha", mode: Any = "min", metric: str = "heldout_loss") -> SearchController:
    spec = SearchSpec(
        kind="tune", name="small", metric=metric, mode=mode, space={"a": [1, 2]}, total_steps=12, rungs=RUNGS, trials=6
    )
    Ledger(folder / "ledger.jsonl").begin_search(spec)
    return SearchController(folder / "ledger.jsonl", spec, RuleScheduler(StoppingRule(scheduler, mode)))


def examine(controller: SearchController, trial: int, rung: int, value: float) -> bool:
    return controller.measured(trial, rung, RUNGS[rung], {"heldout_loss": value, "kl_to_teacher": 1.0}, 1.5)


def live(controller: SearchController, trial: int) -> Outcome:
    """A trial from its beginning to its end."""
    controller.begin(Assignment(trial, {"a": trial}, seed=7))
    step = 0
    for rung, loss in enumerate(LOSSES[trial]):
        step = RUNGS[rung]
        if not examine(controller, trial, rung, loss):
            break
    return controller.ended(trial, step, 100 * step)


def decisions(folder: Path) -> dict[int, list[str]]:
    found = read_ledger(folder / "ledger.jsonl")
    return {trial.number: [rung.decision for rung in trial.rungs] for trial in found.trials}


DECIDED = {
    0: ["continue", "continue", "continue"],  # the first two at a rung go on
    1: ["continue", "continue", "continue"],
    2: ["continue", "continue", "continue"],  # best of three
    3: ["stop"],  # third of four, one goes on
    4: ["continue", "continue", "continue"],
    5: ["stop"],  # third of six, two go on
}


def test_what_is_measured_at_the_last_rung_alone_stops_no_trial_before(tmp_path: Path) -> None:
    controller = judge_in(tmp_path, "none", "max", "rouge_l")
    controller.begin(Assignment(0, {"a": 1}, seed=7))
    assert all(controller.measured(0, rung, RUNGS[rung], {"heldout_loss": 1.0}, 1.0) for rung in (0, 1))
    assert controller.measured(0, 2, 12, {"heldout_loss": 1.0, "rouge_l": 0.25}, 1.0)
    assert controller.ended(0, 12, 100) == Outcome("completed", 0.25, 2)
    again = SearchController(tmp_path / "ledger.jsonl", read_ledger(tmp_path / "ledger.jsonl").spec, RuleScheduler(
        StoppingRule("median", "max")
    ))  # fmt: skip
    assert again.ended(0, 12, 100) == Outcome("completed", 0.25, 2)


def test_trials_are_stopped_as_asha_says_and_the_last_rung_stops_none(tmp_path: Path) -> None:
    controller = judge_in(tmp_path)
    outcomes = [live(controller, trial) for trial in range(6)]
    assert decisions(tmp_path) == DECIDED
    assert outcomes[4] == Outcome("completed", 1.0, 2) and outcomes[5] == Outcome("stopped", 4.5, 0)
    found = controller.search()
    assert [found.status(trial) for trial in found.trials] == [
        "completed", "completed", "completed", "stopped", "completed", "stopped",
    ]  # fmt: skip
    assert [found.value(trial) for trial in found.trials] == [3.0, 4.0, 2.0, 5.2, 1.0, 4.5], "as measured last"
    assert found.trials[3].ended is not None and found.trials[3].ended.student_tokens == 400


def test_of_a_metric_that_grows_the_largest_goes_on(tmp_path: Path) -> None:
    controller = judge_in(tmp_path, mode="max")
    for trial in range(3):
        controller.begin(Assignment(trial, {}, seed=0))
    assert [examine(controller, trial, 0, value) for trial, value in enumerate([0.5, 0.6, 0.4])] == [True, True, False]


@pytest.mark.parametrize("cut", range(1, 6))
def test_another_judge_that_reads_the_ledger_decides_the_same(tmp_path: Path, cut: int) -> None:
    first = judge_in(tmp_path)
    for trial in range(cut):
        live(first, trial)
    second = judge_in(tmp_path)
    for trial in range(cut, 6):
        live(second, trial)
    assert decisions(tmp_path) == DECIDED
    assert second.ended(0, 0, 0, "a late word") == Outcome("completed", 3.0, 2)


def test_after_any_line_at_which_the_controller_died_the_search_comes_to_the_same_end(tmp_path: Path) -> None:
    controller = judge_in(tmp_path)
    for trial in range(6):
        live(controller, trial)
    whole = (tmp_path / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    for lines in range(1, len(whole)):
        folder = tmp_path / f"cut_{lines}"
        folder.mkdir()
        (folder / "ledger.jsonl").write_bytes(b"".join(whole[:lines]) + whole[lines][:7])  # a line that was cut short
        again = judge_in(folder)
        over = {trial.number for trial in again.search().trials if trial.ended}
        for trial in range(6):
            if trial not in over:
                live(again, trial)
        assert decisions(folder) == DECIDED
        assert all(trial.ended and trial.begun.seed == 7 for trial in again.search().trials)


def test_a_trial_that_begins_anew_begins_with_its_first_rung(tmp_path: Path) -> None:
    controller = judge_in(tmp_path)
    live(controller, 0)
    controller.begin(Assignment(1, {"a": 1}, seed=7))
    examine(controller, 1, 0, 9.0)
    again = judge_in(tmp_path)
    assert live(again, 1).rung == 2
    assert [rung.metrics["heldout_loss"] for rung in again.search().trials[1].rungs] == LOSSES[1]


def test_a_rung_counts_once_and_so_does_an_end(tmp_path: Path) -> None:
    controller = judge_in(tmp_path)
    for trial in range(3):
        controller.begin(Assignment(trial, {}, seed=0))
    assert [examine(controller, trial, 0, 1.0 + trial) for trial in range(3)] == [True, True, False]
    lines = (tmp_path / "ledger.jsonl").read_bytes()
    assert [examine(controller, trial, 0, 0.0) for trial in range(3)] == [True, True, False], (
        "what was said the first time stands"
    )
    assert (tmp_path / "ledger.jsonl").read_bytes() == lines
    assert controller.ended(2, 4, 400) == controller.ended(2, 12, 1200, "twice") == Outcome("stopped", 3.0, 0)
    assert (tmp_path / "ledger.jsonl").read_bytes().count(b'"ended"') == 1


def test_workers_that_outlive_their_trial_are_told_to_stop_and_not_taken_down(tmp_path: Path) -> None:
    controller = judge_in(tmp_path)
    controller.begin(Assignment(0, {}, seed=0))
    assert examine(controller, 0, 0, 1.0)
    assert controller.ended(0, 0, 0, "its process died") == Outcome("failed", 1.0, 0)
    assert not examine(controller, 0, 0, 1.0) and not examine(controller, 0, 1, 0.5)
    assert controller.search().error(controller.search().trials[0]) == "its process died"


def test_a_trial_that_failed_before_any_rung_has_no_value(tmp_path: Path) -> None:
    controller = judge_in(tmp_path)
    controller.begin(Assignment(0, {"a": 1}, seed=3))
    assert controller.assignment(0) == Assignment(0, {"a": 1}, seed=3)
    assert controller.ended(0, 2, 20, "TrainingDiverged: step 3") == Outcome("failed", None, -1)
    assert judge_in(tmp_path).ended(0, 0, 0) == Outcome("failed", None, -1)


def test_a_spoiled_measure_stops_its_trial_and_no_other(tmp_path: Path) -> None:
    controller = judge_in(tmp_path, scheduler="median")
    for trial in range(5):
        controller.begin(Assignment(trial, {}, seed=0))
    assert [examine(controller, trial, 0, value) for trial, value in enumerate([2.0, math.nan, 3.0, math.inf, 2.5])] == [
        True, False, True, False, True,
    ]  # fmt: skip
    assert controller.ended(1, 4, 400).status == "stopped"
    assert controller.search().status(controller.search().trials[1]) == "failed", "the ledger takes it for what it is"


def test_a_rung_cannot_be_left_out(tmp_path: Path) -> None:
    controller = judge_in(tmp_path)
    controller.begin(Assignment(0, {}, seed=0))
    with pytest.raises(AssertionError, match="trial 0 comes to rung 1 and was measured at 0"):
        examine(controller, 0, 1, 1.0)


@pytest.mark.parametrize("name", NATIVE)
def test_a_scheduler_of_ray_tune_decides_the_same_after_any_line_at_which_the_controller_died(name: str, tmp_path: Path) -> None:
    controller = native_judge_in(tmp_path, name)
    for trial in range(6):
        live(controller, trial)
    decided = decisions(tmp_path)
    assert ["stop"] in decided.values() and len(decided[4]) == 3, "it stops some, and the best of all is completed"
    assert all(len(rungs) < 3 or rungs[-1] == "continue" for rungs in decided.values()), "the last rung stops none"
    whole = [line for line in (tmp_path / "ledger.jsonl").read_bytes().splitlines(keepends=True) if b'"search"' not in line]
    for lines in range(len(whole)):
        folder = tmp_path / f"cut_{lines}"
        folder.mkdir()
        native_judge_in(folder, name)
        with open(folder / "ledger.jsonl", "ab") as file:
            file.write(b"".join(whole[:lines]) + whole[lines][:7])  # a line that was cut short
        again = native_judge_in(folder, name)
        over = {trial.number for trial in again.search().trials if trial.ended}
        for trial in range(6):
            if trial not in over:
                live(again, trial)
        assert decisions(folder) == decided


@pytest.mark.parametrize("name", NATIVE)
def test_a_scheduler_of_ray_tune_never_hears_of_a_spoiled_measure_and_its_trial_stops(name: str, tmp_path: Path) -> None:
    controller = native_judge_in(tmp_path, name)
    for trial in range(4):
        controller.begin(Assignment(trial, {}, seed=0))
    assert not examine(controller, 0, 0, math.nan) and examine(controller, 1, 0, 2.0)
    assert controller.ended(0, 4, 400).status == "stopped"
    assert examine(controller, 1, 1, 1.0) and examine(controller, 1, 2, math.nan), "the last rung stops none"
    again = native_judge_in(tmp_path, name)
    again.begin(Assignment(2, {}, seed=0))
    assert examine(again, 2, 0, 9.0), "the first that it hears of"
