"""Real Ray Train: the same training however it is cut, killed or taken up again."""

import json
import re
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import ControllerError, WorkerGroupError
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoModelForCausalLM

from actors.config.models import LoraAdapter, OptimizerConfig
from actors.monitors.metrics_log import read_metrics
from actors.score_store.store import ScoringFailed
from actors.storage.folder import DiskFolder
from actors.student.checkpoint import Progress, load_checkpoint, save_checkpoint
from actors.student.loop import distil
from actors.student.ranks import Worker
from actors.student.task import TrainingDiverged, WorkerResult
from actors.student.worker import train_worker
from losses.config import HardLabelLoss
from orchestrator.failure import roots
from orchestrator.run.training import TrainingFailed, drop_uncounted_checkpoints, progress_line, summarize
from tests.logs import logged
from tests.orchestrator.training_world import (
    ROWS,
    TRAIN,
    Record,
    assert_same,
    give_back,
    kill_train_workers,
    losses_of,
    task_in,
    timed,
    trained,
    trained_here,
    weights_of,
    when,
    withhold_shard,
)
from tests.worlds import scored_world

PACKED = {"micro_batch_tokens": 40, "packing": True}


@pytest.mark.ray
def test_a_student_learns_and_its_steps_are_logged(undisturbed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = undisturbed
    steps = read_metrics(folder / "metrics" / "train.jsonl")
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert min(step["loss"] for step in steps[1:]) < steps[0]["loss"]
    assert steps[0]["kept_fraction"] == 0.9 and min(step["kept_fraction"] for step in steps) < 0.9, "it follows the loss"
    of_easy_and_hard = {"easy_share", "easy_border", "hard_target"}
    assert {"learning_rate", "gradient_norm", *of_easy_and_hard, "waited_seconds", "tokens_per_second"} <= steps[0].keys()
    assert list((folder / "metrics" / "tensorboard" / "train").glob("events.*"))


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.drill)])
def test_workers_and_accumulation_do_not_change_the_trajectory(
    undisturbed: tuple[Path, dict[str, torch.Tensor]], training_world: Path, tmp_path: Path, workers: int
) -> None:
    task = task_in(tmp_path, training_world, train=TRAIN.model_copy(update={"micro_batch_rows": 2}))
    weights = trained(task, tmp_path, workers) if workers > 1 else trained_here(task)
    assert losses_of(tmp_path) == pytest.approx(losses_of(undisturbed[0]), abs=1e-4)
    assert_same(weights, undisturbed[1], tolerance=1e-4)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.drill
@pytest.mark.parametrize("cut", [{}, PACKED])
def test_a_worker_killed_at_a_step_ends_with_the_weights_of_a_run_that_was_not(
    training_world: Path, tmp_path: Path, record_property: Record, cut: dict[str, Any]
) -> None:
    train = TRAIN.model_copy(update=cut)
    undisturbed = trained_here(task_in(tmp_path / "undisturbed", training_world, train=train))
    task = task_in(tmp_path, training_world, train=train)
    _, store = scored_world(training_world, ROWS)
    withheld = withhold_shard(Path(store.place), 3)  # the worker stops before step 4, after the checkpoint of step 3

    def harm() -> None:
        kill_train_workers()
        give_back(Path(store.place), withheld)

    killer = when(lambda: len(losses_of(tmp_path)) == 3, timed(record_property, tmp_path, harm, step=4))
    weights = trained(task, tmp_path)
    killer.join()
    assert losses_of(tmp_path) == losses_of(tmp_path / "undisturbed")
    assert_same(weights, undisturbed, tolerance=0)


@pytest.mark.ray
def test_training_waits_for_shards_that_are_still_being_scored(
    undisturbed: tuple[Path, dict[str, torch.Tensor]], training_world: Path, tmp_path: Path
) -> None:
    task = task_in(tmp_path, training_world)
    _, store = scored_world(training_world, ROWS)
    withheld = withhold_shard(Path(store.place), 2)
    scorer = when(lambda: len(losses_of(tmp_path)) == 2, lambda: (time.sleep(1), give_back(Path(store.place), withheld)))
    weights = trained_here(task)
    scorer.join()
    assert read_metrics(tmp_path / "metrics" / "train.jsonl")[2]["waited_seconds"] > 0.5
    assert_same(weights, undisturbed[1], tolerance=0)


def test_training_stops_with_the_teachers_own_error(training_world: Path, tmp_path: Path) -> None:
    _, store = scored_world(tmp_path / "world", ROWS)
    store.discard_shard(1)
    store.declare_failed("the teacher forgot everything")
    task = task_in(tmp_path, training_world, store=str(Path(store.place)))
    with pytest.raises(ScoringFailed, match="the teacher forgot everything"):
        trained_here(task)
    assert len(losses_of(tmp_path)) == 1


