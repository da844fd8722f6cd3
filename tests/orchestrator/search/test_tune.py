"""Searches end to end on a real Ray: trials that end, fail, die and are killed with their driver; what is left behind."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.csv
import pytest
import ray
from ray.util import placement_group_table

from actors.config.workers import WorkersConfig
from actors.monitors.metrics_log import read_metrics
from actors.student.loop import distil
from actors.student.train_checkpoints import NoCheckpoints
from orchestrator.config.load import load_config, validate
from orchestrator.config.run import RunConfig
from orchestrator.data.grading import GRADES
from orchestrator.models.models import Models
from orchestrator.run.pipeline import run
from orchestrator.run.stages import distillation_task
from orchestrator.search.ledger import read_ledger
from orchestrator.search.ray_tune import most_at_once
from orchestrator.search.results import best_trial
from orchestrator.search.tune import tune
from tests.logs import logged
from tests.orchestrator.trial_world import RATE, config_in, scored_run, search
from tests.recovery import Record, record_until

DRIVER = """
import sys, tempfile
import ray
from pathlib import Path
from tests.orchestrator.trial_world import RATE, config_in, search
folder, ray_folder, trials = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         object_store_memory=100 << 20, _temp_dir=ray_folder)
rates = [1e-3 * (1 + trial) for trial in range(trials)]
config = config_in(folder, tune={"space": {RATE: rates}, "search": "random", "trials": trials})
search(config, folder / "search", at_once=1)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    scored_run(folder)
    return folder


def searching(world: Path, rates: list[float], **tune: Any) -> RunConfig:
    return config_in(world, tune={"space": {RATE: rates}, **tune})


def settled(condition: Callable[[], bool]) -> bool:
    """Whether something holds within ten seconds: Ray gives back in its own time."""
    until = time.monotonic() + 10
    while not condition() and time.monotonic() < until:
        time.sleep(0.1)
    return condition()


def nothing_is_held() -> bool:
    held = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    return not held and ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.drill
def test_twenty_trials_on_two_slots_all_end_and_nothing_is_left(local_ray: None, world: Path, tmp_path: Path) -> None:
    """Among them one that diverges, and one whose process is killed at its work."""
    assert settled(nothing_is_held)
    rates = [1e12, *(1e-3 * (20 - trial) for trial in range(1, 20))]  # the best first, so that ASHA has whom to stop
    config = searching(world, rates, scheduler="asha")
    killer = threading.Thread(target=kill_the_process_of_a_trial, args=(tmp_path,))
    killer.start()
    found = search(config, tmp_path)
    killer.join()

    count = Counter(found.status(trial) for trial in found.trials)
    assert count["failed"] == 2 and count["stopped"] > 3 and sum(count.values()) == 20 and not count["unfinished"]
    errors = [found.error(trial) for trial in found.with_status("failed")]
    assert any("diverged" in error or "TrainingDiverged" in error for error in errors if error), errors
    assert any("the process of the trial ended before it could say why" in error for error in errors if error), errors
    assert Counter(line["event"] for line in lines_of(tmp_path))["ended"] == 20
    for trial in found.with_status("completed"):
        assert [rung.step for rung in trial.rungs] == [4, 8, 12] and trial.ended and trial.ended.student_tokens > 0
    for trial in found.with_status("stopped"):
        steps = read_metrics(tmp_path / "trials" / f"{trial.number:04d}" / f"trial_{trial.number:04d}.jsonl")
        assert steps[-1]["step"] == trial.step == trial.rungs[-1].step < 12
        assert [rung.decision for rung in trial.rungs][-1] == "stop"
    assert settled(nothing_is_held)
    assert not (tmp_path / "ray_tune").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_scheduler_of_ray_tune_stops_trials_and_is_told_again_what_was_measured(
    local_ray: None, world: Path, tmp_path: Path
) -> None:
    """The second search finds a ledger of which the last trials are missing, and a controller that knows nothing else."""
    rates = [5e-3, 2e-3, 1e-5, 1e-6, 3e-3, 1e-7]  # better ones first, so that there is whom to stop
    config = searching(world, rates, scheduler={"kind": "async_hyperband", "reduction_factor": 2})
    whole = search(config, tmp_path / "whole", at_once=1)
    assert settled(nothing_is_held)
    assert whole.spec.scheduler == {"kind": "async_hyperband", "grace_period": 1, "reduction_factor": 2.0, "brackets": 1}
    assert not whole.with_status("failed", "unfinished")
    assert {trial.number for trial in whole.with_status("stopped")} >= {2, 3, 5}
    assert all(trial.step < 12 for trial in whole.with_status("stopped"))
    assert whole.trials[0] in whole.with_status("completed")

    lines = (tmp_path / "whole" / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    begun = next(number for number, line in enumerate(lines) if json.loads(line).get("trial") == 3)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "ledger.jsonl").write_bytes(b"".join(lines[: begun + 1]))
    again = search(config, tmp_path / "cut", at_once=1)
    assert again.trials[:3] == whole.trials[:3], "what was done was not done again"
    decided = [[[rung.decision for rung in trial.rungs] for trial in found.trials] for found in (whole, again)]
    assert decided[0] == decided[1]
    assert [trial.begun.point for trial in again.trials] == [trial.begun.point for trial in whole.trials]


