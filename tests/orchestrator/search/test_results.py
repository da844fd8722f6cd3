"""Trials as a table: their order, their columns, the best one."""

import io
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet
import pytest
from rich.console import Console

from orchestrator.config.load import load_config, validate
from orchestrator.config.run import RunConfig
from orchestrator.search.ledger import read_ledger
from orchestrator.search.results import (
    best_trial,
    label_of,
    print_trial_table,
    ranked,
    trial_table,
    write_best,
    write_trial_tables,
    written_metric,
)
from tests.orchestrator.searches import EVIL, begin, compared, fail_trial, run_trial


def mixed_ledger(folder: Path) -> Path:
    """Completed 2 and 0, stopped 1 (far) and 3, unfinished 5, failed 4."""
    ledger = begin(folder)
    run_trial(ledger, 0, {"loss.easy_ratio": 0.3, "loss.scope": "batch"}, 2.5)
    run_trial(ledger, 1, {"loss.easy_ratio": 0.5, "loss": {"kind": "atkd"}}, 2.9, rungs=3)
    run_trial(ledger, 2, {"loss.easy_ratio": 0.7, "loss.scope": None, "seed": 5}, 2.4)
    run_trial(ledger, 3, {"loss.easy_ratio": 1}, 0.1, rungs=2)
    fail_trial(ledger, 4, {"loss.easy_ratio": 0.1})
    ledger.begun(5, {"loss.easy_ratio": 0.2}, seed=0)
    return ledger.path


def scratch_config(name: str = "tiny_cpu") -> RunConfig:
    shape = {"kind": "scratch", "hidden_size": 64, "layers": 2, "heads": 2}
    sides = {"teacher": {"model": shape, "finetune": {"train": {}}}, "student": {"model": shape}}
    return validate({"name": name, "tokenizer": {"vocab_size": 300}, "loss": {"kind": "atkd", "easy_ratio": 0.7}, **sides})


def test_completed_trials_come_first_and_failed_ones_last(tmp_path: Path) -> None:
    search = read_ledger(mixed_ledger(tmp_path))
    assert [trial.number for trial in ranked(search)] == [2, 0, 1, 3, 5, 4]
    best = best_trial(search)
    assert best is not None and best.number == 2, "a stopped trial with a lower loss is not the best"


def test_where_more_is_better_the_largest_is_first(tmp_path: Path) -> None:
    ledger = begin(tmp_path, metric="top1_agreement", mode="max")
    run_trial(ledger, 0, {}, 2.5)
    run_trial(ledger, 1, {}, 2.4)
    assert [trial.number for trial in ranked(read_ledger(ledger.path))] == [1, 0]


def test_without_a_completed_trial_the_stopped_one_that_came_furthest_is_best(tmp_path: Path) -> None:
    ledger = begin(tmp_path)
    ledger.begun(9, {}, seed=0)
    assert best_trial(read_ledger(ledger.path)) is None
    run_trial(ledger, 0, {}, 2.0, rungs=1)
    run_trial(ledger, 1, {}, 2.9, rungs=2)
    best = best_trial(read_ledger(ledger.path))
    assert best is not None and best.number == 1
    write_best(read_ledger(ledger.path), scratch_config(), tmp_path / "best.yaml")
    assert "stopped early, and no trial was completed" in (tmp_path / "best.yaml").read_text()


def test_both_files_hold_every_trial(tmp_path: Path) -> None:
    search = read_ledger(mixed_ledger(tmp_path))
    write_trial_tables(search, tmp_path)
    table = pyarrow.parquet.read_table(tmp_path / "trials.parquet")
    assert table.equals(trial_table(search))
    columns = table.to_pydict()
    assert columns["trial"] == [2, 0, 1, 3, 5, 4]
    assert columns["rank"] == [1, 2, None, None, None, None]
    assert columns["status"] == ["completed", "completed", "stopped", "stopped", "unfinished", "failed"]
    assert columns["step"] == [500, 500, 375, 250, 0, 10]
    assert columns["loss.easy_ratio"] == [0.7, 0.3, 0.5, 1.0, 0.2, 0.1]
    assert columns["loss.scope"] == [None, "batch", None, None, None, None]
    assert columns["loss"] == [None, None, '{"kind": "atkd"}', None, None, None]
    assert columns["seed"] == [0] * 6 and columns["point.seed"] == [5, None, None, None, None, None]
    assert columns["student_tokens"] == [500_000, 500_000, 375_000, 250_000, None, 10_000]
    assert columns["error"] == [None] * 5 + [EVIL]
    from_csv = pyarrow.csv.read_csv(tmp_path / "trials.csv")
    assert from_csv.column_names == table.column_names
    assert from_csv["heldout_loss"].to_pylist() == columns["heldout_loss"]


