"""A run that is ended, and whose latest checkpoint is harmed, where checkpoints stand in object storage behind a bad line."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from actors.config.places import in_object_storage, within
from actors.monitors.metrics_log import read_metrics
from actors.storage.folder import Folder, open_folder
from actors.student.train_checkpoints import damaged_checkpoints
from tests.integration.test_run import begun, command
from tests.s3_world import BUCKET, Faults, faulty_storage, s3_server

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SETTINGS = (
    "teacher.engine.kind=transformers", "train.epochs=3", "train.checkpoint_every_steps=2", "workers={count: 2, cpus: 1}",
)  # fmt: skip
ELSEWHERE = f"checkpoints=s3://{BUCKET}/checkpoints"


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    folder = tmp_path_factory.mktemp("storage")
    with s3_server(folder) as endpoint, faulty_storage(folder, endpoint) as faults:
        yield faults


def trained(output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Do what is left of a run up to its training."""
    arguments = ["train" if word == "run" else word for word in command(output, *overrides, *SETTINGS)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=600)


def harm_latest(training: Folder) -> str:
    """Change a byte of the latest checkpoint that counts; return its name."""
    counted = training.read("checkpoint_manager_snapshot.json").decode()
    latest = [name for name in training.folders() if name in counted][-1]
    folder = open_folder(within(training.place, latest))
    weights = next(name for name in folder.names() if name.endswith(".safetensors"))
    content = bytearray(folder.read(weights))
    content[len(content) // 2] ^= 1
    folder.write(weights, bytes(content))
    return latest


@pytest.mark.drill
def test_a_run_resumes_from_the_whole_one_before_and_learns_the_same(faults: Faults, tmp_path: Path) -> None:
    scores = f"scores.root={tmp_path / 'scores'}"
    undisturbed = trained(tmp_path / "disk", scores)
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]

    output = tmp_path / "storage"
    run = output / "tiny_cpu"
    first = begun(output, run / "metrics" / "train.jsonl", 9, scores, ELSEWHERE, *SETTINGS)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    assert first.returncode != 0 and not (run / "student").exists()
    place = json.loads((run / "checkpoints.json").read_text())["place"]
    assert in_object_storage(place) and not (run / "checkpoints").exists()
    training = open_folder(within(place, "train"))
    harmed = harm_latest(training)

    faults.slow_down, faults.cut_uploads, faults.cut_answers = 3, 3, 1
    second = trained(output, scores, ELSEWHERE)
    assert second.returncode == 0, second.stderr[-3000:]
    assert (faults.slow_down, faults.cut_uploads, faults.cut_answers) == (0, 0, 0), "the line was as bad as it should be"
    (damage,) = damaged_checkpoints(training)
    assert damage.startswith(f"{harmed}: ") and damage.endswith(".safetensors is not as it was written")
    assert "a checkpoint was damaged and passed over" in second.stderr
    left = [name for name in training.folders() if name.startswith("checkpoint_")]
    assert len(left) == 2 and harmed not in left, "as many are kept as train.keep_checkpoints says"

    on_disk = tmp_path / "disk" / "tiny_cpu"
    ours, theirs = (read_metrics(folder / "metrics" / "train.jsonl") for folder in (run, on_disk))
    assert [step["loss"] for step in ours] == [step["loss"] for step in theirs]
    weights, expected = (load_file(folder / "student" / "model.safetensors") for folder in (run, on_disk))
    assert weights.keys() == expected.keys() and all((weights[name] == expected[name]).all() for name in expected)


def test_storage_that_cannot_be_written_is_told_before_anything_starts(faults: Faults, tmp_path: Path) -> None:
    failed = trained(tmp_path, "checkpoints=s3://no-such-bucket/checkpoints")
    assert failed.returncode == 2
    assert "s3://no-such-bucket/checkpoints: cannot write" in failed.stderr and "there is no such bucket" in failed.stderr
