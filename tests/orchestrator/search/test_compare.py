"""Comparisons on a real Ray: every arm with every seed, each arm's best learning rate, and more seeds later."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from actors.monitors.metrics_log import read_metrics
from orchestrator.config.load import ConfigError, load_config
from orchestrator.config.run import RunConfig
from orchestrator.reports.search_report import write_search_report
from orchestrator.search.compare import RATE, compare
from orchestrator.search.ledger import Search, read_ledger
from orchestrator.search.results import best_trial
from tests.logs import logged
from tests.orchestrator.trial_world import config_in, scored_run
from tests.worlds import tiny_llama

COMPARE: dict[str, Any] = {
    "arms": ["forward_kl", "atkd"], "seeds": 1, "learning_rates": [1e-3, 1e-2], "rungs": 2, "concurrent": 1,
    "trials_in": "reused_process",
}  # fmt: skip


def comparing(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"compare": config.compare.model_validate({**COMPARE, **changes})})


def ended(search: Search) -> list[tuple[str | None, int, str]]:
    return [(trial.begun.arm, trial.begun.seed, search.status(trial)) for trial in search.trials]


@pytest.mark.ray
@pytest.mark.slow
def test_a_comparison_from_its_learning_rates_to_more_seeds(local_ray: None, tmp_path: Path) -> None:
    """Students answer at the end of what is compared; the rates before are chosen by what is measured without."""
    evaluate = {"generate_rows": 4, "max_new_tokens": 3}
    config = scored_run(tmp_path, compare={**COMPARE, "answers": True}, evaluate=evaluate)
    with logged() as said:
        folder = compare(config)
    rates, search = (read_ledger(path / "ledger.jsonl") for path in (folder / "learning_rates", folder))
    assert ended(rates) == [("forward_kl", 0, "completed")] * 2 + [("atkd", 0, "completed")] * 2
    for arm in COMPARE["arms"]:
        tried = {rates.value(trial): trial.begun.point[RATE] for trial in rates.trials if trial.begun.arm == arm}
        best = tried[min(value for value in tried if value is not None)]
        assert [trial.begun.point[RATE] for trial in search.trials if trial.begun.arm == arm] == [best]
        assert f"compare: {arm} learns with {best:g}" in said
    assert ended(search) == [("forward_kl", 0, "completed"), ("atkd", 0, "completed")]
    assert {path.name for path in folder.iterdir()} >= {"trials.csv", "cost.json", "best.yaml"}
    measured = [["rouge_l" in rung.metrics for rung in trial.rungs] for trial in search.trials]
    assert measured == [[False, True]] * 2 and all("rouge_l" not in trial.metrics for trial in rates.trials)
    page = write_search_report(folder).read_text()
    assert "exact match of answers" in page and "Answers by kind of task" in page
    assert "exact_match.first,exact_match.second" in (folder / "trials.csv").read_text().replace('"', "")
    assert load_config(str(folder / "best.yaml")).loss.kind in ("coupled", "atkd")

    compare(comparing(config, seeds=2, answers=True))
    more = read_ledger(folder / "ledger.jsonl")
    assert ended(more) == [(arm, seed, "completed") for seed in (0, 1) for arm in COMPARE["arms"]], "arms share each seed"
    assert more.trials[:2] == search.trials, "what was done was not done again"
    assert len({more.value(trial) for trial in more.trials}) == 4
    assert read_ledger(folder / "learning_rates" / "ledger.jsonl").trials == rates.trials

    compare(comparing(config, seeds=2, answers=True))  # nothing is left to do
    assert read_ledger(folder / "ledger.jsonl").trials == more.trials
    with pytest.raises(ValueError, match=r"this is the ledger of another search:\n  space.decoupled: .* here, None there"):
        compare(comparing(config, arms=["forward_kl", "decoupled", "atkd"]))
    with pytest.raises(ValueError, match=r"compare.rungs is 13, but a trial has 12 optimizer steps.*compare.rungs=12 would do"):
        compare(comparing(config, rungs=13))


@pytest.mark.ray
@pytest.mark.slow
def test_what_was_trained_to_find_a_rate_is_not_trained_again(local_ray: None, tmp_path: Path) -> None:
    config = scored_run(tmp_path, compare={**COMPARE, "seeds": 2})
    with logged() as said:
        folder = compare(config)
    rates, search = (read_ledger(path / "ledger.jsonl") for path in (folder / "learning_rates", folder))
    assert ended(search) == [(arm, seed, "completed") for seed in (0, 1) for arm in COMPARE["arms"]]
    assert sorted(path.name for path in (folder / "trials").iterdir() if path.name != "ray_tune") == ["0002", "0003"]
    for trial in search.trials[:2]:
        (tried,) = [one for one in rates.trials if (one.begun.arm, one.begun.point) == (trial.begun.arm, trial.begun.point)]
        assert (trial.metrics, trial.seconds) == (tried.metrics, tried.seconds)
        assert [rung.metrics for rung in trial.rungs] == [rung.metrics for rung in tried.rungs]
        known = f"compare: {trial.begun.arm} with seed 0 was trained when its rate was looked for, and is not trained again"
        assert known in said
    assert len({search.value(trial) for trial in search.trials}) == 4


@pytest.mark.ray
@pytest.mark.slow
def test_an_arm_that_fails_with_every_rate_is_named(local_ray: None, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama(tmp_path / "student", seed=2), tmp_path / "emptied")
    (tmp_path / "emptied" / "model.safetensors").unlink()
    emptied = {"model": {"kind": "pretrained", "name": str(tmp_path / "emptied")}}
    config = scored_run(tmp_path, compare={**COMPARE, "learning_rates": [0.9]}, student=emptied)
    with pytest.raises(ValueError, match=r"compare.learning_rates: forward_kl was completed with none of \[0.9\]; .*_rates"):
        compare(config)


ROLLOUTS: dict[str, Any] = {
    "student_share": 0.5, "max_new_tokens": 6, "engine": {"kind": "transformers", "dtype": "float32", "cpus": 0.5},
}  # fmt: skip
ON_POLICY: dict[str, Any] = {
    "arms": ["forward_kl", "off", "on"],
    "own_arms": {
        "off": {"rollouts": None, "loss": {"kind": "coupled"}},
        "on": {"rollouts.student_share": 1.0, "loss": {"kind": "coupled", "divergence": "reverse_kl"}, "student.model.layers": 2},
    },
    "baseline": "off", "seeds": 1, "rungs": 2,
}  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("place", ["reused_process", pytest.param("ray_train", marks=pytest.mark.drill)])
def test_arms_with_and_without_text_of_their_students(local_ray: None, tmp_path: Path, place: str) -> None:
    """One teacher scores for all; what a trial writes is its own, drawn by its seed, and by a student of its arm's shape."""
    student = {"model": {"kind": "scratch", "hidden_size": 16, "layers": 1, "heads": 2}}
    compares = {**ON_POLICY, "trials_in": place}
    config = scored_run(tmp_path, rollouts=ROLLOUTS, compare=compares, workers={"cpus": 0.5}, student=student)
    folder = compare(config)
    found = read_ledger(folder / "ledger.jsonl")
    assert ended(found) == [("forward_kl", 0, "completed"), ("off", 0, "completed"), ("on", 0, "completed")]
    steps = {number: read_metrics(folder / "trials" / f"{number:04d}" / "rollouts.jsonl") for number in range(3)}
    assert [len(steps[number]) for number in range(3)] == [12, 0, 12], "the arm without rollouts wrote nothing"
    assert sum(line["rows"] for line in steps[2]) == 96 > sum(line["rows"] for line in steps[0]) > 24
    written = sum(line["tokens"] for number in (0, 2) for line in steps[number])
    assert json.loads((folder / "cost.json").read_text())["written_tokens_scored"] == written
    assert not list((folder / "trials").glob("*/rollouts/*")), "what was written goes with its trial"
    sizes = [trial.ended.parameters or 0 for trial in found.trials if trial.ended]
    block = 16 * (4 * 16 + 3 * 48) + 2 * 16
    assert sizes[0] == sizes[1] == sizes[2] - block and not list((folder / "trials").glob("*/student"))
    best = load_config(str(folder / "best.yaml"))
    assert (best.rollouts is None) == (best_trial(found).begun.arm == "off")  # type: ignore[union-attr]
    page = write_search_report(folder).read_text()
    assert "tokens of students&#39; own text scored" in page


def test_one_process_holds_one_worker(tmp_path: Path) -> None:
    config = config_in(tmp_path, workers={"count": 2}, compare=COMPARE)
    with pytest.raises(ConfigError, match="compare.trials_in reused_process trains in one process, and workers.count is 2"):
        compare(config)