def test_what_is_measured_by_kind_of_task_stands_in_the_files_and_not_on_the_terminal(tmp_path: Path) -> None:
    ledger = begin(tmp_path)
    ledger.begun(0, {"loss.easy_ratio": 0.3}, 0, None)
    ledger.ended(0, "completed", 500, {"heldout_loss": 2.0, "exact_match": 0.5, "exact_match.a.b": 0.25}, 10.0, 1000)
    assert trial_table(read_ledger(ledger.path))["exact_match.a.b"].to_pylist() == [0.25]
    assert "50.0 %" in printed(ledger.path) and "a.b" not in printed(ledger.path)
    assert label_of("exact_match.a.b") == "exact match of answers to a.b" and written_metric("exact_match.a.b", 0.25) == "25.0 %"


def of_several_sizes(folder: Path, *sizes: int | None) -> Path:
    ledger = begin(folder)
    for number, size in enumerate(sizes):
        run_trial(ledger, number, {"student.model.width": number}, 2.0 + number, parameters=size)
    return ledger.path


def test_sizes_are_shown_where_students_differ_in_them(tmp_path: Path) -> None:
    (tmp_path / "same").mkdir()
    differ, same = of_several_sizes(tmp_path, 1234, 567_890, None), of_several_sizes(tmp_path / "same", 1234, 1234)
    assert trial_table(read_ledger(differ))["parameters"].to_pylist() == [1234, 567_890, None]
    rows = [line.split() for line in printed(differ).splitlines()]
    assert rows[0][:3] == ["trial", "student.model.width", "parameters"] and rows[2][:3] == ["1", "1", "567,890"]
    assert rows[3][:3] == ["2", "2", "–"]
    assert "parameters" not in trial_table(read_ledger(same)).column_names and "parameters" not in printed(same)


def test_a_ledger_without_trials_is_an_empty_table(tmp_path: Path) -> None:
    ledger = begin(tmp_path)
    write_trial_tables(read_ledger(ledger.path), tmp_path)
    assert pyarrow.parquet.read_table(tmp_path / "trials.parquet").num_rows == 0


def printed(path: Path) -> str:
    file = io.StringIO()
    print_trial_table(read_ledger(path), Console(file=file))
    return file.getvalue()


def test_the_terminal_shows_settings_measures_and_errors(tmp_path: Path) -> None:
    text = printed(mixed_ledger(tmp_path))
    lines = text.splitlines()
    body = [line.split() for line in lines if line.split() and line.split()[0].isdigit()]
    assert [line[0] for line in body] == ["2", "0", "1", "3", "5", "4"]
    assert body[0][-2:] == ["500", "completed"]
    assert "2.4713" in text, "2.4 and what is left of the start"
    assert f"trial 4 failed: {EVIL}" in text
    assert max(map(len, lines)) <= 120


def test_the_terminal_shows_arms_and_seeds_of_a_comparison(tmp_path: Path) -> None:
    lines = printed(compared(tmp_path, seeds=2).path).splitlines()
    assert lines[0].split()[:3] == ["trial", "arm", "seed"]
    assert lines[1].split()[1:3] == ["atkd", "0"] or lines[1].split()[1:3] == ["atkd", "1"]
    assert lines[-1] == "trial 9 failed: TrainingDiverged: loss is nan"


def test_the_best_configuration_is_one_that_loads(tmp_path: Path) -> None:
    config = scratch_config("n" * 80)
    trial = write_best(read_ledger(mixed_ledger(tmp_path)), config, tmp_path / "best.yaml")
    assert trial.number == 2
    loaded = load_config(tmp_path / "best.yaml")
    assert loaded.name == "n" * 75 + "-best"
    assert loaded.model_copy(update={"name": config.name}) == config
    heading = (tmp_path / "best.yaml").read_text().splitlines()[0]
    assert heading == ("# Trial 2 of tiny_cpu, the best of 2 completed: held-out loss (nats per target) 2.4713 after 500 steps")


def test_without_a_measured_trial_there_is_no_best_configuration(tmp_path: Path) -> None:
    ledger = begin(tmp_path)
    fail_trial(ledger, 0, {})
    with pytest.raises(ValueError, match="no trial of tiny_cpu was completed or stopped: there is no best one to write"):
        write_best(read_ledger(ledger.path), scratch_config(), tmp_path / "best.yaml")
