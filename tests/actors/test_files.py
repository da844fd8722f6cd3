"""What is left of a file or a folder when its writing fails, and when an earlier one did."""

import resource
from pathlib import Path

import pytest

from actors.files import whole_folder, write_atomically


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_when_all_of_it_is_there_without_what_an_earlier_try_left(tmp_path: Path) -> None:
    left = tmp_path / "model.tmp"
    left.mkdir()
    (left / "part").write_text("of a process that was killed")
    with whole_folder(tmp_path / "model") as being_written:
        assert being_written == left and not left.exists()
        being_written.mkdir()
        (being_written / "weights").write_text("new")
        assert not (tmp_path / "model").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "weights"]


def test_nothing_is_left_of_a_folder_whose_writing_fails(tmp_path: Path) -> None:
    def write() -> None:
        with whole_folder(tmp_path / "model") as being_written:
            being_written.mkdir()
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write()
    assert list(tmp_path.iterdir()) == []
