"""Which weights write which step, against a walk through the steps; and the folders in which they travel."""

import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from actors.config.places import in_object_storage, within
from actors.dataloader.row_sources import steps_written_by, weights_step
from actors.model_source import ModelSource
from actors.rollouts.weight_copies import PROOF, drop_copies, on_this_node
from actors.rollouts.weights import Proof, WeightFolders
from actors.storage import transfers
from actors.storage.folder import open_folder
from tests.cloud_world import storage_of
from tests.s3_world import BUCKET, KEYS, environment

SETTINGS = [
    (refresh_steps, lag, total_steps)
    for refresh_steps, lag, total_steps in itertools.product((1, 2, 3, 5, 8), (0, 1, 2, 4), (1, 2, 7, 16, 33))
]


def walked(refresh_steps: int, lag: int, total_steps: int) -> list[int]:
    """After which step the weights are taken that write each step, found by training through the windows one by one."""
    published, found, step = [0], [], 1
    while step <= total_steps:
        for _ in range(refresh_steps):
            found.append(published[-1 - lag] if lag < len(published) else published[0])
            step += 1
        published.append(step - 1)  # the weights with which the next window begins
    return found[:total_steps]


@pytest.mark.parametrize(("refresh_steps", "lag", "total_steps"), SETTINGS)
def test_a_step_is_written_by_the_weights_that_a_walk_through_the_windows_finds(
    refresh_steps: int, lag: int, total_steps: int
) -> None:
    found = [weights_step(step, refresh_steps, lag) for step in range(1, total_steps + 1)]
    assert found == walked(refresh_steps, lag, total_steps)
    assert found == sorted(found), "so those of earlier steps can go"
    assert all(taken < step for step, taken in enumerate(found, start=1)), "nobody waits for weights that need the step itself"


def test_hand_written_steps() -> None:
    assert [weights_step(step, 1, 0) for step in range(1, 6)] == [0, 1, 2, 3, 4]
    assert [weights_step(step, 1, 1) for step in range(1, 6)] == [0, 0, 1, 2, 3]
    assert [weights_step(step, 3, 0) for step in range(1, 9)] == [0, 0, 0, 3, 3, 3, 6, 6]
    assert [weights_step(step, 2, 1) for step in range(1, 9)] == [0, 0, 0, 0, 2, 2, 4, 4]


@pytest.mark.parametrize(("refresh_steps", "lag", "total_steps"), SETTINGS)
def test_the_steps_that_weights_write_are_those_that_name_them(refresh_steps: int, lag: int, total_steps: int) -> None:
    for weights in range(total_steps + 2 * refresh_steps + 1):
        named = [step for step in range(1, total_steps + 1) if weights_step(step, refresh_steps, lag) == weights]
        assert list(steps_written_by(weights, refresh_steps, lag, total_steps)) == named


@pytest.mark.parametrize("inner_epochs", [2, 4])
@pytest.mark.parametrize(("refresh_steps", "lag", "total_steps"), SETTINGS)
def test_weights_wait_for_all_visits_of_a_window(refresh_steps: int, lag: int, total_steps: int, inner_epochs: int) -> None:
    steps = range(1, total_steps + 1)
    found = [weights_step(step, refresh_steps, lag, inner_epochs) for step in steps]
    assert found == [inner_epochs * taken for taken in walked(refresh_steps, lag, total_steps)]
    for weights in range(inner_epochs * (total_steps + 2 * refresh_steps) + 1):
        named = [step for step, taken in zip(steps, found, strict=True) if taken == weights]
        assert list(steps_written_by(weights, refresh_steps, lag, total_steps, inner_epochs)) == named


