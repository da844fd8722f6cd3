"""The script that compares two runs finds what differs, and nothing else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def compared(*folders: Path) -> tuple[int, str]:
    command = [sys.executable, "scripts/same_results.py", *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    ours = tmp_path / "ours"
    (ours / "metrics").mkdir(parents=True)
    (ours / "student").mkdir()
    (ours / "student" / "model.safetensors").write_bytes(b"weights")
    (ours / "table.json").write_text(json.dumps({"rows": [{"metric": "heldout_loss", "values": [1.5], "seconds": 3}]}))
    (ours / "metrics" / "train.jsonl").write_text('{"step": 1, "loss": 0.5, "seconds": 2}\n')
    (ours / "trials.csv").write_text('"trial","seconds","loss"\n1,2.5,0.25\n')
    theirs = tmp_path / "theirs"
    shutil.copytree(ours, theirs)
    return ours, theirs


def test_times_do_not_count(runs: tuple[Path, Path]) -> None:
    (runs[1] / "metrics" / "train.jsonl").write_text('{"step": 1, "loss": 0.5, "seconds": 9}\n')
    (runs[1] / "trials.csv").write_text('"trial","seconds","loss"\n1,9.5,0.25\n')
    assert compared(*runs) == (0, "the same, bit for bit\n")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("student/model.safetensors", "weighted"),
        ("table.json", '{"rows": []}'),
        ("metrics/train.jsonl", '{"step": 1, "loss": 0.25, "seconds": 2}\n'),
        ("trials.csv", '"trial","seconds","loss"\n1,2.5,0.5\n'),
    ],
)
def test_what_differs_is_named(runs: tuple[Path, Path], file: str, content: str) -> None:
    (runs[1] / file).write_text(content)
    assert compared(*runs) == (1, f"{file} differs\n")
    (runs[1] / file).unlink()
    assert compared(*runs) == (1, f"{runs[1] / file} is not there\n")


def test_two_folders_are_needed(tmp_path: Path) -> None:
    code, said = compared(tmp_path)
    assert code == 2 and "two folders of runs are needed" in said
