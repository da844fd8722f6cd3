"""``ray job submit`` on a head of our own: a run is stopped while it trains, submitted again and ends; nothing is left."""

import json
import random
import re
import secrets
import subprocess
import sys
import urllib.error
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import Whitespace

from actors.monitors.metrics_log import read_metrics
from tests.ray_heads import ROOT, LMHead, head, wait_until
from tests.recovery import Record, record_until
from tests.worlds import VOCAB, tiny_llama, word_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.ray]

STEPS_BETWEEN, CHECKPOINTS = 5, 20
RAYS_OWN = {"_AutoscalingCoordinatorActor"}  # of Ray Train, one for a cluster and for ever


@pytest.fixture
def guarded_head() -> Iterator[LMHead]:
    """A head that asks for a token."""
    with head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)) as running:
        yield running


@pytest.fixture(scope="module")
def open_head() -> Iterator[LMHead]:
    """A head that asks for none."""
    with head(RAY_AUTH_MODE="disabled") as running:
        yield running


def small_run(folder: Path) -> Path:
    """Write two models, rows of words and a configuration that trains for a hundred steps; return its path."""
    for seed, name in enumerate(("teacher", "student"), start=1):
        tiny_llama(folder / name, seed=seed, hidden_size=32, layers=2, tied=False)
        tokenizer = word_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save_pretrained(folder / name)
    words, lines = random.Random(3), []
    for _ in range(48):
        prompt, response = (" ".join(f"w{words.randrange(2, VOCAB)}" for _ in range(length)) for length in (5, 8))
        lines.append(json.dumps({"instruction": prompt, "response": response}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    config = {
        "name": "small", "output": str(folder / "runs"),
        "data": {
            "source": {"kind": "files", "path": str(folder / "rows.jsonl")}, "heldout_rows": 8,
            "format": {"kind": "instruction", "prompt": "{{ instruction }} "},
        },
        "teacher": {
            "model": {"kind": "pretrained", "name": str(folder / "teacher")},
            "engine": {"kind": "transformers", "dtype": "float32"},
        },
        "scores": {"top_k": 8, "rows_per_shard": 16},
        "student": {"model": {"kind": "pretrained", "name": str(folder / "student")}},
        "train": {
            "batch_rows": 8, "micro_batch_rows": 8, "checkpoint_every_steps": STEPS_BETWEEN,
            "epochs": STEPS_BETWEEN * CHECKPOINTS / (40 / 8),
        },
        "workers": {"labels": {"role": "student"}, "resources": {"student_node": 1}},
        "evaluate": {"batch_rows": 8, "generate_rows": 0},
    }  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def last_checkpoint(run: Path) -> Path | None:
    """The folder of the last checkpoint that Ray Train counts."""
    book = run / "checkpoints" / "train" / "checkpoint_manager_snapshot.json"
    try:
        latest = json.loads(book.read_text())["latest_checkpoint_result"]
    except (FileNotFoundError, ValueError):  # not there, or being written
        return None
    return book.parent / latest["checkpoint_dir_name"] if latest else None


def read_checkpoint(checkpoint: Path) -> int:
    """Read every tensor of a checkpoint; return its step."""
    tensors = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert {name.partition(".")[0] for name in tensors} >= {"student", "optimizer"}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    step: int = json.loads((checkpoint / "progress.json").read_text())["step"]
    return step


def assert_readable(lines: list[str]) -> None:
    """Nothing of Ray's or a worker's among them, and of each kind of progress at most a line a second."""
    noise = re.compile(r"\bpid=|ray::|Traceback|\bWARN|\bINFO\b|\*\*\* SIG|logging\.cc|\d+%\|")
    assert [line for line in lines if noise.search(line)] == []
    said: dict[str, list[float]] = {}
    for line in lines:
        if found := re.match(r"\[ *([\d.]+) s\] (train: step|score: \w+ shard|score: \w+ waits) ", line):
            said.setdefault(found[2], []).append(float(found[1]))
    assert all(later - sooner >= 1 for times in said.values() for sooner, later in zip(times, times[1:], strict=False))
    assert len(lines) < 60


def test_a_submitted_run_is_stopped_and_submitted_again_and_ends(
    guarded_head: LMHead, tmp_path: Path, record_property: Record
) -> None:
    config, run = small_run(tmp_path), tmp_path / "runs" / "small"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        guarded_head.ask("/api/jobs/", token="somebody")

    # Ray Train takes a checkpoint at each look at its workers: with three seconds between looks, twenty of them outlast the stop.
    first = guarded_head.submit(
        "first", "run", str(config), RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="3", RAY_JOB_STOP_WAIT_TIME_S="120"
    )
    scored = run / "stages" / "score.json"
    wait_until(lambda: scored.exists() and last_checkpoint(run), 300, "no checkpoint comes", first)
    guarded_head.stop("first")
    output, _ = first.communicate(timeout=60)
    assert guarded_head.job("first")["status"] == "STOPPED", output
    said = guarded_head.said("first")
    assert said[-2:] == [
        "error: terminated; the same command resumes where it stopped", f"the traceback is in {run / 'error.log'}"
    ]  # fmt: skip
    assert_readable(said)
    assert all(line.startswith("[") for line in said[:-2])
    wait_until(lambda: set(guarded_head.left()) <= RAYS_OWN, 60, "actors or placement groups are not gone")
    kept = last_checkpoint(run)
    assert kept is not None
    step = read_checkpoint(kept)
    assert 0 < step < STEPS_BETWEEN * CHECKPOINTS
    metrics = run / "metrics" / "train.jsonl"
    logged = read_metrics(metrics)
    done = logged[:step]

    second = guarded_head.submit("second", "run", str(config), RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2")
    record_until(record_property, lambda: len(read_metrics(metrics)) > len(logged) or second.poll() is not None)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0, output
    assert guarded_head.job("second")["status"] == "SUCCEEDED"
    assert_readable(guarded_head.said("second"))
    assert (run / "student" / "model.safetensors").exists() and (run / "report.html").exists()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    times = Counter(event["stage"] for event in events if event["event"] == "stage_finished")
    assert times == Counter(["prepare", "score", "train", "evaluate", "export"])
    assert "score: done before" in output and "train: done before" not in output
    steps = read_metrics(metrics)
    assert [one["step"] for one in steps] == list(range(1, STEPS_BETWEEN * CHECKPOINTS + 1))
    assert steps[:step] == done  # their seconds too: none was taken twice

    token = guarded_head.environment["RAY_AUTH_TOKEN"].encode()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and [path for path in files if token in path.read_bytes()] == []
    assert token.decode() not in output + "".join(said)


def test_a_job_that_asks_for_what_cannot_be_fails_with_the_word_of_the_command_line(open_head: LMHead) -> None:
    job = open_head.submit("wrong", "run", "configs/tiny_cpu.yaml", "loss.easy_ration=0.3")
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 1
    found = open_head.job("wrong")
    assert (found["status"], found["driver_exit_code"]) == ("FAILED", 2)
    assert len(open_head.said("wrong")) < 4 and "loss.easy_ration" in output and "easy_ratio" in output


ASK_FOR_RAY = """
import ray
from orchestrator.config.load import load_config
from orchestrator.cluster.ray_session import ray_for
with ray_for(load_config("configs/tiny_cpu.yaml", ["output={output}", "evaluate.cpus=31"])):
    print(ray.get_runtime_context().gcs_address, ray.cluster_resources()["CPU"])
assert not ray.is_initialized()
"""


def test_without_an_address_a_neighbours_ray_is_left_alone(open_head: LMHead, tmp_path: Path) -> None:
    """The private Ray is another one, and as large as the configuration asks."""
    words = [sys.executable, "-c", ASK_FOR_RAY.format(output=tmp_path)]
    asked = subprocess.run(words, cwd=ROOT, env=open_head.environment, capture_output=True, text=True, timeout=300)
    assert asked.returncode == 0, asked.stderr
    address, cpus = asked.stdout.split()
    assert int(address.rpartition(":")[2]) != open_head.port and cpus == "31.0"
    assert open_head.ask("/api/jobs/") is not None
