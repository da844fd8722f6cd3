from pathlib import Path

import pytest

from actors.config.places import in_object_storage, resolved, within
from orchestrator.config.load import ConfigError, load_config


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output=hdfs://a/runs", r"output: hdfs://a/runs begins with hdfs://; a path, or an address of s3, gs, .* would do"),
        ("output=s3://key:secret@bucket/runs", r"output: an address of s3:// holds a key, .* would do"),
        ("scores.root=ftp://host/a", r"scores: ftp://host/a begins with ftp://; a path, or an address of s3, gs, .* would do"),
        ("scores.path=s3:///a", r"scores: s3:///a names no bucket; s3://bucket/folder would do"),
        ("data.source={kind: files, path: 'hdfs://a/b'}", r"data.source.*path: hdfs://a/b begins with hdfs://; a path, or an a"),
        ("checkpoints=hdfs://a/b", r"checkpoints: hdfs://a/b begins with hdfs://; a path, or an address of s3, gs, .* would do"),
        ("export.publish=/mnt/students", r"export.publish: '/mnt/students' is no address in object storage; s3://bucket/folder"),
    ],
)
def test_a_place_that_cannot_be_is_refused_with_its_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("configs/tiny_cpu.yaml", [override])


def test_addresses_are_kept_as_they_are_and_a_slash_at_the_end_is_not() -> None:
    overrides = ["scores.root=s3://bucket/scores/", "export.publish=gs://bucket/students/"]
    config = load_config("configs/tiny_cpu.yaml", overrides)
    assert (config.score_root, config.export.publish) == ("s3://bucket/scores", "gs://bucket/students")


def test_a_run_stands_in_its_output_and_each_node_has_a_copy_of_one_in_object_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATKD_CACHE", "/cache")
    config = load_config("configs/tiny_cpu.yaml", ["output=s3://bucket/runs/"])
    assert (config.place, config.score_root) == ("s3://bucket/runs/tiny_cpu", "s3://bucket/runs/scores")
    assert config.mirror is not None and config.mirror.address == config.place
    assert str(config.run_dir) == config.mirror.folder and config.mirror.folder.startswith("/cache/runs/bucket-")
    config = load_config("configs/tiny_cpu.yaml", ["output=/mnt/runs"])
    assert (config.place, str(config.run_dir), config.mirror) == ("/mnt/runs/tiny_cpu", "/mnt/runs/tiny_cpu", None)
    assert config.score_root == "/mnt/runs/scores"
