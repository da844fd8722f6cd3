"""What Prometheus sees of a scoring and of a training, fetched from the port at which a real Ray exports it."""

import re
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.util.metrics import Gauge

from actors.config.models import TrainConfig
from actors.monitors import prometheus as live_metrics
from actors.monitors.metrics_log import read_metrics
from actors.monitors.prometheus import GPU, SERVICE, STUDENT, TEACHER, StudentMetrics, TeacherMetrics
from actors.student.loop import distil
from actors.student.train_checkpoints import NoCheckpoints
from actors.teacher.pool import TeacherPool
from losses.config import AtkdLoss
from tests.fakes import FakeTeacher, fake_examples, fake_spec, fake_store
from tests.orchestrator.training_world import task_in

PAGE = Path(__file__).parents[3] / "docs/observability.md"
PATIENCE_SECONDS = 60.0
Sample = tuple[str, dict[str, str], float]


def samples_of(text: str) -> list[Sample]:
    """Read Prometheus' text format: name, labels and value of each line."""
    found = re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    return [(name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)) for name, labels, value in found]


def exported(run: str, ready: Callable[[list[Sample]], bool]) -> list[Sample]:
    """Fetch what this Ray exports of a run, again and again until it is as awaited; return the last that was seen."""
    port = ray.nodes()[0]["MetricsExportPort"]
    end, found = time.monotonic() + PATIENCE_SECONDS, []
    while time.monotonic() < end and not ready(found):
        time.sleep(0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            found = [sample for sample in samples_of(page.read().decode()) if sample[1].get("run") == run]
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_ray_exports_what_student_teacher_and_service_show(local_ray: None, tmp_path: Path) -> None:
    train = TrainConfig(epochs=1, batch_rows=8, micro_batch_rows=8)
    task = replace(task_in(tmp_path, tmp_path / "world", train=train, loss=AtkdLoss(kind="atkd")), run="watched", output=None)
    distil(task, NoCheckpoints())

    examples = fake_examples(12)
    path, store = fake_store(tmp_path, examples, rows_per_shard=4, top_k=5)
    live = TeacherMetrics("watched")
    live.begin("train")
    with TeacherPool(fake_spec(replicas=1), engine_factory=FakeTeacher(), live=live) as pool:
        results = list(pool.score_missing(path, store))
        live.progress(3, 3, 123.5)
        shown = {one.exported_name: key for table in (STUDENT, TEACHER, SERVICE) for key, one in table.items()}
        with pool.serving() as service:
            service.score(examples[:5])
            found = exported("watched", lambda seen: {name for name, _, _ in seen} >= shown.keys())

    steps = read_metrics(tmp_path / "metrics" / "train.jsonl")
    last = steps[-1]
    student = {shown[name]: value for name, labels, value in found if labels["stage"] == "train"}
    expected = {**last, "hard_loss": last["loss"] - last["easy_loss"], "tokens": sum(step["tokens"] for step in steps)}
    expected["waited_seconds"] = sum(step["waited_seconds"] for step in steps)
    assert student == pytest.approx({key: expected[key] for key in STUDENT}, rel=1e-6, abs=1e-9)

    served = {shown[name]: value for name, labels, value in found if labels["stage"] == "serve"}
    assert served == {"waiting": 0, "held": 0, "replicas": 1, "scored": 5}

    teacher = {shown[name]: value for name, labels, value in found if labels["stage"] == "score_train"}
    last_shard = store.positions(results[-1].info.shard)
    uncertainties = np.concatenate([store.uncertainty_at(row) for row in last_shard])
    tails = np.concatenate([np.exp(store.scores_at(row).tail_logmass) for row in last_shard])
    assert teacher == pytest.approx(
        {
            "shards_done": 3, "shards_total": 3, "tokens_per_second": 123.5, "in_flight": 0, "held_mass": 1 - tails.mean(),
            "tokens": sum(len(example.token_ids) for example in examples),
            "uncertainty": uncertainties.mean(),
        },
        rel=1e-5,
    )  # fmt: skip
    assert {labels["replica"] for name, labels, _ in found if shown[name] == "in_flight"} == {"0"}


class Unwanted(Gauge):
    """A metric that cannot be made."""

    def __init__(self, *given: object, **more: object) -> None:
        raise AssertionError("made without a Ray")


def test_without_a_ray_nothing_is_made_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_metrics.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(live_metrics, "Gauge", Unwanted)
    student, teacher = StudentMetrics("r", "train"), TeacherMetrics("r")
    student.write(1, {"loss": 2.0, "easy_loss": 0.5})
    student.close()
    teacher.in_flight({0: 2})
    teacher.progress(1, 2, 3.0)


class Noted(Gauge):
    """A gauge that writes down what it is set to."""

    lines: list[tuple[str, float, dict[str, str]]] = []

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self._noted = name

    def set(self, value: float, tags: dict[str, str]) -> None:  # type: ignore[override]
        """Note it."""
        self.lines.append((self._noted, value, tags))


def test_a_replica_that_is_gone_holds_no_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_metrics.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(live_metrics, "Gauge", Noted)
    monkeypatch.setattr(Noted, "lines", [])
    teacher = TeacherMetrics("r")
    teacher.in_flight({0: 2, 1: 1})
    teacher.in_flight({1: 2})
    held = [(tags["replica"], value) for name, value, tags in Noted.lines if name == "atkd_teacher_shards_in_flight"]
    assert held == [("0", 2), ("1", 1), ("0", 0), ("1", 2)]


def test_names_say_whose_they_are_and_none_is_given_twice() -> None:
    names = [shown.name for shown in [*STUDENT.values(), *GPU.values(), *TEACHER.values(), *SERVICE.values()]]
    assert len(names) == len(set(names))
    assert all(name.startswith("atkd_") for name in names)


def test_the_page_has_every_metric_as_it_is_exported() -> None:
    rows = re.findall(r"^\| `(ray_\w+)` \| (\w+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    shown = [*STUDENT.values(), *GPU.values(), *TEACHER.values(), *SERVICE.values()]
    assert rows == [(one.exported_name, one.kind, one.description) for one in shown]