def test_a_proof_is_read_as_it_was_written(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    proof = Proof(generator.integers(0, 50_000, 17).astype(np.int32), -generator.exponential(3, 16).astype(np.float32))
    proof.write(tmp_path)
    again = Proof.read(tmp_path)
    for mine, theirs in ((proof.token_ids, again.token_ids), (proof.logprobs, again.logprobs)):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    assert set(json.loads((tmp_path / PROOF).read_text())) == {"token_ids", "logprobs"}


def proof_of(number: int) -> Proof:
    return Proof(np.arange(3, dtype=np.int32), np.array([-1.0, -number], np.float32))


def saving(number: int) -> Callable[[Path], None]:
    """What fills a folder with weights that tell their number."""

    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights %d" % number)
        proof_of(number).write(folder)

    return save


def loaded(folders: WeightFolders, step: int) -> bytes:
    """The weights after a step, as a node loads them."""
    source = on_this_node(ModelSource(folders.place(step), None, True))
    assert source.trust_remote_code
    return (Path(source.name) / "model.safetensors").read_bytes()


@pytest.fixture(params=["disk", "s3", "gs", "abfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where weights are left: on a disk that all nodes see, or in each kind of object storage."""
    on_node(monkeypatch, tmp_path / "node")
    if request.param == "disk":
        yield str(tmp_path / "weights")
        return
    with storage_of(request.param, request, tmp_path) as address:
        yield within(address, "weights")


def on_node(monkeypatch: pytest.MonkeyPatch, disk: Path) -> None:
    """Go on as on a node with a disk of its own."""
    monkeypatch.setenv("ATKD_CACHE", str(disk))


def test_weights_come_as_they_were_written(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = WeightFolders(place)
    assert not folders.is_there(3) and folders.newest() == 0
    folders.write(3, saving(3))
    folders.write(12, saving(12))
    for disk in ("node", "other"):
        on_node(monkeypatch, tmp_path / disk)
        again = WeightFolders(place)
        assert [step for step in range(20) if again.is_there(step)] == [3, 12] and again.newest() == 12
        assert [loaded(again, step) for step in (3, 12)] == [b"weights 3", b"weights 12"]
        np.testing.assert_array_equal(again.proof(12).logprobs, proof_of(12).logprobs)


def test_weights_without_their_proof_are_not_there(place: str) -> None:
    folders = WeightFolders(place)
    folders.write(2, saving(2))
    storage = open_folder(place)
    if not in_object_storage(place):
        (Path(place) / "step-00000004").mkdir()
    storage.write("step-00000004/model.safetensors", b"half of it")
    assert not folders.is_there(4) and folders.newest() == 2
    assert not folders.wait_for(4, seconds=0.05)


def test_a_failure_while_weights_are_written_leaves_none(place: str) -> None:
    def fails(folder: Path) -> None:
        saving(5)(folder)
        raise OSError("the disk is full")

    folders = WeightFolders(place)
    with pytest.raises(OSError, match="the disk is full"):
        folders.write(5, fails)
    assert not folders.is_there(5) and folders.newest() == 0
    folders.write(5, saving(5))
    assert loaded(folders, 5) == b"weights 5"


def test_weights_that_come_are_waited_for(place: str) -> None:
    folders = WeightFolders(place)
    publisher = threading.Timer(0.1, folders.write, (7, saving(7)))
    publisher.start()
    assert folders.wait_for(7, seconds=30)
    publisher.join()
    assert folders.wait_for(7, seconds=0)


def test_earlier_weights_are_discarded_and_nothing_else(place: str) -> None:
    folders = WeightFolders(place)
    for step in (2, 4, 6, 123_456_789):
        folders.write(step, saving(step))
    foreign = ["step-one", "notes", "xstep-00000001"]
    for name in foreign:
        if not in_object_storage(place):
            (Path(place) / name).mkdir()
        open_folder(place).write(f"{name}/mine", b"")
    folders.discard_before(6)
    assert [step for step in (2, 4, 6, 123_456_789) if folders.is_there(step)] == [6, 123_456_789]
    assert loaded(folders, 6) == b"weights 6"
    assert all(open_folder(place).size(f"{name}/mine") == 0 for name in foreign)


def test_where_no_weights_were_written_there_is_nothing_to_discard(tmp_path: Path) -> None:
    WeightFolders(tmp_path / "nothing").discard_before(9)
    assert not (tmp_path / "nothing").exists()


@pytest.fixture
def address(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where weights are left in object storage."""
    on_node(monkeypatch, tmp_path / "node")
    with environment({**KEYS, "AWS_ENDPOINT_URL": endpoint}):
        yield f"s3://{BUCKET}/{tmp_path.name}/weights?region=us-east-1"


def copies(disk: Path) -> set[str]:
    return {path.name for path in disk.glob("weights/*/step-*")}


def test_a_copy_of_weights_that_stood_there_before_is_not_taken_for_those_that_do(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = WeightFolders(address)
    folders.write(3, saving(3))
    on_node(monkeypatch, tmp_path / "other")
    assert loaded(WeightFolders(address), 3) == b"weights 3"
    folders.discard_before(4)
    folders.write(3, saving(33))  # by another training in the same place
    assert loaded(WeightFolders(address), 3) == b"weights 33"


def test_a_node_keeps_no_copies_of_earlier_weights(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = WeightFolders(address)
    for step in (2, 4):
        folders.write(step, saving(step))
    assert copies(tmp_path / "node") == {"step-00000002", "step-00000004"}, "somebody may still wait for the former"
    on_node(monkeypatch, tmp_path / "samples")
    loaded(folders, 2), loaded(folders, 4)
    assert copies(tmp_path / "samples") == {"step-00000004"}
    folders.discard_before(4)
    folders.write(6, saving(6))
    assert copies(tmp_path / "node") == {"step-00000004", "step-00000006"}


def test_copies_of_a_training_that_is_long_over_go(address: str, tmp_path: Path) -> None:
    old = tmp_path / "node" / "weights" / "of-another" / "step-00000002"
    old.mkdir(parents=True)
    WeightFolders(address)
    assert old.exists()
    os.utime(old.parent, (0, 0))
    WeightFolders(address)
    assert not old.parent.exists()


def test_copies_of_a_training_that_is_over_are_dropped(address: str, tmp_path: Path) -> None:
    folders = WeightFolders(address)
    folders.write(2, saving(2))
    drop_copies(address)
    assert not list((tmp_path / "node" / "weights").iterdir())
    drop_copies(address)  # there are none
    assert loaded(WeightFolders(address), 2) == b"weights 2", "what is in the storage stays"


def test_copies_that_are_used_are_not_taken_for_idle(address: str, tmp_path: Path) -> None:
    folders = WeightFolders(address)
    folders.write(2, saving(2))
    (own,) = (path for path in (tmp_path / "node" / "weights").iterdir() if path.is_dir())
    os.utime(own, (0, 0))
    loaded(folders, 2)
    assert own.stat().st_mtime > 0


def test_weights_that_are_not_there_cannot_be_loaded(address: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"step-00000009/proof\.json"):
        loaded(WeightFolders(address), 9)


def test_two_samplers_of_a_node_copy_once(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, fetched = WeightFolders(address), []
    folders.write(2, saving(2))
    on_node(monkeypatch, tmp_path / "other")
    plain = transfers.download

    def noted(place: str, folder: Path) -> None:
        fetched.append(place)
        plain(place, folder)

    monkeypatch.setattr(transfers, "download", noted)
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda _: loaded(WeightFolders(address), 2), range(4))) == {b"weights 2"}
    assert len(fetched) == 1
