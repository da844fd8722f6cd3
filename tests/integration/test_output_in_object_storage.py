"""Runs in object storage on clusters whose nodes share no disk: real Ray Train, real servers, and a machine that is lost."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from actors.score_store.rollout_log import RolloutLog
from actors.storage.object_folder import ObjectFolder
from orchestrator.config.load import dump_config
from tests.cloud_world import azure_place, google_place
from tests.integration.test_rollouts import TINY as TINY_ROLLOUTS
from tests.integration.test_run import TINY
from tests.orchestrator.search.test_compare_teachers import config_of
from tests.ray_heads import end
from tests.s3_world import BUCKET, KEYS, environment, s3_server
from tests.separate_disks import CAN, DiskCluster, disk_cluster

pytestmark = [
    pytest.mark.slow, pytest.mark.ray, pytest.mark.skipif(not CAN, reason="views of the disk need the rights of root"),
]  # fmt: skip

SETTINGS = {"ATKD_CACHE_GIB": "1", "RAY_worker_niceness": "0"}
COMMAND = [
    "configs/tiny_cpu.yaml", *TINY, "teacher.engine.kind=transformers", "train.epochs=24", "train.checkpoint_every_steps=12",
    "scores.overlap=false",
]


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[str]:
    """Where runs are put, in S3."""
    with s3_server(tmp_path) as endpoint, environment({**KEYS, **SETTINGS, "AWS_ENDPOINT_URL": endpoint}):
        yield f"s3://{BUCKET}/runs"


@pytest.fixture(params=["s3", pytest.param("gs", marks=pytest.mark.drill), pytest.param("abfs", marks=pytest.mark.drill)])
def runs_anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The same in each kind of object storage."""
    if request.param == "s3":
        yield request.getfixturevalue("runs")
        return
    place, name = (google_place, "google") if request.param == "gs" else (azure_place, "azure")
    with environment({**request.getfixturevalue(name), **SETTINGS}):
        yield place(f"runs/{tmp_path.name}")


def finished(begun: "subprocess.Popen[str]") -> str:
    """Wait for the end of a command, and return what it said."""
    said, _ = begun.communicate(timeout=500)
    assert begun.returncode == 0, said[-4000:]
    return said


def steps_put(run: str) -> list[int]:
    """The steps of the training whose metrics stand in the storage."""
    try:
        lines = ObjectFolder(run).read("metrics/train.jsonl").decode().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def lose(cluster: DiskCluster, command: "subprocess.Popen[str]") -> None:
    """Kill a command and all nodes at once."""
    for process in (psutil.Process(command.pid), *(node.process for node in cluster.nodes)):
        end(process)
    command.wait()


