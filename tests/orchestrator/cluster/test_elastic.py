"""Trainings whose number of workers follows the room there is: the same rows a step, the same student."""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import ray
import torch
from ray.train import ControllerError, WorkerGroupError
from ray.util import remove_placement_group

from actors.config.workers import WorkersConfig
from actors.monitors.metrics_log import read_metrics
from actors.placement import proven_places, reserve, worker_request
from actors.student.task import WorkerResult
from orchestrator.cluster import elastic
from orchestrator.cluster.elastic import train_in_turns
from orchestrator.config.load import ConfigError, dump_config, load_config
from orchestrator.models.models import Models
from orchestrator.run.run_dir import RunDir
from orchestrator.run.stages import distillation_task
from orchestrator.run.training import train_model
from tests.logs import logged
from tests.orchestrator.config.test_run import changed
from tests.orchestrator.elastic_world import LONG, LOST_AFTER
from tests.orchestrator.training_world import (
    ROWS,
    TRAIN,
    assert_same,
    give_back,
    losses_of,
    task_in,
    trained,
    weights_of,
    when,
    withhold_shard,
)
from tests.recovery import Record, record_recovery
from tests.worlds import scored_world

ROOT = Path(__file__).parents[3]
ONE_TO_FOUR = WorkersConfig(min=1, max=4)


def test_a_range_of_workers_promises_its_lower_end() -> None:
    workers = changed("workers={min: 2, max: 8}").workers
    assert (workers.count, workers.most, workers.elastic) == (2, 8, True)
    assert WorkersConfig.model_validate(workers.model_dump()) == workers
    assert changed("workers={min: '2', max: 8}").workers == workers
    steady = changed("workers.count=3").workers
    assert (steady.count, steady.most, steady.elastic) == (3, 3, False)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{min: 2}", "min 2 needs max beside it; max 2 would do, or count 2 alone"),
        ("{max: 4}", "max 4 needs min beside it; min 4 would do, or count 4 alone"),
        ("{min: 4, max: 2}", "min 4 is above max 2; min 2 would do"),
        ("{count: 3, min: 2, max: 4}", "count 3 and min 2 exclude each other; count null would do, or min null and max null"),
        ("{min: 0, max: 4}", "used:\n  workers.min: Input should be greater than or equal to 1; got 0"),
        ("{min: auto, max: 4}", "used:\n  workers.min: Input should be a valid integer, unable to parse string"),
    ],
)
def test_a_range_that_is_none_is_refused(said: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        changed(f"workers={said}")


def test_a_range_and_a_number_take_each_others_place(tmp_path: Path) -> None:
    for said, then, wanted in (
        ("workers={count: 16}", ["workers.count=null", "workers.min=1", "workers.max=32"], (1, 32)),
        ("workers={min: 1, max: 4}", ["workers.min=null", "workers.max=null", "workers.count=3"], (3, 3)),
        ("workers={min: 1, max: 4}", ["workers.min=2"], (2, 4)),
    ):
        (tmp_path / "dumped.yaml").write_text(dump_config(changed(said)))
        workers = load_config(tmp_path / "dumped.yaml", then).workers
        assert (workers.count, workers.most) == wanted


def test_a_loss_that_depends_on_the_number_of_workers_takes_no_range() -> None:
    with pytest.raises(ConfigError, match=r"loss\.scope microbatch .* workers\.max 4 lets change; loss\.scope batch would do"):
        changed("workers={min: 1, max: 4}", "loss={kind: atkd, scope: microbatch}")


def test_the_number_of_workers_may_change_when_a_run_is_resumed(tmp_path: Path) -> None:
    here = f"output={tmp_path}"
    RunDir.open(changed(here, "name=batches")).close()
    RunDir.open(changed(here, "name=batches", "workers.count=2")).close()
    passes = [here, "name=passes", "loss={kind: atkd, scope: microbatch}"]
    RunDir.open(changed(*passes)).close()
    with pytest.raises(ValueError, match=r"workers\.count: 2 here, 1 there"):
        RunDir.open(changed(*passes, "workers.count=2"))


class Turns:
    """Plays Ray Train: each turn ends as it is told to, and notes with how many workers it was."""

    def __init__(self, *ends: WorkerResult | Exception) -> None:
        self.ends, self.counts = iter(ends), list[int]()

    def __call__(self, count: int) -> WorkerResult:
        self.counts.append(count)
        end = next(self.ends)
        if isinstance(end, Exception):
            raise end
        return end


RAYS = importlib.import_module("ray.train.v2._internal.exceptions")  # no public names; if Ray renames them this must fail
LOST = WorkerGroupError("a worker died", {1: RuntimeError("the node is gone\nmore")})


def turns(
    monkeypatch: pytest.MonkeyPatch, rooms: list[int], train: Turns, *, scoring: bool = False, failures: int = 2
) -> list[str]:
    """Train where there is room for so many each time it is looked at; return what was said."""
    left: Iterator[int] = iter(rooms)
    monkeypatch.setattr(elastic, "proven_places", lambda need, most: min(next(left), most))
    with logged() as said:
        ending = train_in_turns("train", ONE_TO_FOUR, failures, train, lambda: scoring)
    assert ending == WorkerResult()
    return said


def test_the_number_follows_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    train = Turns(LOST, WorkerResult(resize_requested=True), WorkerResult())
    assert turns(monkeypatch, [3, 2, 9], train) == [
        "train: starts with 3 workers (1 to 4)",
        "train: worker 1 failed (RuntimeError: the node is gone); all start again from their last checkpoint",
        "train: continues with 2 workers (1 to 4)",
        "train: continues with 4 workers (1 to 4)",
    ]
    assert train.counts == [3, 2, 4]


def test_the_fewest_train_while_the_teacher_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    train = Turns(WorkerResult())
    assert turns(monkeypatch, [], train, scoring=True) == ["train: starts with 1 worker (1 to 4)"]
    assert train.counts == [1]


def test_room_for_the_fewest_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RAYS.WorkerGroupStartupTimeoutError.__name__ == elastic.NO_ROOM
    train = Turns(ControllerError(RAYS.WorkerGroupStartupTimeoutError(1)), WorkerResult())
    assert turns(monkeypatch, [0, 0], train)[1:] == ["train: waits for room for 1 worker of 1 CPU"]
    assert train.counts == [1, 1]


def test_workers_that_are_lost_while_they_start_are_a_failure_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = ControllerError(getattr(RAYS, elastic.LOST_AT_START)("the node went"))
    silent = WorkerGroupError("a worker died", {0: AssertionError()})
    assert turns(monkeypatch, [1, 1, 1], Turns(lost, silent, WorkerResult()))[1:] == [
        "train: workers failed (WorkerGroupStartupFailedError: the node went); all start again from their last checkpoint",
        "train: worker 0 failed (AssertionError: ); all start again from their last checkpoint",
    ]


def test_failures_are_counted_and_others_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkerGroupError, match="a worker died"):
        turns(monkeypatch, [4, 3, 2], Turns(LOST, LOST), failures=1)
    with pytest.raises(ControllerError, match="another version"):
        turns(monkeypatch, [4], Turns(ControllerError(RuntimeError("made by another version"))))