@pytest.mark.parametrize("failure", [ScoringFailed, TrainingDiverged, TimeoutError, ValueError])
def test_failures_that_trying_again_cannot_mend_are_told_and_not_raised(
    monkeypatch: pytest.MonkeyPatch, training_world: Path, tmp_path: Path, failure: type[Exception]
) -> None:
    def fails(*_: object) -> None:
        raise failure("for a reason")

    monkeypatch.setattr("actors.student.loop.distil", fails)
    ending = train_worker({"task": task_in(tmp_path, training_world), "checkpoints": str(tmp_path)})
    assert ending == WorkerResult(error=f"{failure.__name__}: for a reason")


@pytest.mark.ray
def test_a_diverged_run_stops_and_names_the_step(local_ray: None, training_world: Path, tmp_path: Path) -> None:
    hot = TRAIN.model_copy(update={"optimizer": OptimizerConfig(learning_rate=1e30, clip_norm=None, warmup_ratio=0.0)})
    with pytest.raises(TrainingFailed, match=r"TrainingDiverged: train: step \d has loss .* a learning rate below 1e\+30"):
        trained(task_in(tmp_path, training_world, train=hot), tmp_path)


def test_adapters_are_merged_and_fitting_needs_no_store(training_world: Path, tmp_path: Path) -> None:
    task = task_in(tmp_path, training_world, lora=LoraAdapter(rank=2), loss=HardLabelLoss(kind="hard_label"), store=None)
    weights = trained_here(task)
    begun = AutoModelForCausalLM.from_pretrained(task.model.name).state_dict()
    assert weights.keys() == begun.keys()
    changed = {name for name in weights if not torch.equal(weights[name], begun[name])}
    assert changed and all("_proj" in name for name in changed)
    assert losses_of(tmp_path)[-1] < losses_of(tmp_path)[0]


def test_what_ray_train_gives_up_on_is_passed_on(monkeypatch: pytest.MonkeyPatch, training_world: Path, tmp_path: Path) -> None:
    def gives_up(*_: object) -> None:
        raise ControllerError(RuntimeError("made by another version"))

    monkeypatch.setattr("orchestrator.run.training._train", gives_up)
    with pytest.raises(TrainingFailed, match=r"^train: Ray Train gave up \(.* made by another version\)$"):
        trained(task_in(tmp_path, training_world), tmp_path)


class KeptHere:
    """Keeps the last checkpoint in a folder, and ends the training after one, as a GPU that is too small would."""

    def __init__(self, folder: Path, ends_at: int) -> None:
        self.folder, self.ends_at = folder, ends_at

    def load(self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler, worker: Worker) -> Progress | None:
        return load_checkpoint(self.folder, student, optimizer, schedule) if self.folder.exists() else None

    def save(self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler, progress: Progress, worker: Worker) -> None:
        self.folder.mkdir(exist_ok=True)
        save_checkpoint(self.folder, student, optimizer, schedule, progress, worker.rank)
        if progress.step == self.ends_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.ray
@pytest.mark.parametrize("cut", [{"micro_batch_rows": 3, "gradient_checkpointing": True}, PACKED])
def test_a_training_goes_on_from_its_checkpoint_with_other_passes(
    undisturbed: tuple[Path, dict[str, torch.Tensor]], training_world: Path, tmp_path: Path, cut: dict[str, Any]
) -> None:
    whole = task_in(tmp_path, training_world)
    with pytest.raises(torch.OutOfMemoryError):
        distil(whole, KeptHere(tmp_path / "kept", ends_at=3))
    task = task_in(tmp_path, training_world, train=TRAIN.model_copy(update={**cut, "checkpoint_every_steps": 100}))
    distil(task, KeptHere(tmp_path / "kept", ends_at=-1))
    assert losses_of(tmp_path)[:3] == losses_of(undisturbed[0])[:3]
    assert losses_of(tmp_path) == pytest.approx(losses_of(undisturbed[0]), abs=1e-4)
    assert_same(weights_of(task), undisturbed[1], tolerance=1e-4)


def test_a_training_that_packs_goes_on_as_if_it_had_not_stopped(training_world: Path, tmp_path: Path) -> None:
    whole, stopped = (
        task_in(tmp_path / name, training_world, train=TRAIN.model_copy(update=PACKED)) for name in ("whole", "stopped")
    )
    weights = trained_here(whole)
    with pytest.raises(torch.OutOfMemoryError):
        distil(stopped, KeptHere(tmp_path / "kept", ends_at=3))
    distil(stopped, KeptHere(tmp_path / "kept", ends_at=-1))
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "whole")
    assert_same(weights_of(stopped), weights, tolerance=0)


