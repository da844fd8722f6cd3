import os
import time
from pathlib import Path

import pytest

from actors.storage import local_copies
from actors.storage.local_copies import LocalCopies, cache_bytes

PLACE = "s3://bucket/store"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ATKD_CACHE_GIB", str(100 / 2**30))
    return tmp_path / "cache"


def keep(copies: LocalCopies, name: str, size: int) -> Path | None:
    return copies.keep(name, size, lambda: b"x" * size)


def total(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.glob("*/*"))


def test_a_copy_is_found_by_all_who_name_the_place(cache: Path) -> None:
    kept = keep(LocalCopies(PLACE), "a", 10)
    assert kept is not None and kept.read_bytes() == b"x" * 10
    assert LocalCopies(PLACE).find("a") == kept
    assert LocalCopies("s3://bucket/another").find("a") is None


def test_no_more_is_kept_than_the_limit_and_what_is_in_use_stays(cache: Path) -> None:
    copies = LocalCopies(PLACE)
    assert keep(copies, "a", 60) is not None
    assert keep(copies, "b", 60) is None
    assert keep(copies, "c", 40) is not None
    assert keep(copies, "d", 101) is None
    assert total(cache) == 100
    assert copies.find("a") is not None


def test_what_was_idle_longest_gives_way(cache: Path) -> None:
    copies = LocalCopies(PLACE)
    old, older = keep(copies, "a", 40), keep(copies, "b", 40)
    assert old is not None and older is not None
    now = time.time()
    os.utime(old, (now - 5000, now - 5000))
    os.utime(older, (now - 9000, now - 9000))
    assert keep(LocalCopies("s3://bucket/another"), "c", 50) is not None
    assert old.exists() and not older.exists()
    assert copies.find("b") is None
    LocalCopies(PLACE).find("a")  # used again
    assert keep(copies, "d", 50) is None


def test_a_count_that_went_wrong_is_made_anew(cache: Path) -> None:
    copies = LocalCopies(PLACE)
    keep(copies, "a", 40)
    (cache / "used").write_text("1000000")  # of a process that was killed before it wrote what it had made room for
    assert keep(copies, "b", 50) is not None
    assert (cache / "used").read_text() == "90"
    (cache / "used").write_text("rubbish")
    assert keep(copies, "c", 20) is None


def test_a_copy_that_cannot_be_written_is_done_without(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert keep(LocalCopies(PLACE), "a", 10) is None
    assert not list(cache.glob("*/*"))


def test_the_trouble_of_whom_is_read_from_is_not_taken_for_the_disks(cache: Path) -> None:
    def broken() -> bytes:
        raise OSError("the network")

    with pytest.raises(OSError, match="the network"):
        LocalCopies(PLACE).keep("a", 10, broken)
    assert not list(cache.glob("*/*"))


def test_a_copy_goes_when_it_is_dropped(cache: Path) -> None:
    copies = LocalCopies(PLACE)
    keep(copies, "a", 10)
    assert copies.drop("a") and not copies.drop("a")
    assert copies.find("a") is None


def test_use_is_noted_from_time_to_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = LocalCopies(PLACE)
    kept = keep(copies, "a", 10)
    assert kept is not None
    os.utime(kept, (0, 0))
    assert copies.find("a") == kept and kept.stat().st_mtime == 0  # just written
    monkeypatch.setattr(local_copies, "TOUCH_SECONDS", 0.0)
    assert copies.find("a") == kept and kept.stat().st_mtime > 0


@pytest.mark.parametrize("text", ["much", "-1", "inf", "nan"])
def test_a_size_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATKD_CACHE_GIB", text)
    with pytest.raises(ValueError, match=rf"ATKD_CACHE_GIB is '{text}', which is no size; ATKD_CACHE_GIB=50 would do"):
        cache_bytes()