def test_the_room_is_the_teachers_until_its_last_rows_are_scored(tmp_path: Path) -> None:
    """The held-out rows come after those that the student learns from; a loss without a teacher is examined by one too."""
    for loss in ("{kind: atkd}", "{kind: hard_label}"):
        config = changed(f"output={tmp_path}", f"loss={loss}")
        task = distillation_task(config, tmp_path, Models(config, tmp_path), store=None)
        assert task.beside_teacher
    assert task.teacher_done is not None
    Path(task.teacher_done).parent.mkdir()
    Path(task.teacher_done).touch()
    assert not task.beside_teacher
    assert not replace(task, teacher_done=None).beside_teacher, "while models are fine-tuned there is none"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.drill
@pytest.mark.parametrize("sharding", ["replicate", "fsdp"])
def test_workers_become_more_when_the_teacher_is_done_and_the_student_is_the_same(
    undisturbed: tuple[Path, dict[str, torch.Tensor]], training_world: Path, tmp_path: Path, sharding: str
) -> None:
    _, store = scored_world(training_world, ROWS)
    train = TRAIN.model_copy(update={"checkpoint_every_steps": 1, "sharding": sharding})
    scored = tmp_path / "scored.json"
    task = task_in(tmp_path, training_world, train=train, teacher_done=str(scored))
    withheld = withhold_shard(Path(store.place), 3)  # the worker stops before step 4

    def teacher_is_done() -> None:
        scored.touch()
        give_back(Path(store.place), withheld)

    scorer = when(lambda: len(losses_of(tmp_path)) == 3, teacher_is_done)
    with logged() as said:
        train_model(task, WorkersConfig(min=1, max=2, grow_seconds=0.0), tmp_path / "checkpoints")
    scorer.join()
    assert [line for line in said if "worker" in line] == [
        "train: starts with 1 worker (1 to 2)", "train: continues with 2 workers (1 to 2)",
    ]  # fmt: skip
    steps = read_metrics(tmp_path / "metrics" / "train.jsonl")
    assert [step["step"] for step in steps] == list(range(1, 9))
    counts = [step["workers"] for step in steps]
    assert counts[:3] == [1, 1, 1], "there was room all the time, and the teacher was at work"
    assert counts in ([1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 2, 2, 2, 2])
    assert losses_of(tmp_path) == pytest.approx(losses_of(undisturbed[0]), abs=1e-4)
    assert_same(weights_of(task), undisturbed[1], tolerance=1e-4)