@pytest.mark.parametrize(
    ("name", "changes", "remedy"),
    [
        ("train", {}, "the same command with train.micro_batch_rows=4 or train.gradient_checkpointing=true resumes"),
        (
            "finetune_teacher",
            {"gradient_checkpointing": True},
            "the same command with teacher.finetune.train.micro_batch_rows=4 resumes",
        ),
        ("train", {"micro_batch_tokens": 4096}, "the same command with train.micro_batch_tokens=2048 or train.gradient"),
        ("train", {"micro_batch_rows": 1}, "the same command with train.gradient_checkpointing=true resumes from the last"),
        ("train", {"micro_batch_rows": 1, "gradient_checkpointing": True}, "train.sharding=fsdp with more workers would do"),
    ],
)
def test_a_gpu_too_small_is_told_with_what_would_do_and_the_traceback_is_kept(
    monkeypatch: pytest.MonkeyPatch, training_world: Path, tmp_path: Path, name: str, changes: dict[str, Any], remedy: str
) -> None:
    def fails(*_: object) -> None:
        raise WorkerGroupError("worker 1: in accumulate_gradients", {1: torch.OutOfMemoryError("CUDA out of memory.")})

    monkeypatch.setattr("orchestrator.run.training._train", fails)
    task = task_in(tmp_path, training_world, name=name, train=TRAIN.model_copy(update=changes))
    told = f"worker 1 failed .* the last time with OutOfMemoryError: CUDA out of memory.; {re.escape(remedy)}"
    with pytest.raises(TrainingFailed, match=told) as failed:
        trained(task, tmp_path)
    story = "".join(traceback.format_exception(failed.value))
    assert "worker 1: in accumulate_gradients" in story
    assert [type(one).__name__ for one in roots(failed.value)] == ["TrainingFailed", "WorkerGroupError", "OutOfMemoryError"]


def test_checkpoints_that_a_kill_kept_from_counting_are_deleted(tmp_path: Path) -> None:
    folders = [tmp_path / f"checkpoint_2026-11-21_19-0{minute}-00.000000" for minute in range(4)]
    for folder in folders:
        (folder / "deep").mkdir(parents=True)
    book = {"checkpoint_results": [{"checkpoint_dir_name": folders[1].name}], "pending_training_results": [[0, folders[2].name]]}
    (tmp_path / "checkpoint_manager_snapshot.json").write_text(json.dumps(book))
    drop_uncounted_checkpoints(DiskFolder(tmp_path))
    assert sorted(tmp_path.glob("checkpoint_*/")) == folders[1:3]

    (tmp_path / "checkpoint_manager_snapshot.json").write_text(json.dumps(book)[:-5])
    with logged() as said:
        drop_uncounted_checkpoints(DiskFolder(tmp_path))
    assert said == [f"{tmp_path}: Ray Train's list of checkpoints was cut short; the latest that is whole counts"]
    for _ in range(2):
        assert sorted(tmp_path.glob("checkpoint_2*")) == folders[1:3], "a list that cannot be read is no reason to delete"
        drop_uncounted_checkpoints(DiskFolder(tmp_path))  # nor is one that was lost, at a start that came to no checkpoint

    (tmp_path / "checkpoint_manager_snapshot.json").write_text(json.dumps({"latest": folders[2].name}))
    drop_uncounted_checkpoints(DiskFolder(tmp_path))
    assert sorted(tmp_path.glob("checkpoint_2*")) == folders[2:3]

    (tmp_path / "checkpoint_manager_snapshot.json").unlink()
    drop_uncounted_checkpoints(DiskFolder(tmp_path))
    assert not list(tmp_path.glob("checkpoint_*/")), "killed before the first one counted"


def test_a_progress_line_says_how_far_and_how_long() -> None:
    step = {
        "step": 2,
        "total_steps": 10,
        "seconds": 30.0,
        "waited_seconds": 4.0,
        "tokens": 100,
        "tokens_per_second": 50.0,
        "loss": 0.5,
    }
    line = progress_line([{**step, "step": 1}, step])
    assert line == "step 2/10, loss 0.5000, 50 tokens/s, waited 8 s for scores, 00:04:00 left"
    assert summarize([{**step, "step": 1}, step])["tokens_per_second"] == pytest.approx(200 / 52, abs=0.1)
