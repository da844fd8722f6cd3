"""Where else the steps of a training go: Weights & Biases and MLflow, as stand-ins that record and, where installed, for real."""

import importlib
import json
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from actors.config.models import TrainConfig
from actors.config.tracking import MlflowConfig, TrackerFailed, TrackingConfig, WandbConfig, require_installed
from actors.model_source import ModelSource
from actors.monitors.metrics_log import MetricsLog, NoLog, read_metrics
from actors.student.ranks import Worker
from actors.student.task import TrainingTask
from losses.config import HardLabelLoss

STEPS = {1: {"loss": 3.0, "gradient_norm": 0.5}, 2: {"loss": 2.5, "gradient_norm": 0.25}}
OURS = ("actors.monitors.wandb", "actors.monitors.mlflow")
WANDB = TrackingConfig(tensorboard=False, wandb=WandbConfig(project="p", mode="offline"))


def task_in(folder: Path, tracking: TrackingConfig) -> TrainingTask:
    return TrainingTask(
        name="train", model=ModelSource("none"), tokenizer="none", lora=None, loss=HardLabelLoss(kind="hard_label"),
        train=TrainConfig(), examples="none", store=None, top_k=8, wait_seconds=1.0, seed=7, threads=1, gpu=False,
        metrics=str(folder), output=None, run="watched", tracking=tracking,
    )  # fmt: skip


def worker(rank: int) -> Worker:
    return Worker(rank=rank, world_size=2, device=torch.device("cpu"))


def write_steps(folder: Path, tracking: TrackingConfig, first_step: int = 1, rank: int = 0) -> None:
    log = MetricsLog.on_first_worker(rank, task_in(folder, tracking), first_step)
    for step, values in STEPS.items():
        if step >= first_step:
            log.write(step, values)
    log.close()


class Recorder:
    """Remembers every call by name, and answers as the libraries would."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails = ""

    def named(self, name: str) -> list[dict[str, Any]]:
        return [given for called, given in self.calls if called == name]

    def note(self, name: str, /, **given: Any) -> None:
        self.calls.append((name, given))


def stand_in(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, loader=None)
    for key, value in contents.items():
        setattr(module, key, value)
    return module


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Stand-ins for both libraries, with the signatures of wandb 0.31 and mlflow 3.17 as far as they are used."""
    book = Recorder()

    class WandbError(Exception):
        pass

    class Run:
        def __init__(self, id: str) -> None:
            self.id = id

        def log(self, data: dict[str, Any], step: int | None = None) -> None:
            book.note("log", data=data, step=step)

        def finish(self) -> None:
            book.note("finish")

    def init(*, project: str, entity: str | None, mode: str, dir: str, group: str, name: str, id: str | None, resume: str,
             config: dict[str, Any], reinit: str, settings: Any) -> Run:  # fmt: skip
        book.note("init", project=project, mode=mode, group=group, name=name, id=id, resume=resume, config=config)
        if book.fails:
            raise WandbError(book.fails)
        return Run(id or "made-here")

    class MlflowException(Exception):
        pass

    class Client:
        def __init__(self, tracking_uri: str) -> None:
            book.note("client", uri=tracking_uri)

        def get_experiment_by_name(self, name: str) -> Any:
            made_by_another = book.fails == "raced" and book.named("create_experiment")
            return SimpleNamespace(experiment_id="experiment 3") if made_by_another else None

        def create_experiment(self, name: str) -> str:
            book.note("create_experiment", name=name)
            if book.fails == "raced":
                raise MlflowException("it is there already")
            return "experiment 4"

        def create_run(self, experiment_id: str, run_name: str, tags: dict[str, str]) -> Any:
            book.note("create_run", experiment_id=experiment_id, run_name=run_name, tags=tags)
            if book.fails == "create":
                raise MlflowException("no route to host")
            return SimpleNamespace(info=SimpleNamespace(run_id="run5"))

        def update_run(self, run_id: str, status: str) -> None:
            book.note("update_run", run_id=run_id, status=status)

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), synchronous: bool = True) -> Any:
            book.note("log_batch", run_id=run_id, metrics=list(metrics), params=list(params))
            return SimpleNamespace(wait=self._wait)

        def _wait(self) -> None:
            if book.fails == "later":
                raise MlflowException("gone away")

        def set_terminated(self, run_id: str) -> None:
            book.note("set_terminated", run_id=run_id)

    modules = [
        stand_in("wandb", init=init, Error=WandbError, Settings=lambda **given: given),
        stand_in("mlflow", MlflowClient=Client),
        stand_in("mlflow.entities", Metric=lambda *given: given, Param=lambda *given: given),
        stand_in("mlflow.exceptions", MlflowException=MlflowException),
    ]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield book
    for name in OURS:
        sys.modules.pop(name, None)  # they know the stand-ins


def test_wandb_gets_each_step_and_a_restarted_training_goes_on_in_the_same_run(recorder: Recorder, tmp_path: Path) -> None:
    write_steps(tmp_path, WANDB)
    write_steps(tmp_path, WANDB, first_step=2)
    first, second = recorder.named("init")
    assert (first["project"], first["mode"], first["group"], first["name"]) == ("p", "offline", "watched", "watched/train")
    assert (first["id"], second["id"], second["resume"]) == (None, "made-here", "allow")
    assert json.loads(first["config"]["loss"])["kind"] == "hard_label" and first["config"]["seed"] == 7
    assert recorder.named("log") == [{"data": STEPS[step], "step": step} for step in (1, 2, 2)]
    assert len(recorder.named("finish")) == 2


