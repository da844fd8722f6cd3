"""Real Ray Train while something breaks: a checkpoint, the disk, a worker, the controller. The weights end the same."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from actors.config.workers import WorkersConfig
from actors.dataloader.sampler import layout_of
from actors.examples import ExampleFile, write_examples
from actors.records import Example, example_key
from actors.storage.folder import DiskFolder
from actors.student.task import TrainingTask
from actors.student.train_checkpoints import damaged_checkpoints
from orchestrator.run.training import COUNTED, TrainingFailed, train_model
from tests.logs import logged
from tests.orchestrator.training_world import (
    ROWS,
    TRAIN,
    Record,
    assert_same,
    free_groups,
    give_back,
    kill_train_workers,
    losses_of,
    processes,
    task_in,
    timed,
    weights_of,
    when,
    withhold_shard,
)
from tests.worlds import scored_world


def task_with_checkpoints(folder: Path, training_world: Path) -> TrainingTask:
    """The same training with a checkpoint after every step, of which two are kept."""
    return task_in(folder, training_world, train=TRAIN.model_copy(update={"checkpoint_every_steps": 1, "keep_checkpoints": 2}))


def withhold(training_world: Path) -> tuple[Path, str]:
    """Let the worker stop before step 4, with the checkpoints of steps 2 and 3; return store and shard, to give it back."""
    _, store = scored_world(training_world, ROWS)
    return Path(store.place), withhold_shard(Path(store.place), 3)


def train(task: TrainingTask, folder: Path) -> list[str]:
    """Train and return what was said."""
    with logged() as said:
        train_model(task, WorkersConfig(count=1, cpus=1), folder / "checkpoints")
    return said


@pytest.mark.ray
@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    undisturbed: tuple[Path, dict[str, torch.Tensor]], training_world: Path, tmp_path: Path, record_property: Record
) -> None:
    task = task_with_checkpoints(tmp_path, training_world)
    store, withheld = withhold(training_world)

    def harm() -> None:
        latest = max((tmp_path / "checkpoints" / "train").glob("checkpoint_*/*.safetensors"))
        content = bytearray(latest.read_bytes())
        content[len(content) // 2] ^= 1
        latest.write_bytes(content)
        kill_train_workers()
        give_back(store, withheld)

    uncounted = tmp_path / "checkpoints" / "train" / "checkpoint_2026-01-01_00-00-00.000000"
    uncounted.mkdir(parents=True)
    killer = when(lambda: stands_before_step_4(tmp_path), timed(record_property, tmp_path, harm, step=4))
    said = train(task, tmp_path)
    killer.join()
    assert not uncounted.exists()
    (line,) = [line for line in said if "damaged" in line]
    assert "a checkpoint was damaged and passed over" in line and ".safetensors is not as it was written" in line
    assert len(damaged_checkpoints(DiskFolder(tmp_path / "checkpoints" / "train"))) == 1
    assert losses_of(tmp_path) == losses_of(undisturbed[0])
    assert_same(weights_of(task), undisturbed[1], tolerance=0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.drill
def test_a_disk_that_is_full_for_a_checkpoint_ends_the_training_with_a_word_and_the_next_goes_on(
    undisturbed: tuple[Path, dict[str, torch.Tensor]], training_world: Path, tmp_path: Path, record_property: Record
) -> None:
    task = task_with_checkpoints(tmp_path, training_world)
    store, withheld = withhold(training_world)
    fills = when(
        lambda: stands_before_step_4(tmp_path),
        lambda: (forbid_large_files(), give_back(store, withheld)),
    )
    with pytest.raises(TrainingFailed, match=r"worker 0 failed more often than train.max_failures 0; .*File too large"):
        train(replace(task, train=task.train.model_copy(update={"max_failures": 0})), tmp_path)
    fills.join()
    done = len(losses_of(tmp_path))
    watch = when(lambda: True, timed(record_property, tmp_path, lambda: None, step=done + 1))
    train(task, tmp_path)
    watch.join()
    assert losses_of(tmp_path) == losses_of(undisturbed[0])
    assert_same(weights_of(task), undisturbed[1], tolerance=0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.drill
def test_a_worker_that_hangs_is_replaced(
    undisturbed: tuple[Path, dict[str, torch.Tensor]], training_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:  # fmt: skip
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "5")
    task = task_with_checkpoints(tmp_path, training_world)
    store, withheld = withhold(training_world)

    def harm() -> None:
        assert (workers := processes("TrainWorker"))
        for worker in workers:
            worker.suspend()
        give_back(store, withheld)

    hangs = when(lambda: stands_before_step_4(tmp_path), timed(record_property, tmp_path, harm, step=4))
    train(task, tmp_path)
    hangs.join()
    assert losses_of(tmp_path) == losses_of(undisturbed[0])
    assert_same(weights_of(task), undisturbed[1], tolerance=0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.drill
def test_a_controller_that_is_killed_ends_the_training_with_a_word_and_the_next_goes_on(
    undisturbed: tuple[Path, dict[str, torch.Tensor]], training_world: Path, tmp_path: Path, record_property: Record
) -> None:
    task = task_with_checkpoints(tmp_path, training_world)
    store, withheld = withhold(training_world)

    def harm() -> None:
        assert (controllers := processes("TrainController"))
        for controller in controllers:
            os.kill(controller.pid, signal.SIGKILL)

    killer = when(lambda: stands_before_step_4(tmp_path), timed(record_property, tmp_path, harm, step=4))
    with pytest.raises(TrainingFailed, match=r"^train: Ray Train's controller died \(The actor died unexpectedly"):
        train(task, tmp_path)
    give_back(store, withheld)
    train(task, tmp_path)
    killer.join()
    free_groups()
    assert losses_of(tmp_path) == losses_of(undisturbed[0])
    assert_same(weights_of(task), undisturbed[1], tolerance=0)


@pytest.mark.ray
@pytest.mark.slow
def test_a_list_of_checkpoints_that_was_cut_short_costs_no_step(
    undisturbed: tuple[Path, dict[str, torch.Tensor]], training_world: Path, tmp_path: Path
) -> None:
    """Ray Train writes it in place. What counts is found by the checkpoints' own checksums."""
    task, folder = task_with_checkpoints(tmp_path, training_world), tmp_path / "checkpoints" / "train"
    store, withheld = withhold(training_world)
    kept: list[str] = []

    def harm() -> None:
        for controller in processes("TrainController"):
            os.kill(controller.pid, signal.SIGKILL)
        whole = (folder / COUNTED).read_text()
        (folder / COUNTED).write_text(whole[: len(whole) // 2])
        kept.extend((tmp_path / "metrics" / "train.jsonl").read_text().splitlines())

    killer = when(lambda: stands_before_step_4(tmp_path), harm)
    with pytest.raises(TrainingFailed, match=r"^train: Ray Train's controller died"):
        train(task, tmp_path)
    killer.join()
    give_back(store, withheld)
    said = train(task, tmp_path)
    free_groups()
    assert f"{folder}: Ray Train's list of checkpoints was cut short; the latest that is whole counts" in said
    assert len(kept) == 3 and (tmp_path / "metrics" / "train.jsonl").read_text().splitlines()[:3] == kept
    assert len(list(folder.glob("checkpoint_2*"))) == 2, "those of before are gone too"
    assert losses_of(tmp_path) == losses_of(undisturbed[0])
    assert_same(weights_of(task), undisturbed[1], tolerance=0)


def stands_before_step_4(folder: Path) -> bool:
    """Whether Ray Train has taken up the checkpoint of step 3: it deletes that of step 1 then."""
    checkpoints = [path.parent for path in (folder / "checkpoints" / "train").glob("checkpoint_*/checksums-0.json")]
    try:
        return sorted(json.loads((one / "progress.json").read_text())["step"] for one in checkpoints) == [2, 3]
    except OSError:  # deleted meanwhile
        return False


def forbid_large_files() -> None:
    """Let the training worker write no file beyond 10,000 bytes, which a checkpoint has and the lines of its steps have not."""
    assert (workers := processes("TrainWorker"))
    for worker in workers:
        worker.rlimit(psutil.RLIMIT_FSIZE, (10_000, worker.rlimit(psutil.RLIMIT_FSIZE)[1]))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.drill)])
