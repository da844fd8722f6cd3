"""Models of the hub on the nodes of a cluster, fetched from a hub on this machine by huggingface_hub itself."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.config.models import EngineConfig, EvaluateConfig
from actors.config.workers import WorkersConfig
from actors.model_cache.hub import is_whole
from actors.model_cache.nodes import nodes_for
from actors.placement import Node, evaluator_need, replica_request, worker_request
from tests.fake_hub import FakeHub, fake_hub
from tests.worlds import tiny_llama

NAME = "someone/tiny"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    folder = tiny_llama(tmp_path / "tiny", seed=1)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_tiny.py").write_text("raise SystemExit\n")
    (folder / "consolidated.safetensors").write_bytes(b"the same once more")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"for another program")
    with fake_hub({NAME: folder}) as running:
        yield running


def world(hub: FakeHub, cache: Path, *words: object, url: str | None = None) -> Any:
    """Run ``tests.actors.model_cache.hub_world`` against the hub."""
    surroundings = {
        **os.environ, "HF_ENDPOINT": url or hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.actors.model_cache.hub_world", *map(str, words)]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_a_model_is_loaded_from_is_fetched_and_found_again_without_a_request(hub: FakeHub, tmp_path: Path) -> None:
    first = world(hub, tmp_path / "cache", "alone", NAME)
    assert (first["before"], first["after"], first["of another commit"]) == (False, True, False)
    contents = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    sizes = {name: (hub.models[NAME] / name).stat().st_size for name in contents}
    assert first["fetched"]["bytes"] == sum(sizes.values()) and first["progress"] == [sum(sizes.values())] * 2
    (snapshot,) = (tmp_path / "cache").glob("models--*/snapshots/*")
    assert {path.name for path in snapshot.rglob("*")} == contents
    assert hub.fetched("model.safetensors") == 1

    hub.asked.clear()
    again = world(hub, tmp_path / "cache", "alone", NAME, url="http://127.0.0.1:9")
    assert again["before"] is True and hub.asked == [] and "of another commit" in again


def test_a_snapshot_without_its_weights_is_not_whole(hub: FakeHub, tmp_path: Path) -> None:
    world(hub, tmp_path / "cache", "alone", NAME)
    (snapshot,) = (tmp_path / "cache").glob("models--*/snapshots/*")
    (snapshot / "model.safetensors").unlink()
    again = world(hub, tmp_path / "cache", "alone", NAME)
    assert (again["before"], again["after"]) == (False, True)


@pytest.mark.parametrize(
    ("name", "url", "said"),
    [
        ("nobody/has-this", None, "RepositoryNotFoundError: "),
        (NAME, "http://127.0.0.1:9", "LocalEntryNotFoundError: "),
        ("someone/pickled", None, "it has no model.safetensors, and no other weights are read"),
    ],
)
def test_why_a_model_cannot_be_fetched_is_said(hub: FakeHub, tmp_path: Path, name: str, url: str | None, said: str) -> None:
    hub.models["someone/pickled"] = tmp_path / "pickled"
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"a pickle")
    found = world(hub, tmp_path / "cache", "alone", name, url=url)
    assert found["fetched"].startswith(said) and found["after"] is False


@pytest.mark.ray
@pytest.mark.slow
def test_each_cache_gets_the_weights_once_though_nodes_share_it(hub: FakeHub, tmp_path: Path) -> None:
    caches = [tmp_path / "shared", tmp_path / "own"]
    found = world(hub, tmp_path / "driver", "nodes", NAME, *caches)
    first, again, failed = found["found"]
    assert found["nodes"] == 3 and first["fetching"] == 2 and len(set(first["bytes"])) == 1
    assert first["progress"] == [sum(first["bytes"])] * 2
    assert again == {"fetching": 0, "bytes": [], "progress": [0, 0]}
    assert hub.fetched("model.safetensors") == 2
    assert "on node with " in failed and "RepositoryNotFoundError" in failed
    assert all(is_whole(next(cache.glob("models--*/snapshots/*"))) for cache in caches)
    assert not [path for cache in caches for path in cache.glob(".atkd-*")]


def test_weights_in_several_files_are_whole_when_all_are_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert not is_whole(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").touch()
    assert not is_whole(tmp_path)
    (tmp_path / "model-2.safetensors").symlink_to("model-1.safetensors")
    assert is_whole(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    assert not is_whole(tmp_path), "a link whose file is gone"


def test_the_nodes_are_those_with_room_or_all_that_may_be_waited_for() -> None:
    teacher = replica_request(EngineConfig(gpu=True, tensor_parallel=4, labels={"role": "teacher"}))
    student = worker_request(WorkersConfig(gpus=1, labels={"role": "student"}))
    gpus = {"CPU": 8.0, "GPU": 8.0}
    nodes = [
        Node("busy teacher", gpus, {"role": "teacher"}, {"GPU": 6.0}, id="a"),
        Node("teacher", gpus, {"role": "teacher"}, {}, id="b"),
        Node("busy student", gpus, {"role": "student"}, {"GPU": 8.0}, id="c"),
        Node("cpus", {"CPU": 4.0}, {}, {}, id="d"),
    ]
    assert [node.id for node in nodes_for([teacher], nodes)] == ["b"]
    assert [node.id for node in nodes_for([student], nodes)] == ["c"], "it has to wait for this one"
    assert [node.id for node in nodes_for([student, teacher, evaluator_need(EvaluateConfig())], nodes)] == ["c", "b", "a", "d"]