@pytest.mark.ray
def test_room_is_proven_by_taking_it(local_ray: None) -> None:
    need = worker_request(WorkersConfig(cpus=1.5))
    assert proven_places(need, 1) == 1
    held = ray.remote(Held).options(num_cpus=1).remote()  # outside of groups: on no node's run_dir
    ray.get(held.here.remote())
    assert proven_places(need, 9, seconds=3.0) == 2
    ray.kill(held)
    assert proven_places(need, 2) == 2
    assert proven_places(worker_request(WorkersConfig(cpus=9)), 1, seconds=0.5) == 0


class Held:
    def here(self) -> None:
        """GeneratedAnswer once it stands."""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.drill
def test_room_that_does_not_come_in_time_is_waited_for(
    local_ray: None, training_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "25")  # workers need as long to import
    everything = reserve(worker_request(WorkersConfig(cpus=4)))
    assert everything.wait(30)
    task = task_in(tmp_path, training_world)
    with logged() as said:
        giver = when(lambda: any("waits for room" in line for line in said), lambda: remove_placement_group(everything))
        train_model(task, WorkersConfig(min=1, max=2), tmp_path / "checkpoints")
    giver.join()
    assert "train: waits for room for 1 worker of 1 CPU" in said
    assert [step["step"] for step in read_metrics(tmp_path / "metrics" / "train.jsonl")] == list(range(1, 9))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.drill
def test_training_goes_on_when_a_node_is_lost_with_a_worker_on_it(
    local_ray: None, tmp_path: Path, record_property: Record
) -> None:
    command = [sys.executable, "-m", "tests.orchestrator.elastic_world", str(tmp_path)]
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as short:  # AF_UNIX paths are limited to about 107 bytes
        environment = os.environ | {"RAY_TMPDIR": short, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    facts = json.loads((tmp_path / "facts.json").read_text())
    said = facts["elastic"]["said"]
    for kind in facts:
        record_recovery(record_property, facts[kind]["recovery_seconds"])

    alone = task_in(tmp_path / "alone", tmp_path / "world", train=LONG, name="alone")
    weights = trained(alone, tmp_path / "alone")
    undisturbed = read_metrics(tmp_path / "alone" / "metrics" / "alone.jsonl")
    counts = {}
    for kind in ("elastic", "steady"):
        steps = read_metrics(tmp_path / kind / "metrics" / f"{kind}.jsonl")
        assert [(step["step"], step["tokens"]) for step in steps] == [(step["step"], step["tokens"]) for step in undisturbed]
        assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in undisturbed], abs=1e-3)
        counts[kind] = [step["workers"] for step in steps]
        assert_same(weights_of(task_in(tmp_path / kind, tmp_path / "world", name=kind)), weights, tolerance=1e-2)

    assert set(counts["steady"]) == {2}
    assert [line for line in said if " with " in line] == [
        f"elastic: {line} (1 to 2)" for line in ("starts with 2 workers", "continues with 1 worker", "continues with 2 workers")
    ]
    assert [count for count, _ in groupby(counts["elastic"])] == [2, 1, 2]
    assert counts["elastic"].index(1) >= LOST_AFTER - 2, "no more is repeated than since the last checkpoint"
    (failed,) = [line for line in said if "failed" in line]
    assert failed.startswith("elastic: worker ") and failed.endswith("all start again from their last checkpoint")