def kill_the_process_of_a_trial(folder: Path) -> None:
    """Kill a trial at its work once a few have ended. Its process is held still first, so that it cannot end meanwhile."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        time.sleep(0.02)
        if not (folder / "ledger.jsonl").exists() or (folder / "ledger.jsonl").read_bytes().count(b'"ended"') < 4:
            continue
        for trial in at_work(folder):
            process = psutil.Process(pid_of(folder, trial))
            process.suspend()
            time.sleep(1)  # what it had sent to the controller is in the ledger now
            if trial in at_work(folder):
                process.kill()
                return
            process.resume()


def at_work(folder: Path) -> list[int]:
    """The trials that have begun to train and were not told to stop."""
    return [
        trial.number
        for trial in read_ledger(folder / "ledger.jsonl").with_status("unfinished")
        if not (trial.rungs and trial.rungs[-1].decision == "stop") and list(folder.glob(events_of(trial.number)))
    ]


@pytest.mark.ray
@pytest.mark.slow
def test_the_command_searches_goes_on_and_ends_in_a_configuration_that_run_accepts(local_ray: None, tmp_path: Path) -> None:
    config = scored_run(tmp_path, tune={"space": {RATE: [1e-3, 5e-3]}, "concurrent": 1})
    with logged() as said:
        folder = tune(config)
    found = read_ledger(folder / "ledger.jsonl")
    assert [found.status(trial) for trial in found.trials] == ["completed", "completed"]
    assert len({pid_of(folder, trial) for trial in (0, 1)}) == 1, "a process is kept for the next trial"
    print("seconds of trials in one process:", [trial.seconds for trial in found.trials])
    best = load_config(str(folder / "best.yaml"))
    assert best.train.optimizer.learning_rate == 5e-3
    assert {path.name for path in folder.iterdir()} >= {"trials.csv", "trials.parquet", "cost.json", "best.yaml"}
    assert json.loads((folder / "cost.json").read_text())["teacher_tokens_scored"] == 200
    assert "tune: 2 trials of 12 steps, 1 at a time" in said

    with logged() as again:
        tune(config)
    assert "tune: resumes with 2 trials done and 0 to start again" in again
    assert Counter(line["event"] for line in lines_of(folder))["ended"] == 2
    other = config.model_copy(update={"tune": config.tune.model_copy(update={"space": {RATE: [1e-3, 6e-3]}})})
    with pytest.raises(ValueError, match="this is the ledger of another search"):
        tune(other)


@pytest.mark.ray
@pytest.mark.slow
def test_students_of_several_widths_are_drawn_for_their_trials_and_the_best_one_can_be_run(
    local_ray: None, tmp_path: Path
) -> None:
    """A run of ``best.yaml`` learns as the best trial did, step by step, so that it begins with the same weights."""
    soft = {label: {other: 0.8 if other == label else 0.1 for other in GRADES} for label in GRADES}
    (tmp_path / "soft.json").write_text(json.dumps(soft))
    config = validate({
        "name": "widths", "output": str(tmp_path), "tokenizer": {"vocab_size": 300},
        "task": {"kind": "classification", "labels": list(GRADES), "field": "grade"},
        "data": {
            "source": {"kind": "builtin_grading", "rows": 160}, "heldout_rows": 40,
            "format": {"kind": "text", "text": "{{ answer }}"},
        },
        "teacher": {"model": {"kind": "soft_labels", "similarity": "file", "table": str(tmp_path / "soft.json")}},
        "student": {"model": {"kind": "text_mlp", "width": 4, "hidden": 8}},
        "loss": {"kind": "coupled"},
        "train": {"epochs": 2, "batch_rows": 24, "micro_batch_rows": 24, "optimizer": {"learning_rate": 1e-2}},
        "tune": {
            "space": {"student.model.width": [2, 4, 16]}, "search": "grid", "rungs": 2, "scheduler": "none",
            "trials_in": "reused_process", "concurrent": 1,
        },
    })  # fmt: skip
    folder = tune(config)
    found = read_ledger(folder / "ledger.jsonl")
    assert [found.status(trial) for trial in found.trials] == ["completed"] * 3, [found.error(trial) for trial in found.trials]
    sizes = {2: 300 * 2 + 3 * 8 + 9 * 3, 4: 300 * 4 + 5 * 8 + 9 * 3, 16: 300 * 16 + 17 * 8 + 9 * 3}  # embedding, hidden, output
    table = pyarrow.csv.read_csv(folder / "trials.csv").to_pydict()
    assert dict(zip(table["student.model.width"], table["parameters"], strict=True)) == sizes
    assert not list(folder.glob("trials/*/student*")), "no trial's student is kept"
    assert len({trial.metrics["heldout_loss"] for trial in found.trials}) == 3

    best = best_trial(found)
    assert best is not None and best.begun.point["student.model.width"] != 4, "not the run's own"
    again = load_config(folder / "best.yaml")
    run(again, until="score")
    store = json.loads((again.run_dir / "scores.json").read_text())["train"]
    distil(distillation_task(again, again.run_dir, Models(again, again.run_dir), store), NoCheckpoints())
    name = f"{best.number:04d}"
    steps = [read_metrics(path) for path in (
        again.run_dir / "metrics" / "train.jsonl", folder / "trials" / name / f"trial_{name}.jsonl"
    )]  # fmt: skip
    assert len(steps[0]) == 10 and [step["loss"] for step in steps[0]] == [step["loss"] for step in steps[1]]


def pid_of(folder: Path, trial: int) -> int:
    """The process in which a trial was trained, which TensorBoard has in the name of its file."""
    (events,) = folder.glob(events_of(trial))
    return int(events.name.split(".")[-2])


def events_of(trial: int) -> str:
    return f"trials/{trial:04d}/tensorboard/*/events.*"


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """A folder with a short path for the drivers' own Ray."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.drill
def test_a_killed_driver_goes_on_where_it_stood(
    world: Path, tmp_path: Path, ray_folder: str, record_property: Record
) -> None:
    """Killed with SIGKILL; each trial ends once, with its number, point and seed."""
    (tmp_path / "runs").symlink_to(world / "runs")
    for name in ("teacher", "student"):
        (tmp_path / name).symlink_to(world / name)
    ledger = tmp_path / "search" / "ledger.jsonl"
    kill_when(driver(tmp_path, ray_folder, 8), lambda: ledger.exists() and ledger.read_bytes().count(b'"ended"') >= 3)
    before = read_ledger(ledger)
    over = {trial.number: trial for trial in before.trials if trial.ended}
    assert 3 <= len(over) < 8
    process = driver(tmp_path, ray_folder, 8)
    record_until(record_property, lambda: ledger.read_bytes().count(b'"ended"') > len(over) or process.poll() is not None)
    assert process.wait(120) == 0
    after = read_ledger(ledger)
    assert [trial.number for trial in after.with_status("completed")] == list(range(8)), "all, and no other"
    assert all(after.trials[number] == trial for number, trial in over.items()), "what was done was not done again"
    for trial in before.trials:
        assert after.trials[trial.number].begun.point == trial.begun.point
        assert after.trials[trial.number].begun.seed == trial.begun.seed
    assert len({str(trial.begun.point) for trial in after.trials}) == 8
    assert Counter(line["event"] for line in lines_of(tmp_path / "search"))["ended"] == 8


