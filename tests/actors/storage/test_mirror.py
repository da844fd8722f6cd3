"""Copies of one folder on several nodes, which are folders of one machine here; the storage is a real S3 server."""

import os
import threading
import time
from pathlib import Path

import boto3
import pytest

from actors.storage import object_folder
from actors.storage.folder import open_folder
from actors.storage.mirror import COMING, LOCK, RECORD, Mirror, folder_on_nodes, kept_alike
from actors.storage.object_folder import ObjectFolder, StorageError
from tests.s3_world import BUCKET, Faults


@pytest.fixture
def nodes(anywhere: str, tmp_path: Path) -> tuple[Mirror, Mirror]:
    """Two nodes' copies of a folder that only this test has."""
    return Mirror(str(tmp_path / "one"), anywhere), Mirror(str(tmp_path / "other"), anywhere)


@pytest.fixture
def s3_nodes(faults: Faults, tmp_path: Path) -> tuple[Mirror, Mirror]:
    """The same where things go wrong."""
    address = f"s3://{BUCKET}/runs/{tmp_path.name}"
    return Mirror(str(tmp_path / "one"), address), Mirror(str(tmp_path / "other"), address)


def write(mirror: Mirror, name: str, text: str) -> Path:
    path = Path(mirror.folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def files(mirror: Mirror) -> dict[str, str]:
    """What the folder holds, but for the mirror's own books."""
    paths = (path for path in Path(mirror.folder).rglob("*") if path.is_file() and path.name not in (RECORD, LOCK))
    return {path.relative_to(mirror.folder).as_posix(): path.read_text() for path in paths}


def test_what_is_written_on_one_node_comes_to_the_other_and_back(nodes: tuple[Mirror, Mirror]) -> None:
    one, other = nodes
    written = {"events.jsonl": "begun\n", "models/small/config.json": "{}", "models/small/empty": "", "stages/score.json": "1"}
    for name, text in written.items():
        write(one, name, text)
    one.sync()
    other.sync()
    assert files(other) == written
    write(other, "events.jsonl", "begun\nended\n")
    write(other, "models/large/config.json", "{1}")
    other.sync()
    one.sync()
    assert files(one) == written | {"events.jsonl": "begun\nended\n", "models/large/config.json": "{1}"}


def test_what_is_the_nodes_own_affair_does_not_travel(nodes: tuple[Mirror, Mirror]) -> None:
    one, other = nodes
    for name in ("lock", "run.log.5f.tmp", "student.tmp/config.json", "checkpoints/train/a", "trials/0/checkpoints/a", "run.log"):
        write(one, name, name)
    one.sync()
    other.sync()
    assert files(other) == {"run.log": "run.log"}


def test_nothing_is_asked_twice_of_the_storage(s3_nodes: tuple[Mirror, Mirror], faults: Faults) -> None:
    one, other = s3_nodes
    write(one, "data/rows.arrow", "rows")
    for mirror in (one, other, one, other):
        mirror.sync()
    del faults.seen[:]
    one.sync()
    other.sync()
    assert [line.split()[0] for line in faults.seen if "list-type" not in line] == []


def test_a_file_that_was_changed_on_both_sides_is_as_it_was_written_last(nodes: tuple[Mirror, Mirror]) -> None:
    one, other = nodes
    path = write(one, "metrics/train.jsonl", "1\n")
    one.sync()
    other.sync()
    write(other, "metrics/train.jsonl", "1\n2\n")
    os.utime(path, (time.time() - 100,) * 2)
    path.write_text("1\nlong ago\n")
    os.utime(path, (time.time() - 60,) * 2)
    other.sync()
    one.sync()
    assert path.read_text() == "1\n2\n"
    write(other, "metrics/train.jsonl", "1\n2\n3\n")
    other.sync()
    path.write_text("1\n2\nfrom here on here\n")
    os.utime(path, (time.time() + 60,) * 2)
    one.sync()
    other.sync()
    assert files(other) == {"metrics/train.jsonl": "1\n2\nfrom here on here\n"}


def test_what_is_lost_here_comes_back_when_the_folder_is_to_be_whole(nodes: tuple[Mirror, Mirror]) -> None:
    one, other = nodes
    write(one, "student/config.json", "{}")
    one.sync()
    (Path(one.folder) / "student" / "config.json").unlink()
    one.sync()
    assert files(one) == {}
    other.sync()
    assert files(other) == {"student/config.json": "{}"}, "whoever removes a file here does not remove it for others"
    one.sync(whole=True)
    assert files(one) == {"student/config.json": "{}"}


def test_what_was_removed_in_the_storage_goes_everywhere(nodes: tuple[Mirror, Mirror]) -> None:
    one, other = nodes
    path = write(one, "stages/train.json", "{}")
    write(one, "stages/score.json", "{}")
    for mirror in nodes:
        mirror.sync()
    ObjectFolder(one.address).remove("stages/train.json")
    for mirror in nodes:
        mirror.sync()
        assert files(mirror) == {"stages/score.json": "{}"}
    path.write_text("again")
    one.sync()
    one.discard(path)
    one.discard(path)
    for mirror in nodes:
        mirror.sync()
        assert files(mirror) == {"stages/score.json": "{}"}


def test_a_new_folder_counts_when_all_its_files_are_there(
    s3_nodes: tuple[Mirror, Mirror], faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = s3_nodes
    write(one, "config.yaml", "name: a")
    one.sync()
    for name in ("config.json", "model.safetensors", "vocab.json"):
        write(one, f"models/teacher/{name}", name)
    write(one, "stages/train.json", "{}")
    monkeypatch.setattr(object_folder, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(ObjectFolder, "upload", cut_after(2, ObjectFolder.upload))
    with pytest.raises(StorageError, match="cannot write"):
        one.sync()
    monkeypatch.undo()
    there = ObjectFolder(one.address).files()
    assert f"models/{COMING}" in there and len([name for name in there if name.startswith("models/teacher/")]) == 2
    other.sync()
    assert files(other) == {"config.yaml": "name: a"}, "no half model, and no stage that says that it is there"
    one.sync()
    other.sync()
    assert files(other) == files(one) and len(files(other)) == 5
    assert f"models/{COMING}" not in ObjectFolder(one.address).files()


def test_two_nodes_that_put_into_one_new_folder_lose_nothing(nodes: tuple[Mirror, Mirror]) -> None:
    one, other = nodes
    path = write(one, "trials/0/trial_0.jsonl", "1\n")
    one.sync()
    marker = ObjectFolder(one.address)
    marker.write(f"trials/{COMING}", b"")  # the other began before it saw that the folder is there
    one.sync()
    assert path.read_text() == "1\n", "what is hidden for a moment is not gone"
    path.write_text("1\n2\n")
    one.sync()
    write(other, "trials/1/trial_1.jsonl", "1\n")
    other.sync()
    marker.remove(f"trials/{COMING}")
    for mirror in nodes:
        mirror.sync()
        assert files(mirror) == {"trials/0/trial_0.jsonl": "1\n2\n", "trials/1/trial_1.jsonl": "1\n"}


def test_a_name_that_leads_out_of_the_folder_is_left_alone(s3_nodes: tuple[Mirror, Mirror], tmp_path: Path) -> None:
    storage = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    storage.put_object(Bucket=BUCKET, Key=f"runs/{tmp_path.name}/a/../../outside.txt", Body=b"from outside")
    assert "a/../../outside.txt" in ObjectFolder(s3_nodes[0].address).files()
    s3_nodes[0].sync()
    assert files(s3_nodes[0]) == {} and not list(tmp_path.rglob("outside.txt"))


def cut_after(count: int, upload: object) -> object:
    """An upload that works so many times, and then no more."""
    left = [count]

    def cut(folder: ObjectFolder, path: Path, name: str | None = None) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise StorageError(f"{folder.place}: cannot write {name}")
        upload(folder, path, name)  # type: ignore[operator]

    return cut


def test_half_a_folder_of_a_node_that_was_lost_is_cleared_away(nodes: tuple[Mirror, Mirror]) -> None:
    one, other = nodes
    there = open_folder(f"{one.address}/models/teacher")
    there.write("config.json", b"{}")
    open_folder(f"{one.address}/models").write(COMING, b"")
    one.sync()
    assert files(one) == {} and ObjectFolder(one.address).files().keys() == {"models/teacher/config.json", f"models/{COMING}"}
    other.sync(whole=True)
    assert files(other) == {} and ObjectFolder(one.address).files() == {}


def test_what_a_node_has_of_half_a_folder_is_put_anew(nodes: tuple[Mirror, Mirror]) -> None:
    one, other = nodes
    write(one, "models/teacher/config.json", "{}")
    one.sync()
    open_folder(f"{one.address}/models").write(COMING, b"")
    one.sync(whole=True)
    other.sync()
    assert files(one) == files(other) == {"models/teacher/config.json": "{}"}


def test_a_mirror_within_a_mirror_is_left_to_itself(nodes: tuple[Mirror, Mirror]) -> None:
    one, other = nodes
    inner = Mirror(f"{one.folder}/by_teacher/small", f"{one.address}/by_teacher/small")
    write(inner, "config.yaml", "small")
    write(one, "config.yaml", "all")
    inner.sync()
    write(inner, "later.txt", "not put yet")
    one.sync()
    assert ObjectFolder(one.address).files().keys() == {"config.yaml", "by_teacher/small/config.yaml"}
    other.sync()
    assert files(other) == {"config.yaml": "all", "by_teacher/small/config.yaml": "small"}


def test_a_copy_whose_record_is_lost_is_not_moved_again(s3_nodes: tuple[Mirror, Mirror], faults: Faults) -> None:
    one, other = s3_nodes
    write(one, "models/a/config.json", "{}")
    one.sync()
    other.sync()
    (Path(other.folder) / RECORD).write_text("half a rec")
    del faults.seen[:]
    other.sync()
    assert [line for line in faults.seen if "list-type" not in line] == []


def test_a_folder_is_kept_alike_while_a_body_runs(nodes: tuple[Mirror, Mirror]) -> None:
    one, other = nodes
    with kept_alike(one, seconds=0.05):
        write(one, "metrics/train.jsonl", "1\n")
        deadline = time.monotonic() + 20
        while not files(other) and time.monotonic() < deadline:
            time.sleep(0.05)
            other.sync()
        assert files(other) == {"metrics/train.jsonl": "1\n"}
        write(other, "error", "at its end")
        with pytest.raises(ZeroDivisionError), kept_alike(other, seconds=None):
            raise ZeroDivisionError
    assert files(one)["error"] == "at its end"
    with kept_alike(None):
        assert threading.active_count() > 0


def test_a_storage_that_refuses_says_so(s3_nodes: tuple[Mirror, Mirror], faults: Faults) -> None:
    faults.refuse = (403, "AccessDenied")
    with pytest.raises(ValueError, match="access is denied: keys are missing"):
        s3_nodes[0].sync()


def test_answers_that_break_off_are_asked_for_again(s3_nodes: tuple[Mirror, Mirror], faults: Faults) -> None:
    one, other = s3_nodes
    write(one, "data/rows.arrow", "rows" * 1000)
    faults.cut_uploads = 1
    one.sync()
    faults.cut_answers = faults.slow_down = 1
    other.sync()
    assert files(other) == files(one) and not faults.cut_answers


def test_copies_stand_by_their_path_in_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATKD_CACHE", "/cache")
    assert str(folder_on_nodes("s3://bucket/runs/a")).startswith("/cache/runs/bucket-")
    assert folder_on_nodes("s3://bucket/runs/a").parts[-2:] == ("runs", "a")
    assert folder_on_nodes("s3://bucket/runs/a/b").is_relative_to(folder_on_nodes("s3://bucket/runs/a"))
    others = ("gs://bucket/runs/a", "s3://bucket/runs/a?region=eu-central-1", "s3://other/runs/a")
    assert len({folder_on_nodes(address) for address in ("s3://bucket/runs/a", *others)}) == 4
