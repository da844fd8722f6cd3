"""What the two kinds of folder have in common, where they stand on a disk and in object storage."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from actors.config.places import within
from actors.storage.folder import Folder, open_folder
from tests.cloud_world import storage_of


@pytest.fixture(params=["disk", "s3", "gs", "abfs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    if request.param == "disk":
        yield open_folder(tmp_path / "here")
        return
    with storage_of(request.param, request, tmp_path) as place:
        yield open_folder(place)


def test_a_folder_that_is_not_there_holds_nothing(folder: Folder) -> None:
    assert folder.sizes() == {} and folder.folders() == []
    folder.remove_folder("inner")
    folder.remove("name")


def test_an_inner_folder_goes_with_all_that_is_in_it_and_with_nothing_else(folder: Folder) -> None:
    folder.begin()
    for name in ("inner", "inner_too"):
        inner = open_folder(within(folder.place, name))
        inner.begin()
        inner.write("one", b"1")
        inner.write("two", b"22")
    folder.write("inner.txt", b"text")
    assert folder.folders() == ["inner", "inner_too"]
    folder.remove_folder("inner")
    assert folder.folders() == ["inner_too"] and folder.sizes() == {"inner.txt": 4}
    assert open_folder(within(folder.place, "inner_too")).sizes() == {"one": 1, "two": 2}
    assert open_folder(within(folder.place, "inner")).sizes() == {}


def test_what_is_opened_for_another_library_is_the_same_folder(folder: Folder) -> None:
    folder.begin()
    folder.write("name", b"content")
    path, filesystem = folder.opened()
    with (filesystem or fs.LocalFileSystem()).open_input_stream(f"{path}/name") as file:
        assert file.read() == b"content"
