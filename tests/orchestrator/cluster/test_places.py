"""Places where libraries write: homes that are missing or cannot be written, temporary folders of long names."""

import os
import re
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import Whitespace

from orchestrator.cluster.places import (
    LONGEST_SOCKET,
    RAY_SOCKET,
    can_be_written,
    home_of,
    home_stand_ins,
    ray_folder,
    ray_token_wanted,
    settle_home,
    short_parent,
    write_token,
)
from tests.worlds import tiny_llama, word_tokenizer

HOME = Path("/home/someone")


def anywhere(folder: Path) -> bool:
    return True


def nowhere(folder: Path) -> bool:
    return False


def test_a_home_that_can_be_written_changes_nothing() -> None:
    assert home_stand_ins({}, HOME, anywhere) == {}
    assert not ray_token_wanted({}, HOME, anywhere)


def test_each_library_gets_another_place_where_the_home_cannot_be_written() -> None:
    names = home_stand_ins({}, HOME, nowhere)
    assert {"HF_HOME", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "MPLCONFIGDIR", "TRITON_CACHE_DIR"} <= set(names)
    assert "HF_HUB_CACHE" not in names, "it stands below HF_HOME"
    assert "HF_HOME" not in home_stand_ins({"HF_HOME": "/models"}, HOME, nowhere), "what the user says stands"
    assert home_stand_ins({}, None, anywhere) == {"HOME": "home"}


def test_a_cache_that_can_only_be_read_still_serves(tmp_path: Path) -> None:
    (tmp_path / ".cache" / "huggingface" / "hub").mkdir(parents=True)
    names = home_stand_ins({}, tmp_path, nowhere)
    assert "HF_HOME" not in names and "HF_HUB_CACHE" not in names and "HF_DATASETS_CACHE" in names


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, True),
        ({"RAY_ADDRESS": "local"}, True),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, False),
        ({"RAY_AUTH_MODE": "disabled"}, False),
        ({"RAY_AUTH_TOKEN": "x"}, False),
        ({"RAY_AUTH_TOKEN_PATH": "/x"}, False),
    ],
)
def test_a_token_is_made_for_a_private_ray_alone(environment: Mapping[str, str], wanted: bool) -> None:
    assert ray_token_wanted(environment, HOME, nowhere) == wanted


def test_a_token_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = write_token(tmp_path / "token")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and re.fullmatch("[0-9a-f]{64}", path.read_text())
    with pytest.raises(FileExistsError):
        write_token(path)


def test_the_home_of_a_user_whom_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert home_of({"HOME": "/x"}) == Path("/x") and home_of({"HOME": ""}) == Path("/")
    monkeypatch.setattr(os, "getuid", lambda: 3_999_999_999)
    assert home_of({}) is None


def test_whether_a_folder_can_be_written_is_tried(tmp_path: Path) -> None:
    assert can_be_written(tmp_path) and can_be_written(tmp_path / "not" / "yet")
    assert not can_be_written(Path("/proc/nonexistent"))
    assert list(tmp_path.iterdir()) == []


def test_no_temporary_place_either_names_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/proc/nonexistent")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(
        ValueError,
        match=r"the home folder /proc/nonexistent cannot be written, and neither "
        r".*TMPDIR=/a/folder would",
    ):
        settle_home()


def test_ray_keeps_its_folder_where_its_sockets_fit() -> None:
    assert short_parent({}, 1, anywhere) is None
    assert short_parent({"TMPDIR": "/scratch/job7"}, 1, anywhere) is None
    longest = LONGEST_SOCKET - len(f"/ray/{RAY_SOCKET.format(pid=1)}")
    assert short_parent({"TMPDIR": "/" + "a" * (longest - 1)}, 1, anywhere) is None
    assert short_parent({"TMPDIR": "/" + "a" * longest}, 1, anywhere) == "/tmp"


def test_a_short_folder_is_taken_where_one_can_be_written() -> None:
    long = "/scratch/" + "a" * 80
    assert short_parent({"TMPDIR": long}, 1, lambda folder: str(folder) == "/dev/shm") == "/dev/shm"
    with pytest.raises(
        ValueError,
        match=r"TMPDIR '/scratch/a+' makes the paths of Ray's sockets \d+ bytes too long, and none "
        r"of /tmp, ",
    ):
        short_parent({"TMPDIR": long}, 1, nowhere)
    with pytest.raises(ValueError, match=r"RAY_TMPDIR '/scratch/a+' makes .* too long; RAY_TMPDIR=/tmp, or another short folder"):
        short_parent({"RAY_TMPDIR": long}, 1, anywhere)
    with pytest.raises(ValueError, match=r"RAY_TMPDIR '/x' is no folder in which Ray can write"):
        short_parent({"RAY_TMPDIR": "/x"}, 1, nowhere)


def test_the_folder_for_sockets_goes_when_ray_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/scratch/" + "a" * 80)
    with ray_folder() as folder:
        assert folder is not None and Path(folder).is_dir() and os.environ["VLLM_RPC_BASE_PATH"] == folder
        said = capsys.readouterr().err
        assert re.search(rf"note: the temporary folder /scratch/a+ does not serve Ray's sockets; they go to {folder}\n", said)
    assert not Path(folder).exists() and "VLLM_RPC_BASE_PATH" not in os.environ


@pytest.mark.drill
@pytest.mark.ray
@pytest.mark.slow
def test_a_run_without_a_home_and_with_a_long_temporary_folder(tmp_path: Path) -> None:
    long = tmp_path / ("a" * 60) / ("b" * 60)
    long.mkdir(parents=True)
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "XDG_", "HF_HOME"))}
    surroundings |= {"HOME": "/proc/nonexistent", "TMPDIR": str(long), "RAY_USAGE_STATS_ENABLED": "0"}
    pair = ["tokenizer=null", "teacher.finetune=null", "student.finetune=null", "evaluate.answer_pattern=null"]
    for role in ("teacher", "student"):
        tokenizer = word_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save_pretrained(tiny_llama(tmp_path / role, seed=1, hidden_size=64))
        pair.append(f"{role}.model={{kind: pretrained, name: {tmp_path / role}}}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"instruction": "w{n}", "input": "", "response": "w{n + 1} w7"}}\n' for n in range(20, 60)))
    source = f"data.source={{kind: files, path: {rows}}}"
    command = [sys.executable, "-m", "orchestrator", "score", "configs/tiny_cpu.yaml", f"output={tmp_path}", source, *pair]
    asked = ["data.heldout_rows=8", "data.max_tokens=32", "evaluate.max_new_tokens=8", "scores.top_k=8"]
    done = subprocess.run([*command, *asked], capture_output=True, text=True, timeout=400, env=surroundings)
    assert done.returncode == 0, done.stderr
    assert "note: the home folder /proc/nonexistent cannot be written; " in done.stderr
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr, "with token authentication, which is Ray's own choice"
    assert f"note: the temporary folder {long} does not serve Ray's sockets; they go to " in done.stderr
    assert "score: train complete" in done.stdout and "Traceback" not in done.stderr
    assert not list(long.glob("atkd-*")), "what was made for this command goes with it"