def driver(folder: Path, ray_folder: str, trials: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), ray_folder, str(trials)], cwd=Path(__file__).parents[3],
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def kill_when(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """Kill a driver once something holds; what it started ends by itself, or is ended here."""
    until = time.monotonic() + 120
    while not condition() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for one in psutil.wait_procs(started, timeout=10)[1]:
        one.kill()


@pytest.mark.ray
@pytest.mark.slow
def test_trials_in_ray_train_are_stopped_by_the_judge_and_leave_nothing(local_ray: None, world: Path, tmp_path: Path) -> None:
    """The second is worse than a bar of one in two; its workers want every CPU there is. The first was interrupted before."""
    stale = tmp_path / "trials" / "0000" / "checkpoints" / "trial_0000" / "checkpoint_manager_snapshot.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")  # Ray Train would take up from what it names
    config = config_in(
        world, workers={"cpus": 4}, train={"checkpoint_every_steps": 3},
        tune={"space": {RATE: [5e-3, 1e-6]}, "scheduler": "asha", "reduction": 2, "trials_in": "ray_train"},
    )  # fmt: skip
    found = search(config, tmp_path)
    assert [(found.status(trial), trial.step) for trial in found.trials] == [("completed", 12), ("stopped", 4)], [
        found.error(trial) for trial in found.trials
    ]
    assert settled(nothing_is_held)
    assert not list(tmp_path.glob("trials/*/checkpoints")), "no trial's checkpoints are kept"


@pytest.mark.ray
def test_trials_that_find_no_room_are_refused_with_what_would_do(local_ray: None) -> None:
    assert settled(nothing_is_held)
    assert most_at_once(WorkersConfig(cpus=1)) == 4
    assert most_at_once(WorkersConfig(count=2, cpus=1)) == 2
    with pytest.raises(ValueError, match=r"a trial needs 1 worker of \S+ .*, and there is room for 0 now: lower workers"):
        most_at_once(WorkersConfig(gpus=1))
    with pytest.raises(ValueError, match=r"a trial needs 2 workers of 1 CPU and 3 student_node, and there is room for 0"):
        most_at_once(WorkersConfig(count=2, resources={"student_node": 3}))
