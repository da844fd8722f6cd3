"""Copies of models in object storage, from a real S3 server: whole, as the model is now, and resumed where one was killed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from actors.model_cache import object_storage
from actors.model_cache.object_storage import BEGUN, COPIED, StoredModelFiles, copied_from, copy_folder, look_up
from actors.storage import object_folder
from actors.storage.folder import open_folder
from actors.storage.transfers import upload
from tests.s3_world import BUCKET, Faults, faulty_storage
from tests.worlds import tiny_llama

ADDRESS = f"s3://{BUCKET}/models/tiny"


@pytest.fixture
def faults(endpoint: str, tmp_path: Path) -> Iterator[Faults]:
    """Storage with the model ``tiny`` in it, beside a file that is none of a model's."""
    with faulty_storage(tmp_path, endpoint) as faults:
        upload(tiny_llama(tmp_path / "tiny", seed=1), f"s3://{BUCKET}/models")
        open_folder(ADDRESS).write("training_args.bin", b"a pickle")
        yield faults


def fetched(folder: Path) -> Any:
    return StoredModelFiles(look_up(ADDRESS), str(folder)).fetch()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != COPIED}


def test_a_copy_is_whole_and_found_again_without_a_request(faults: Faults, tmp_path: Path) -> None:
    folder, model = copy_folder(f"{ADDRESS}/"), look_up(ADDRESS)
    assert folder.is_relative_to(tmp_path / "cache" / "models") and folder.name == "tiny" and copied_from(folder) is None
    files = StoredModelFiles(model, str(folder))
    faults.cut_answers = 2
    came = files.fetch()
    assert not isinstance(came, str) and came.bytes == model.bytes and files.progress() == (model.bytes, model.bytes)
    assert contents(folder) == contents(tmp_path / "tiny"), "no pickle, and nothing half"
    faults.seen.clear()
    assert StoredModelFiles(model, str(folder)).are_here() and copied_from(folder) == model and faults.seen == []


def test_what_was_changed_since_is_copied_again_and_nothing_else(faults: Faults, tmp_path: Path) -> None:
    fetched(tmp_path / "copy")
    there = open_folder(ADDRESS)
    there.write("config.json", there.read("config.json").replace(b'"use_cache": true', b'"use_cache": false'))
    there.remove("tokenizer_config.json")
    files = StoredModelFiles(look_up(ADDRESS), str(tmp_path / "copy"))
    assert not files.are_here() and files.to_come() == there.size("config.json")
    faults.seen.clear()
    assert not isinstance(files.fetch(), str) and files.are_here()
    assert b'"use_cache": false' in (tmp_path / "copy" / "config.json").read_bytes()
    assert not (tmp_path / "copy" / "tokenizer_config.json").exists()
    assert not any("safetensors" in line for line in faults.seen), "the weights are the same"


def test_a_copy_that_was_cut_short_is_none_and_goes_on_where_it_was(
    faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    with monkeypatch.context() as patched:
        patched.setattr(object_folder, "PATIENCE_SECONDS", 0.0)
        patched.setattr(object_storage, "AT_ONCE", 1)
        download = object_folder.ObjectFolder.download

        def without_weights(storage: Any, name: str, path: Path) -> None:
            if name == "model.safetensors":
                faults.cut_answers = 1000
            download(storage, name, path)

        patched.setattr(object_folder.ObjectFolder, "download", without_weights)
        failure = fetched(folder)
    faults.cut_answers = 0
    assert "cannot read model.safetensors, tried for 0 s" in failure
    assert copied_from(folder) is None and (folder / BEGUN).exists()
    assert {path.suffix for path in folder.iterdir()} == {".json"}, "no half file is left"
    faults.seen.clear()
    assert not isinstance(fetched(folder), str)
    assert contents(folder) == contents(tmp_path / "tiny")
    assert not any("GET" in line and "/config.json" in line for line in faults.seen), "it was there"


def test_a_copy_without_weights_is_none_and_a_whole_one_is_made_of_it(faults: Faults, tmp_path: Path) -> None:
    folder, model = tmp_path / "copy", look_up(ADDRESS)
    described = StoredModelFiles(model, str(folder), weights=False)
    faults.seen.clear()
    came = described.fetch()
    assert not isinstance(came, str) and 0 < came.bytes < model.bytes - model.files["model.safetensors"][0] + 1
    assert described.are_here() and copied_from(folder) is None and not StoredModelFiles(model, str(folder)).are_here()
    assert not any("safetensors" in line for line in faults.seen)
    config = json.loads((folder / "config.json").read_text())
    assert config == json.loads((tmp_path / "tiny" / "config.json").read_text())
    faults.seen.clear()
    assert not isinstance(fetched(folder), str) and contents(folder) == contents(tmp_path / "tiny")
    assert [line for line in faults.seen if "GET" in line and "/config.json" in line] == []
    assert described.are_here() and copied_from(folder) == model, "a whole copy describes the model too"
    open_folder(ADDRESS).remove("tokenizer_config.json")
    again = StoredModelFiles(look_up(ADDRESS), str(folder), weights=False)
    assert not again.are_here() and not isinstance(again.fetch(), str) and again.are_here()
    assert not (folder / "tokenizer_config.json").exists() and (folder / "model.safetensors").exists()
    assert copied_from(folder) == look_up(ADDRESS), "nothing of it is missing"


def test_of_two_who_copy_it_at_once_one_does(faults: Faults, tmp_path: Path) -> None:
    faults.answer_seconds = 0.02
    with ThreadPoolExecutor(2) as threads:
        came = list(threads.map(lambda _: fetched(tmp_path / "copy"), range(2)))
    assert not any(isinstance(one, str) for one in came)
    assert sum("GET" in line and "/model.safetensors" in line for line in faults.seen) == 1
    assert contents(tmp_path / "copy") == contents(tmp_path / "tiny")


def test_a_file_of_the_copy_that_is_gone_is_copied_again(faults: Faults, tmp_path: Path) -> None:
    fetched(tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    files = StoredModelFiles(look_up(ADDRESS), str(tmp_path / "copy"))
    assert not files.are_here()
    assert not isinstance(files.fetch(), str) and files.are_here()


def test_a_disk_without_room_is_told_before_anything_comes(
    faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(object_storage.shutil, "disk_usage", lambda path: full)
    failure = fetched(tmp_path / "copy")
    assert failure.startswith("there is no room for it: ") and "; ATKD_CACHE in the environment of all nodes may" in failure
    assert list((tmp_path / "copy").iterdir()) == []


def test_an_address_without_a_model_is_told(faults: Faults) -> None:
    with pytest.raises(ValueError, match="no model stands there, for there is no config.json among its 0 files; a folder that"):
        look_up(f"s3://{BUCKET}/models/other")
    faults.refuse = (403, "AccessDenied")
    with pytest.raises(ValueError, match="access is denied"):
        look_up(ADDRESS)


@pytest.mark.ray
@pytest.mark.slow
def test_nodes_that_lack_it_fetch_it_to_the_drivers_path(faults: Faults, tmp_path: Path) -> None:
    """In a process of its own, whose Ray has the keys in its environment."""
    command = [sys.executable, "-m", "tests.actors.model_cache.stored_world", ADDRESS, str(tmp_path / "on" / "nodes")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == [{"fetching": 1, "bytes": [look_up(ADDRESS).bytes]}, {"fetching": 0, "bytes": []}]
    assert contents(tmp_path / "on" / "nodes") == contents(tmp_path / "tiny")
