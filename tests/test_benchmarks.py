"""The benchmarks run, on the smallest of problems; what they share is right. Nothing here looks at a time."""

import sys
from pathlib import Path

import pytest
import torch

from actors.examples import write_examples
from benchmarks import losses, truncation
from benchmarks.bars import Bar, alternating_seconds, median_ratio, peak_bytes, print_table, report
from tests.worlds import random_examples, tiny_llama


def test_a_bar_says_what_was_wanted_and_whether_it_was_met(capsys: pytest.CaptureFixture[str]) -> None:
    assert str(Bar("speed", 1.204, 1.25)) == "bar speed measured 1.2 wanted <=1.25 met"
    assert str(Bar("speed", 0.85, 0.9, at_least=True)) == "bar speed measured 0.85 wanted >=0.9 missed"
    assert report([Bar("a", 1.0, 1.0)]) == 0
    assert report([Bar("a", 1.0, 1.0), Bar("b", 2.0, 1.0)]) == 1
    assert "bar b measured 2 wanted <=1 missed" in capsys.readouterr().out


def test_tasks_take_turns_and_the_first_turn_does_not_count() -> None:
    turns: list[str] = []
    seconds = alternating_seconds({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, rounds=2)
    assert turns == ["a", "b"] * 3 and [len(values) for values in seconds.values()] == [2, 2]
    assert median_ratio([1.0, 3.0, 8.0], [1.0, 1.0, 2.0]) == 3.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of memory on the CPU")
def test_the_peak_is_that_of_the_worst_moment() -> None:
    def task() -> None:
        for _ in range(3):
            torch.zeros(1 << 18)  # 1 MiB, gone before the next
        kept = torch.ones(1 << 19)
        (kept + 1).sum()

    assert 4.0 <= peak_bytes(task) / 2**20 < 4.1


def test_a_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "ms"], [["a", "100"], ["longer", "2"]])
    assert capsys.readouterr().out.splitlines() == [
        "| name   | ms  |", "| ------ | --- |", "| a      | 100 |", "| longer | 2   |",
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of memory on the CPU")
def test_the_losses_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(losses, "TARGETS", 12)
    monkeypatch.setattr(losses, "HIDDEN", 8)
    bars = losses.measure(200, rounds=1, device=torch.device("cpu"), dtype=torch.float32)
    assert {"time ATKD, K=64, V=200", "memory forward KL, K=64, V=200", "time adaptive KL, dense, V=200"} <= {
        bar.name for bar in bars
    }
    assert all(bar.measured > 0 for bar in bars if bar.name.startswith("time"))
    assert "| ATKD, hidden states and teacher head" in capsys.readouterr().out


def test_what_truncation_costs_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate(("teacher_finetuned", "student_finetuned")):
        tiny_llama(tmp_path / "models" / name, seed=seed)
    (tmp_path / "data").mkdir()
    write_examples(tmp_path / "data" / "heldout.arrow", random_examples(6, seed=0))
    monkeypatch.setattr(sys, "argv", ["truncation", str(tmp_path), "--targets", "30"])
    assert truncation.main() == 0
    lines = capsys.readouterr().out.splitlines()
    forward = next(line for line in lines if line.startswith("| forward KL"))
    off = [float(cell.split("%")[0]) for cell in forward.split("|")[2:6]]
    assert off == sorted(off, reverse=True) and off[0] > off[-1], "a larger K is nearer"
