from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.storage import object_folder
from actors.storage.folder import open_folder
from actors.storage.object_folder import StorageError
from actors.storage.transfers import download, require_writable, upload
from tests.s3_world import BUCKET, Faults, faulty_storage, s3_server

PLACE = f"s3://{BUCKET}/published"


@pytest.fixture
def faults(tmp_path: Path) -> Iterator[Faults]:
    with s3_server(tmp_path) as endpoint, faulty_storage(tmp_path, endpoint) as faults:
        yield faults


@pytest.fixture
def student(tmp_path: Path) -> Path:
    folder = tmp_path / "student"
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 60_000)  # 15 MB, in parts
    (folder / "inner" / "more.txt").write_text("more")
    (folder / "empty.txt").touch()
    return folder


def test_a_folder_is_put_whole_and_what_loaders_ask_for_last(faults: Faults, student: Path) -> None:
    upload(student, PLACE)
    there = open_folder(f"{PLACE}/student")
    assert there.folders() == ["inner"]
    assert there.read("model.safetensors") == (student / "model.safetensors").read_bytes()
    assert there.size("empty.txt") == 0
    assert open_folder(f"{PLACE}/student/inner").read("more.txt") == b"more"
    puts = [line for line in faults.seen if line.startswith("PUT")]
    assert puts[-1].endswith("/student/config.json")
    (student / "config.json").write_text('{"again": true}')
    upload(student / "config.json", f"{PLACE}/student")
    assert there.read("config.json") == b'{"again": true}'


def test_a_folder_comes_back_as_it_was_put_though_answers_break(faults: Faults, student: Path, tmp_path: Path) -> None:
    upload(student, PLACE)
    faults.cut_answers = 3
    download(f"{PLACE}/student", tmp_path / "back")
    assert faults.cut_answers == 0
    there, here = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} for folder in (student, tmp_path / "back")
    )
    assert here == there


@pytest.mark.slow
def test_a_file_that_is_cut_on_its_way_is_not_there(faults: Faults, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_folder, "PATIENCE_SECONDS", 0.0)
    faults.cut_uploads = 1000
    there, path = open_folder(f"{PLACE}/student"), student / "model.safetensors"
    with pytest.raises(StorageError, match=rf"{PLACE}/student: cannot write model.safetensors, tried for 0 s"):
        upload(path, there.place)
    with pytest.raises(StorageError, match=rf"{PLACE}/student: cannot write in_parts, tried for 0 s"):
        there.write("in_parts", path.read_bytes())
    faults.cut_uploads = 0
    assert there.names() == []

    upload(path, there.place)
    before = path.read_bytes()
    path.write_bytes(before[::-1])
    faults.cut_uploads = 1000
    with pytest.raises(StorageError, match="cannot write model.safetensors"):  # by its length it would be there
        upload(path, there.place)
    faults.cut_uploads = 0
    assert there.read("model.safetensors") == before


def test_where_nothing_can_be_put_is_told_before(faults: Faults) -> None:
    require_writable(PLACE)
    assert open_folder(PLACE).names() == []
    with pytest.raises(ValueError, match="s3://no-such-bucket/a: cannot write seen-.*: there is no such bucket"):
        require_writable("s3://no-such-bucket/a")
