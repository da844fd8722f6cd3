"""A run whose models are named as on the hub, against a hub on this machine; huggingface_hub and all that loads are real."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.config.model_kinds import ScratchModel
from actors.models import save_model, scratch_model
from orchestrator.config.data import BuiltinSource
from orchestrator.data.sources import read_rows
from orchestrator.data.tokenizers import train_tokenizer
from tests.fake_hub import FakeHub, fake_hub

pytestmark = [pytest.mark.slow, pytest.mark.ray]

RUN = [
    "tokenizer=null", "data.source.rows=60", "data.heldout_rows=8", "data.max_tokens=96", "scores.top_k=16",
    "scores.rows_per_shard=16", "teacher={model: {kind: pretrained, name: someone/teacher}}", "teacher.engine.kind=transformers",
    "teacher.engine.dtype=float32", "teacher.engine.replicas=2", "teacher.engine.cpus=0.5",
    "student={model: {kind: pretrained, name: someone/student}}", "workers.count=2", "workers.cpus=0.5", "train.epochs=1",
    "train.batch_rows=16", "evaluate.generate_rows=0", "evaluate.cpus=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    folder = tmp_path_factory.mktemp("hub")
    texts = [str(value) for row in read_rows(BuiltinSource(kind="builtin", rows=300), seed=0) for value in row.values()]
    tokenizer = train_tokenizer(texts, 400)
    for seed, (name, layers) in enumerate((("teacher", 2), ("student", 1))):
        shape = ScratchModel(kind="scratch", hidden_size=64, layers=layers, heads=2)
        save_model(scratch_model(shape, tokenizer, len(tokenizer), 256, seed), tokenizer, folder / name)
    with fake_hub({f"someone/{name}": folder / name for name in ("teacher", "student")}) as running:
        yield running


def run(output: Path, cache: Path, url: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    surroundings = {
        **os.environ, "HF_ENDPOINT": url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "orchestrator", "run", "configs/tiny_cpu.yaml", f"output={output}", *RUN, *overrides]
    return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(hub: FakeHub, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("output")
    done = run(output, cache, hub.url, "name=first")
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout


@pytest.mark.drill
def test_weights_come_once_for_two_replicas_and_two_workers_before_any_of_them_starts(
    hub: FakeHub, finished: tuple[Path, str]
) -> None:
    output, said = finished
    weights = [path for method, path in hub.asked if method == "GET" and path.endswith(".safetensors")]
    assert sorted(path.split("/")[2] for path in weights) == ["student", "teacher"]
    for role in ("teacher", "student"):
        fetching = f"{role}: fetching someone/{role} to the cache of 1 node"
        fetched = f"{role}: someone/{role} fetched to 1 node, "
        assert 0 < said.index(fetching) < said.index(fetched) < said.index("score: train complete")
    events = [json.loads(line) for line in (output / "first" / "events.jsonl").read_text().splitlines()]
    fetches = [event for event in events if event["event"] == "model_fetched"]
    assert [(event["role"], event["nodes"]) for event in fetches] == [("teacher", 1), ("student", 1)]
    assert all(event["bytes"] >= (hub.models[event["model"]] / "model.safetensors").stat().st_size for event in fetches)


@pytest.mark.drill
def test_a_cache_that_holds_the_models_is_not_filled_again(
    hub: FakeHub, cache: Path, finished: tuple[Path, str]
) -> None:
    hub.asked.clear()
    again = run(finished[0], cache, hub.url, "name=second")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "fetching" not in again.stdout
    assert [path for method, path in hub.asked if method == "GET" and path.endswith(".safetensors")] == []


def test_weights_that_nobody_can_fetch_end_the_run_with_the_key_and_a_way_out(
    hub: FakeHub, tmp_path: Path, finished: tuple[Path, str]
) -> None:
    weights = hub.models["someone/student"] / "model.safetensors"
    hidden = weights.rename(weights.with_suffix(".away"))
    try:
        failed = run(tmp_path / "output", tmp_path / "cache", hub.url, "name=third")
    finally:
        hidden.rename(weights)
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "student.model.name 'someone/student' is not in the cache of every node, and could not be fetched" in failed.stderr
    assert "it has no model.safetensors, and no other weights are read" in failed.stderr
    assert "a folder that all nodes see (student.model.name=/a/folder) would do" in failed.stderr
