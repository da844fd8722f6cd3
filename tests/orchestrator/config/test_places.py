from pathlib import Path

import pytest

from actors.config.places import in_object_storage, resolved, within


def test_paths_become_absolute_and_addresses_lose_the_slash_at_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolved("scores") == str(tmp_path / "scores")
    assert resolved("s3://bucket/a/b/") == "s3://bucket/a/b"
    assert resolved("s3://bucket/a/?region=eu-west-1") == "s3://bucket/a?region=eu-west-1"
    assert resolved("abfs://container@account.dfs.core.windows.net/a") == "abfs://container@account.dfs.core.windows.net/a"
    assert in_object_storage("gs://bucket") and not in_object_storage(tmp_path)


def test_a_name_within_goes_before_what_an_address_says_of_its_region() -> None:
    assert within("s3://bucket/a?region=eu-west-1", "b") == "s3://bucket/a/b?region=eu-west-1"
    assert within("/a", "b") == "/a/b"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("ftp://host/a", "ftp://host/a begins with ftp://; a path, or an address of s3, gs, abfs, abfss would do"),
        ("s3:///a", "s3:///a names no bucket; s3://bucket/folder would do"),
        ("s3://key:secret@bucket/a", "an address of s3:// holds a key, .*the environment's .* would do"),
    ],
)
def test_what_is_no_address_is_refused_and_a_key_not_repeated(place: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        resolved(place)
    assert "secret@" not in str(refused.value)
