"""Models that a configuration names by an address in object storage."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.model_cache.object_storage import copy_folder
from actors.storage.folder import open_folder
from actors.storage.transfers import upload
from orchestrator.cli import main
from orchestrator.config.load import ConfigError, load_config
from orchestrator.config.run import RunConfig
from orchestrator.models.models import Models, renew_copies
from orchestrator.models.stored_models import renew
from tests.s3_world import BUCKET, Faults, faulty_storage, s3_server
from tests.worlds import tiny_llama

ADDRESS = f"s3://{BUCKET}/models/tiny"


@pytest.fixture
def faults(tmp_path: Path) -> Iterator[Faults]:
    with s3_server(tmp_path) as endpoint, faulty_storage(tmp_path, endpoint) as faults:
        upload(tiny_llama(tmp_path / "tiny", seed=1), f"s3://{BUCKET}/models")
        yield faults
    renew.cache_clear()


def pair(tmp_path: Path, *overrides: str) -> RunConfig:
    model = f"{{kind: pretrained, name: '{ADDRESS}'}}"
    return load_config("configs/tiny_cpu.yaml", [
        "tokenizer=null", f"teacher={{model: {model}}}", f"student={{model: {model}}}", f"output={tmp_path}", *overrides,
    ])  # fmt: skip


def test_a_model_is_its_copy_on_this_node_and_renewed_when_a_command_begins(faults: Faults, tmp_path: Path) -> None:
    config = pair(tmp_path)
    models = Models(config, config.run_dir)
    copy = Path(models.named("student").name)
    assert copy.is_relative_to(tmp_path / "cache") and models.ready("teacher").name == str(copy)
    assert (copy / "model.safetensors").read_bytes() == (tmp_path / "tiny" / "model.safetensors").read_bytes()
    assert config.student.model.name == ADDRESS, "what is written down is the address"  # type: ignore[union-attr]

    open_folder(ADDRESS).write("chat_template.jinja", b"new")
    assert not (Path(models.named("student").name) / "chat_template.jinja").exists(), "a process knows one model"
    renew.cache_clear()  # as in another process
    renew_copies(config)
    assert (copy / "chat_template.jinja").read_bytes() == b"new"


def test_a_plan_takes_no_weights_and_says_the_same(
    faults: Faults, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for where in (ADDRESS, str(tmp_path / "tiny")):
        model = f"{{model: {{kind: pretrained, name: '{where}'}}}}"
        main(["plan", "configs/tiny_cpu.yaml", "tokenizer=null", f"teacher={model}", f"student={model}", f"output={tmp_path}"])
        said.append([line for line in capsys.readouterr().out.splitlines() if "copying" not in line])
    assert said[0] == said[1] and any(line.split()[:2] == ["teacher", "4,144"] for line in said[0])
    copied = {path.suffix for path in copy_folder(ADDRESS).iterdir()}
    assert ".json" in copied and ".safetensors" not in copied


def test_a_model_that_cannot_be_copied_is_told_by_its_key(faults: Faults, tmp_path: Path) -> None:
    config = pair(tmp_path, f"student.model.name=s3://{BUCKET}/nothing")
    with pytest.raises(ValueError, match=rf"student.model.name s3://{BUCKET}/nothing: no model stands there"):
        Models(config, config.run_dir).named("student")
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "models").touch()
    with pytest.raises(ValueError, match=rf"teacher.model.name {ADDRESS} cannot be copied: .*(Not a directory|File exists)"):
        renew_copies(pair(tmp_path))
    renew.cache_clear()
    faults.refuse = (403, "AccessDenied")
    with pytest.raises(ValueError, match=rf"teacher.model.name {ADDRESS}: .*access is denied: keys are missing"):
        renew_copies(pair(tmp_path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.model.name=s4://bucket/tiny", r"s4://bucket/tiny begins with s4://; a path, or an address of s3, gs"),
        ("student.model.name='s3://'", r"s3:// names no bucket"),
        ("student.model.revision=main", rf"revision main is a commit of the hub, and {ADDRESS} stands in object storage; rev"),
    ],
)
def test_an_address_that_cannot_be_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pair(tmp_path, override)