def test_mlflow_gets_each_number_and_a_restarted_training_goes_on_in_the_same_run(recorder: Recorder, tmp_path: Path) -> None:
    tracking = TrackingConfig(tensorboard=False, mlflow=MlflowConfig(uri="http://host:5000", experiment="e"))
    write_steps(tmp_path, tracking)
    write_steps(tmp_path, tracking, first_step=2)
    assert recorder.named("client") == [{"uri": "http://host:5000"}] * 2
    assert recorder.named("create_experiment") == [{"name": "e"}]
    assert recorder.named("create_run") == [
        {"experiment_id": "experiment 4", "run_name": "watched/train", "tags": {"run": "watched"}}
    ]
    assert recorder.named("update_run") == [{"run_id": "run5", "status": "RUNNING"}]
    sent = [metric for batch in recorder.named("log_batch") for metric in batch["metrics"]]
    assert [(name, value, step) for name, value, _, step in sent] == [
        (name, value, step) for step in (1, 2, 2) for name, value in STEPS[step].items()
    ]
    assert len(recorder.named("set_terminated")) == 2


def test_two_trials_that_make_the_experiment_at_once_share_it(recorder: Recorder, tmp_path: Path) -> None:
    recorder.fails = "raced"
    write_steps(tmp_path, TrackingConfig(mlflow=MlflowConfig(uri="http://host:5000")))
    assert recorder.named("create_run")[0]["experiment_id"] == "experiment 3"


def test_mlflow_is_given_no_more_than_it_takes_at_once(recorder: Recorder, tmp_path: Path) -> None:
    tracking = TrackingConfig(tensorboard=False, mlflow=MlflowConfig(uri="http://host:5000"))
    log = MetricsLog.on_first_worker(0, task_in(tmp_path, tracking), 1)
    for step in range(1, 301):
        log.write(step, {f"m{index}": float(step) for index in range(7)})
    log.close()
    sizes = [len(batch["metrics"]) for batch in recorder.named("log_batch")]
    assert sum(sizes) == 2100 and max(sizes) <= 1000


def test_mlflow_that_goes_away_later_does_not_end_the_training(
    recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder.fails = "later"
    write_steps(tmp_path, TrackingConfig(mlflow=MlflowConfig(uri="http://host:5000")))
    assert "tracking.mlflow: not all steps arrived: gone away" in capsys.readouterr().err
    assert [line["loss"] for line in read_metrics(tmp_path / "train.jsonl")] == [3.0, 2.5]


def test_a_tracker_that_cannot_be_reached_at_the_start_is_named(recorder: Recorder, tmp_path: Path) -> None:
    recorder.fails = "create"
    with pytest.raises(TrackerFailed, match="tracking.mlflow at http://host:5000: no route to host; tracking.mlflow=null"):
        write_steps(tmp_path, TrackingConfig(mlflow=MlflowConfig(uri="http://host:5000")))
    recorder.fails = "no key"
    with pytest.raises(TrackerFailed, match="tracking.wandb: no key; mode offline, or tracking.wandb=null would do"):
        write_steps(tmp_path, WANDB)


def test_only_the_first_worker_writes(recorder: Recorder, tmp_path: Path) -> None:
    log = MetricsLog.on_first_worker(1, task_in(tmp_path, WANDB), 1)
    assert isinstance(log, NoLog)
    assert recorder.calls == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wanted", [True, False])
def test_tensorboard_can_be_left_out_and_the_lines_are_always_written(tmp_path: Path, wanted: bool) -> None:
    write_steps(tmp_path, TrackingConfig(tensorboard=wanted))
    assert bool(list(tmp_path.glob("tensorboard/train/events.*"))) == wanted
    assert [line["step"] for line in read_metrics(tmp_path / "train.jsonl")] == [1, 2]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.config.tracking.find_spec", lambda name: None)
    asked = {"wandb": {"project": "p"}, "mlflow": {"uri": "http://host:5000"}}
    with pytest.raises(ValueError, match=rf"tracking.{name} is set, but {name} is not installed: pip install '.\[{name}\]'"):
        require_installed(TrackingConfig.model_validate({name: asked[name]}))
    require_installed(TrackingConfig())


@pytest.mark.parametrize("uri", ["mlruns", "sqlite:///mlflow.db"])
def test_a_store_whose_place_depends_on_the_worker_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="is relative, and workers stand in folders of their own; http://host:5000"):
        MlflowConfig(uri=uri)


def test_the_real_wandb_keeps_two_starts_of_a_training_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    importlib.import_module("actors.monitors.wandb")
    write_steps(tmp_path, WANDB)
    write_steps(tmp_path, WANDB, first_step=2)
    kept = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert kept and all((tmp_path / "train.wandb").read_text() in path.name for path in kept)


def test_the_real_mlflow_has_every_step_in_one_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking = TrackingConfig(mlflow=MlflowConfig(uri=uri, experiment="e"))
    write_steps(tmp_path / "metrics", tracking)
    write_steps(tmp_path / "metrics", tracking, first_step=2)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["seed"]) == ("watched/train", "FINISHED", "7")
    history = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(history) == [(1, 3.0), (2, 2.5), (2, 2.5)]
