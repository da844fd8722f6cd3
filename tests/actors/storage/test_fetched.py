from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.storage.fetched import fetched_files, fingerprint
from actors.storage.folder import open_folder
from orchestrator.config.data import FilesSource
from orchestrator.data.sources import read_rows, source_hash
from tests.s3_world import BUCKET, KEYS, environment, s3_server

PLACE = f"s3://{BUCKET}/data"


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[None]:
    settings = {**KEYS, "ATKD_CACHE": str(tmp_path / "cache"), "ATKD_CACHE_GIB": "1"}
    with s3_server(tmp_path) as endpoint, environment({**settings, "AWS_ENDPOINT_URL": endpoint}):
        yield


def test_files_are_fetched_as_they_are_now(storage: None) -> None:
    folder = open_folder(PLACE)
    for name in ("b.txt", "a.txt", "c.bin"):
        folder.write(name, name.encode())
    folder.write("inner/d.txt", b"not of this folder")

    def texts(place: str) -> list[bytes]:
        return [path.read_bytes() for path in fetched_files(place, lambda name: name.endswith(".txt"))]

    assert texts(PLACE) == texts(f"{PLACE}/") == [b"a.txt", b"b.txt"]
    assert texts(f"{PLACE}/c.bin") == [b"c.bin"]
    assert texts(f"{PLACE}/nothing") == texts(f"s3://{BUCKET}") == []
    before = fingerprint(PLACE, lambda name: True)
    folder.write("a.txt", b"another text")
    assert texts(PLACE) == [b"another text", b"b.txt"]
    assert None is not fingerprint(PLACE, lambda name: True) != before
    assert fingerprint(f"{PLACE}/nothing", lambda name: True) is None


def test_what_finds_no_room_is_refused(storage: None) -> None:
    open_folder(PLACE).write("a.txt", b"0123456789")
    with (
        environment({"ATKD_CACHE_GIB": "0"}),
        pytest.raises(ValueError, match=rf"{PLACE}/a.txt has 10 bytes, .* has no room; ATKD_CACHE_GIB in its environment sets"),
    ):
        fetched_files(PLACE, lambda name: True)


def test_rows_are_read_from_a_file_or_a_folder_and_a_change_is_seen(storage: None) -> None:
    folder = open_folder(PLACE)
    folder.write("b.csv", b"question,answer\n2 + 2,4\n")
    folder.write("a.jsonl", b'{"question": "1 + 1", "answer": "2"}\n')
    folder.write("notes.md", b"no rows")
    whole = FilesSource(kind="files", path=PLACE)
    assert [row["answer"] for row in read_rows(whole, 0)] == ["2", "4"]
    assert [row["answer"] for row in read_rows(FilesSource(kind="files", path=f"{PLACE}/b.csv"), 0)] == ["4"]
    before = source_hash(whole)
    folder.write("b.csv", b"question,answer\n2 + 2,5\n2 + 3,5\n")
    assert None is not source_hash(whole) != before
    with pytest.raises(ValueError, match=rf"s3://{BUCKET}/none \(data.source.path\) is no .* file, and no folder in which"):
        read_rows(FilesSource(kind="files", path=f"s3://{BUCKET}/none"), 0)