def test_a_run_goes_on_on_machines_that_have_nothing_of_it(runs_anywhere: str, tmp_path: Path) -> None:
    command_line, run = [*COMMAND, f"output={runs_anywhere}"], f"{runs_anywhere}/tiny_cpu"
    with disk_cluster(tmp_path / "cache") as cluster:
        worker = cluster.add_node()
        command = cluster.begin("run", *command_line)
        deadline = time.monotonic() + 400
        while max(steps_put(run), default=0) < 12:
            assert command.poll() is None and time.monotonic() < deadline, command.communicate()[0][-4000:]
            time.sleep(0.5)
        assert not list((tmp_path / "cache").iterdir()), "each node sees a disk of its own"
        assert {path.rpartition("/")[2] for path in worker.files()} >= {"train.arrow", "config.yaml", "train.jsonl"}
        lose(cluster, command)
    before = steps_put(run)

    with disk_cluster(tmp_path / "cache") as cluster:
        cluster.add_node()
        said = finished(cluster.begin("run", *command_line))
        for stage in ("prepare", "finetune_teacher", "score"):
            assert f"{stage}: done before" in said
        assert f"report: {run}/report.html" in said and f"student: {run}/student" in said
        steps = steps_put(run)
        assert steps == list(range(1, len(steps) + 1)) and len(steps) > len(before), "no step is missing, none twice"
        there = ObjectFolder(run).files()
        assert {"report.html", "table.json", "student/model.safetensors", "stages/export.json", "config.yaml"} <= there.keys()
        assert not [name for name in there if name.endswith((".tmp", "lock", ".coming")) or name.startswith("driver/")]

        space = "tune.space={loss.easy_ratio: [0.3, 0.6]}"
        said = finished(cluster.begin(
            "tune", *command_line, space, "tune.search=grid", "tune.trials=null", "tune.scheduler=none", "tune.rungs=1",
            "tune.trials_in=ray_train",
        ))  # fmt: skip
        assert "2 completed" in said and f"report: {run}/tune/report.html" in said
        there = ObjectFolder(run).files()
        assert {"tune/ledger.jsonl", "tune/best.yaml", "tune/trials/0001/trial_0001.jsonl"} <= there.keys()
        assert not [name for name in there if "/checkpoints/" in name and name.startswith("tune/")]
        assert not [name for name in there if "ray_tune" in name]


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.drill)])
def test_a_student_writes_its_rows_on_another_node(runs: str, tmp_path: Path, killed: bool) -> None:
    engine = "{kind: transformers, dtype: float32, cpus: 0.6}"  # beside whom there is no room for the worker on a node of one CPU
    line = [
        "configs/tiny_cpu.yaml", *TINY_ROLLOUTS, f"rollouts={{max_new_tokens: 12, lag: 1, refresh_steps: 2, engine: {engine}}}",
    ]  # fmt: skip
    run, there = f"{runs}/tiny_cpu", [*line, f"output={runs}"]
    if killed:
        with disk_cluster(tmp_path / "cache") as cluster:
            cluster.add_node(cpus=1), cluster.add_node(cpus=1)
            command = cluster.begin("run", *there)
            deadline = time.monotonic() + 400
            while ObjectFolder(f"{run}/rollouts/log").size("shard-00005.json") is None:  # of step 6
                assert command.poll() is None and time.monotonic() < deadline, command.communicate()[0][-4000:]
                time.sleep(0.2)
            lose(cluster, command)
        assert len(RolloutLog(f"{run}/rollouts/log").steps_there()) < 10, "there is something left to do"

    with disk_cluster(tmp_path / "cache") as cluster:
        nodes = [cluster.add_node(cpus=1), cluster.add_node(cpus=1)]
        said = finished(cluster.begin("run", *there))
        assert ("score: done before" in said) == killed and f"report: {run}/report.html" in said
        for node in nodes:  # one took weights there, the other from there
            assert not [path for path in node.files() if path.startswith("weights/")], "copies go with the training"
    storage, log = ObjectFolder(run), RolloutLog(f"{run}/rollouts/log")
    assert log.steps_there() == {*range(1, 13)}
    assert [log.sampled(step)[0].weights_step for step in range(1, 13)] == [0, 0, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
    assert "<h3>Step 12</h3>" in storage.read("report.html").decode()
    assert not [name for name in storage.files() if name.startswith("rollouts/weights/")]
    if killed:
        require_as_on_a_disk(storage, log, line, tmp_path / "disk")


def require_as_on_a_disk(storage: ObjectFolder, log: RolloutLog, line: Sequence[str], output: Path) -> None:
    """Compare what a run left with what it leaves on a disk that all see, undisturbed: byte for byte."""
    words = [sys.executable, "-m", "orchestrator", "run", *line, f"output={output}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    folder = output / "tiny_cpu"
    assert storage.read("student/model.safetensors") == (folder / "student" / "model.safetensors").read_bytes()
    other = RolloutLog(folder / "rollouts" / "log")
    for step in range(1, 13):
        assert log.examples(step).tokens_hash == other.examples(step).tokens_hash


@pytest.mark.drill
def test_doctor_and_plan_measure_on_other_nodes(runs: str, tmp_path: Path) -> None:
    line = [*COMMAND, f"output={runs}"]
    with disk_cluster(tmp_path / "cache") as cluster:
        nodes = [cluster.add_node(cpus=1), cluster.add_node(cpus=1)]
        said = finished(cluster.begin("plan", *line, "--probe"))
        assert "measured now on one replica and one worker" in said
        said = finished(cluster.begin("doctor", *line))
        assert "\nok served: " in said and "\nok export: " in said and "\nFAILED" not in said, said
        assert not [path for node in nodes for path in node.files() if "/doctor-" in path or "/plan-" in path]
    assert not [name for name in ObjectFolder(runs).files() if ".tmp/" in name]


@pytest.mark.drill
def test_a_training_goes_on_when_the_node_of_its_worker_is_lost(runs: str, tmp_path: Path) -> None:
    command_line, run = [*COMMAND, f"output={runs}"], f"{runs}/tiny_cpu"
    with disk_cluster(tmp_path / "cache") as cluster:
        lost = cluster.add_node()
        command = cluster.begin("run", *command_line)
        deadline = time.monotonic() + 400
        while max(steps_put(run), default=0) < 12:
            assert command.poll() is None and time.monotonic() < deadline, command.communicate()[0][-4000:]
            time.sleep(0.5)
        cluster.lose_node(lost)
        other = cluster.add_node()
        said = finished(command)
        assert "train: done in" in said and f"report: {run}/report.html" in said
        steps = steps_put(run)
        assert steps == list(range(1, len(steps) + 1)), "no step is missing, none twice"
        here = {path.rpartition("/runs/tiny_cpu/")[2] for path in other.files()}
        assert {"student/model.safetensors", "metrics/train.jsonl", "data/train.arrow"} <= here


@pytest.mark.drill
def test_a_comparison_of_teachers_stands_there_a_run_within_a_run(runs: str, tmp_path: Path) -> None:
    config = config_of(tmp_path).model_copy(update={"output": runs})
    (tmp_path / "sizes.yaml").write_text(dump_config(config))
    words = [sys.executable, "-m", "orchestrator", "compare", str(tmp_path / "sizes.yaml")]
    said = []
    for node in ("one", "another"):
        with environment({"ATKD_CACHE": str(tmp_path / node), "ATKD_CACHE_GIB": "1"}):
            done = subprocess.run(words, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-4000:]
        said.append(done.stdout)
    there = ObjectFolder(f"{runs}/sizes").files()
    assert {"compare/teachers.parquet", "compare/report.html", "compare/large/stages/score.json"} <= there.keys()
    assert "compare/small/compare/ledger.jsonl" in there and f"report: {runs}/sizes/compare/report.html" in said[0]
    assert "small: compare: resumes with 4 trials done and 0 to start again" in said[1] and "trials of" not in said[1]
