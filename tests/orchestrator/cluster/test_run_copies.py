"""A run in object storage: one process at a time works in it, from whichever node."""

import json
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from actors.storage.mirror import Mirror
from actors.storage.object_folder import ObjectFolder
from orchestrator.cluster import run_copies
from orchestrator.cluster.run_copies import RunCopies, passing_folder, place_of
from orchestrator.config.run import RunConfig
from orchestrator.run.run_dir import RunDir, RunDirError
from tests.logs import logged
from tests.orchestrator.config.test_run import changed
from tests.s3_world import BUCKET, Faults


@pytest.fixture
def config(faults: Faults, tmp_path: Path) -> RunConfig:
    """A run in a folder of the bucket that only this test has."""
    return changed(f"output=s3://{BUCKET}/{tmp_path.name}")


def on_another_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on as a process of a node that has no copies yet."""
    monkeypatch.setenv("ATKD_CACHE", str(tmp_path / "another"))


def test_a_stage_that_one_node_has_done_is_done_on_another(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with logged(), RunDir.open(config) as run_dir:
        assert run_dir.path == config.run_dir and run_dir.path.is_relative_to(tmp_path)
        (run_dir.path / "data").mkdir()
        (run_dir.path / "data" / "rows.arrow").write_text("rows")
        run_dir.stage("prepare", lambda: {"rows": 3})
        assert run_dir.checkpoints(None) == f"{config.place}/checkpoints"
        assert "stages/prepare.json" in ObjectFolder(config.place).files()
    on_another_node(tmp_path, monkeypatch)
    with logged(), RunDir.open(config) as run_dir:
        assert run_dir.path.is_relative_to(tmp_path / "another")
        assert run_dir.stage("prepare", lambda: {"rows": 1 // 0})["rows"] == 3
        assert (run_dir.path / "data" / "rows.arrow").read_text() == "rows"
    lines = (config.run_dir / "run.log").read_text().splitlines()
    assert "prepare: done in" in lines[0] and lines[1].endswith("prepare: done before")


def test_another_configuration_is_refused_on_any_node(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunDir.open(config).close()
    on_another_node(tmp_path, monkeypatch)
    with pytest.raises(RunDirError, match=r"made by another configuration.*\n  seed: 5 here, 0 there"):
        RunDir.open(changed(f"output={config.output}", "seed=5"))
    RunDir.open(config).close()


def test_one_process_at_a_time_works_in_a_run_whichever_its_node(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunDir.open(config):
        on_another_node(tmp_path, monkeypatch)
        with pytest.raises(RunDirError, match=f"another process works in {config.place}, or was lost less than a minute ago"):
            RunDir.open(config)
    RunDir.open(config).close()


def test_who_was_taken_for_dead_does_nothing_more(config: RunConfig) -> None:
    run_dir = RunDir.open(config)
    storage = ObjectFolder(f"{config.place}/driver")
    (claim,) = storage.files()
    storage.remove(claim)
    (run_dir.path / "late.txt").write_text("written after another took over")
    deadline = time.monotonic() + 60
    with pytest.raises(ValueError, match=f"another process has taken over {config.place}, since nothing was heard of this one"):
        while time.monotonic() < deadline:
            run_dir.share()
            time.sleep(0.2)
    (run_dir.path / "late.txt").write_text("written later still")
    run_dir.close()
    assert ObjectFolder(config.place).read("late.txt") != b"written later still"


def test_what_a_run_writes_is_put_while_it_works(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_copies, "SECONDS", 0.1)
    with RunDir.open(config) as run_dir:
        (run_dir.path / "metrics").mkdir()
        (run_dir.path / "metrics" / "train.jsonl").write_text("{}\n")
        deadline = time.monotonic() + 30
        while "metrics/train.jsonl" not in ObjectFolder(config.place).files():
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_an_error_of_the_run_is_told_though_the_storage_is_gone_too(config: RunConfig, faults: Faults) -> None:
    with logged() as said, pytest.raises(ZeroDivisionError), RunDir.open(config):
        faults.refuse = (403, "AccessDenied")
        raise ZeroDivisionError
    assert any(line.startswith(f"what this run wrote last is in {config.run_dir} alone") for line in said)
    faults.refuse = None
    driver = ObjectFolder(f"{config.place}/driver")
    for claim in driver.files():  # could not be given back, and would be stale in a minute
        driver.remove(claim)
    with RunDir.open(config) as run_dir:
        events = [json.loads(line)["event"] for line in (run_dir.path / "events.jsonl").read_text().splitlines()]
    assert events == ["ended_by_error"]


def test_a_bucket_that_is_not_there_is_named(faults: Faults) -> None:
    with pytest.raises(ValueError, match="no such bucket; make it, or name another"):
        RunDir.open(changed("output=s3://nowhere/runs"))
    assert [thread for thread in threading.enumerate() if thread.name in ("claim", "mirror")] == []


@pytest.mark.ray
@pytest.mark.parametrize("fails", [False, True])
def test_what_goes_from_node_to_node_is_there_for_a_while(config: RunConfig, local_ray: None, fails: bool) -> None:
    storage = ObjectFolder(config.place)
    with suppress(ZeroDivisionError), passing_folder(config.run_dir, config.place, "doctor-") as folder:
        (folder.path / "rows.arrow").write_bytes(b"rows")
        folder.share()
        assert storage.read(f"{folder.path.parent.name}/passed/rows.arrow") == b"rows"
        assert folder.place("scores") == f"{config.place}/{folder.path.parent.name}/scores"
        config.mirror.sync()  # type: ignore[union-attr]
        assert len(storage.files()) == 1, "the run's own copies leave it out"
        if fails:
            raise ZeroDivisionError
    assert not storage.files() and not folder.path.parent.exists() and config.run_dir.exists()


def test_what_goes_from_node_to_node_on_a_disk_they_share_is_a_folder(tmp_path: Path) -> None:
    with passing_folder(tmp_path, None, "doctor-") as folder:
        assert folder.path.parent == tmp_path and folder.place("scores") == str(folder.path / "scores")
        (folder.path / "rows.arrow").write_bytes(b"rows")
        folder.share()
    assert not list(tmp_path.iterdir())


def test_people_are_told_addresses() -> None:
    mirror = Mirror("/cache/a", "s3://bucket/a")
    assert place_of(mirror, Path("/cache/a/student")) == "s3://bucket/a/student"
    assert place_of(mirror, Path("/elsewhere/a")) == "/elsewhere/a"
    assert place_of(None, Path("/runs/a/student")) == "/runs/a/student"


def test_a_process_that_cannot_claim_leaves_nothing_behind(config: RunConfig) -> None:
    assert config.mirror is not None
    with RunDir.open(config):
        other = RunCopies(config.mirror)
        assert not other.begin()
        assert len(ObjectFolder(f"{config.place}/driver").files()) == 1
