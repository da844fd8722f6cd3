"""Which weights write which step, against a walk through the steps; and the folders in which they travel."""

import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from actors.dataloader.row_sources import steps_written_by, weights_step
from actors.rollouts.weights import PROOF, Proof, WeightFolders

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


def test_weights_are_there_once_their_folder_is(tmp_path: Path) -> None:
    folders = WeightFolders(tmp_path / "weights")
    assert not folders.is_there(3)
    folders.path(3).mkdir(parents=True)
    assert folders.is_there(3) and not folders.is_there(2)
    folders.path(4).write_text("no folder")
    assert not folders.is_there(4)


def test_weights_that_come_are_waited_for(tmp_path: Path) -> None:
    folders = WeightFolders(tmp_path)
    publisher = threading.Timer(0.1, folders.path(7).mkdir)
    publisher.start()
    assert folders.wait_for(7, seconds=30)
    publisher.join()
    assert folders.wait_for(7, seconds=0)


def test_weights_that_do_not_come_are_not_waited_for_for_ever(tmp_path: Path) -> None:
    WeightFolders(tmp_path).path(6).mkdir()
    assert not WeightFolders(tmp_path).wait_for(7, seconds=0.05)


def test_earlier_weights_are_discarded_and_nothing_else(tmp_path: Path) -> None:
    folders = WeightFolders(tmp_path)
    for step in (2, 4, 6, 123_456_789):
        folders.path(step).mkdir()
        (folders.path(step) / "model.safetensors").write_bytes(b"weights")
    foreign = [tmp_path / name for name in ("step-00000001.unfinished", "step-one", "notes", "xstep-00000001")]
    for path in foreign:
        path.mkdir()
        (path / "mine").touch()
    (tmp_path / "step-00000003").write_text("a file")
    folders.discard_before(6)
    assert [step for step in (2, 4, 6, 123_456_789) if folders.is_there(step)] == [6, 123_456_789]
    assert (folders.path(6) / "model.safetensors").read_bytes() == b"weights"
    assert all((path / "mine").exists() for path in foreign)
    assert (tmp_path / "step-00000003").read_text() == "a file"


def test_where_no_weights_were_published_there_is_nothing_to_discard(tmp_path: Path) -> None:
    WeightFolders(tmp_path / "nothing").discard_before(9)
    assert not (tmp_path / "nothing").exists()