def test_an_error_on_one_rank_ends_the_training_with_its_words(
    local_ray: None, training_world: Path, tmp_path: Path, record_property: Record, count: int
) -> None:
    """The others wait for that rank in the next collective, where nothing but its timeout of half an hour would end them."""
    path, _ = scored_world(training_world, ROWS)
    rows = [ExampleFile(path)[position] for position in range(ROWS)]
    in_step_3 = rows[16:24]
    of_last_rank = layout_of(np.array([len(row.token_ids) for row in in_step_3]), count, TRAIN)[count - 1][0][0]
    old = in_step_3[of_last_rank]
    token_ids = old.token_ids.copy()
    token_ids[0] += 1
    rows[16 + of_last_rank] = Example(token_ids, old.loss_mask, example_key(token_ids, old.loss_mask), old.row)
    write_examples(tmp_path / "changed.arrow", rows)

    started = time.monotonic()
    task = task_in(tmp_path, training_world, examples=str(tmp_path / "changed.arrow"))
    with pytest.raises(TrainingFailed, match=rf"^ValueError: row {old.row} has key .* the store belongs to other data"):
        train_model(task, WorkersConfig(count=count, cpus=1), tmp_path / "checkpoints")
    record_property("seconds until the command ended", time.monotonic() - started)
    assert len(losses_of(tmp_path)) == 2 and not Path(str(task.output)).exists()
