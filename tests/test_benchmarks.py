"""The benchmarks run, on the smallest of problems; what they share is right. Nothing here looks at a time."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.config.model_kinds import ScratchModel
from actors.config.models import TrainConfig
from actors.examples import ExampleFile, write_examples
from actors.models import save_model, scratch_model
from benchmarks import batches, lease_rate, losses, onnx_rows, parity, prepare, rounding, store_scale, truncation, wires
from benchmarks.bars import Bar, alternating_seconds, median_ratio, peak_bytes, print_table, report
from benchmarks.scale import __main__ as scale
from benchmarks.scale.followers import follow
from benchmarks.scale.ray_costs import RayCosts
from benchmarks.scale.world import Case
from orchestrator.classification.onnx_model import add_onnx
from orchestrator.config.data import BuiltinSource
from orchestrator.data.sources import read_rows
from orchestrator.data.tokenizers import train_tokenizer
from orchestrator.models.models import Models
from tests.orchestrator.predicting.finished_runs import GRADING, finished
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


def test_what_the_wires_cost_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate(("teacher_finetuned", "student_finetuned")):
        tiny_llama(tmp_path / "models" / name, seed=seed)
    (tmp_path / "data").mkdir()
    write_examples(tmp_path / "data" / "heldout.arrow", random_examples(6, seed=0))
    monkeypatch.setattr(sys, "argv", ["wires", str(tmp_path), "--rows", "5", "--new-tokens", "6", "--rounds", "1"])
    assert wires.main() == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if "|" in line]
    reverse = {(line[0], line[1]): float(line[4].split("%")[0]) for line in lines[2:]}
    assert reverse["hidden", "8"] < 1 and reverse["candidates", "8"] < reverse["top_k", "8"]
    assert {(line[0], line[1]): line[2] for line in lines[2:]}["hidden", "8"] == str(4 * 8 + 12 + 2 * 16)


def test_padding_and_speed_of_passes_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = read_rows(BuiltinSource(kind="builtin", rows=100), seed=0)
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tiny = batches.Student("tiny", ScratchModel(kind="scratch", hidden_size=16, layers=1, heads=2), vocab_size=300)
    monkeypatch.setattr(batches, "ON_CPU", (tiny,))
    cuts = ["--batch-rows", "16", "--tokens", "60"]
    arguments = [*cuts, "--prompt", "{{ instruction }} ", "--response", "response", "--count", "32", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["batches", "--rows", str(rows), *arguments])
    batches.main()
    said = capsys.readouterr().out
    assert "32 rows; tokens of a row" in said and "| tiny    | 16          | 8 rows" in said
    for way in ("tokens", "packed"):
        assert f"bar tokens/s of 60 {way} over by rows, tiny, 16 rows a step measured" in said


def test_the_padding_is_what_stands_beside_the_rows_of_a_pass(tmp_path: Path) -> None:
    write_examples(tmp_path / "rows.arrow", batches.rows_of([10, 4, 8, 4], [1, 1, 1, 1]))
    examples = ExampleFile(tmp_path / "rows.arrow")
    by_rows = TrainConfig(batch_rows=4, micro_batch_rows=2)
    assert batches.padding_and_passes(examples, by_rows, steps=1) == (1 - 26 / (2 * 10 + 2 * 4), 2.0)
    by_tokens = by_rows.model_copy(update={"micro_batch_tokens": 40})
    assert batches.padding_and_passes(examples, by_tokens, steps=1) == (1 - 26 / 40, 1.0)
    packed = by_rows.model_copy(update={"micro_batch_tokens": 14, "packing": True})
    assert batches.padding_and_passes(examples, packed, steps=1) == (0, 2.0)  # 10 4 and 8 4
    drawn = batches.drawn_lengths(2000)
    assert drawn.min() >= 8 and drawn.max() == 512 and 55 < np.median(drawn) < 65


def test_faults_of_a_teacher_are_measured_beside_its_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [str(value) for row in read_rows(BuiltinSource(kind="builtin", rows=300), seed=0) for value in row.values()]
    tokenizer = train_tokenizer(texts, 400)
    shape = ScratchModel(kind="scratch", hidden_size=64, layers=2, heads=2)
    save_model(scratch_model(shape, tokenizer, len(tokenizer), 512, seed=0), tokenizer, tmp_path / "model")
    monkeypatch.setattr(parity, "DRAWS", 3)
    monkeypatch.setattr(sys, "argv", ["parity", str(tmp_path / "model"), "--targets", "300", "--dtypes"])
    parity.main()
    lines = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")}
    assert {fault.name for fault in parity.FAULTS} <= set(lines)
    assert lines["read one position late"].rstrip(" |").endswith("100%")


def test_the_scale_of_a_store_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--rows", "40", "--targets", "2000", "--shards", "5", "--batch-rows", "16"]
    monkeypatch.setattr(store_scale, "alone", lambda task, *arguments: task(*arguments))
    monkeypatch.setattr(sys, "argv", ["store_scale", *size, "--folder", str(tmp_path)])
    assert store_scale.main() == 0
    said = capsys.readouterr().out
    assert "40 rows of 50 targets, 5 shards" in said and "| rank the first step, 16 rows" in said
    assert "bar easy targets of the split, off by measured 0 wanted <=0 met" in said
    assert list(tmp_path.iterdir()) == []


def test_the_driver_is_measured_on_virtual_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--replicas", "5", "--shards", "40", "--workers", "4", "--lost", "0.2", "--without-ray", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["scale", *size])
    scale.main()
    said = capsys.readouterr().out
    assert "| 80 | 40 | 8 |" in said and "2 shards were begun again" in said
    assert "bar shards lost, or scored twice though not under way measured 0 wanted <=0 met" in said
    assert list(tmp_path.iterdir()) == []


def test_what_nodes_held_that_are_lost_is_scored_again_and_nothing_else(tmp_path: Path) -> None:
    lost = scale.drive(Case(replicas=8, speed=20_000.0, shards=400, shard_rows=800, lost=0.25), RayCosts(), tmp_path)
    assert lost.faults == 0 and lost.again == 4, "two replicas held two shards each"
    assert 0.70 < lost.share_while_lost <= 0.75


def test_a_driver_that_works_all_the_time_is_the_bound(tmp_path: Path) -> None:
    slow = scale.drive(Case(replicas=8, speed=20_000.0, shards=100, shard_rows=8), RayCosts(call=0.5), tmp_path)
    assert slow.busy_percent > 98 and slow.share < 0.11, "two shards a second, of 20 that the replicas could"


def test_a_follower_asks_for_each_shard_and_while_it_waits_for_the_first_that_is_missing(tmp_path: Path) -> None:
    case = Case(replicas=1, speed=8_000.0, shards=20, shard_rows=8)  # a shard a second
    followed = follow(case, batch_rows=80, folder=tmp_path)
    assert followed.seconds == pytest.approx(20, abs=0.3) and followed.listings == 0
    assert followed.looks == pytest.approx(20 + 2 * 20 / 0.2, rel=0.1), "a json and the news of a failure, five times a second"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_what_vllm_serves_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [str(value) for row in read_rows(BuiltinSource(kind="builtin", rows=300), seed=0) for value in row.values()]
    tokenizer = train_tokenizer(texts, 400)
    shape = ScratchModel(kind="scratch", hidden_size=64, layers=2, heads=2)
    save_model(scratch_model(shape, tokenizer, len(tokenizer), 512, seed=0), tokenizer, tmp_path / "model")
    monkeypatch.setattr(parity, "DRAWS", 3)
    arguments = ["--targets", "300", "--dtypes", "float32", "--without-faults"]
    monkeypatch.setattr(sys, "argv", ["parity", str(tmp_path / "model"), *arguments])
    assert parity.main() == 0
    assert "bar draws refused, vLLM in float32 measured 0 wanted <=0 met" in capsys.readouterr().out


def test_what_rounding_leaves_of_a_few_steps_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [str(value) for row in read_rows(BuiltinSource(kind="builtin", rows=300), seed=0) for value in row.values()]
    tokenizer = train_tokenizer(texts, 400)
    shape = ScratchModel(kind="scratch", hidden_size=32, layers=1, heads=2)
    model = scratch_model(shape, tokenizer, len(tokenizer), 512, seed=0).to(torch.bfloat16)
    save_model(model, tokenizer, tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["rounding", str(tmp_path / "model"), "--steps", "1", "2"])
    rounding.main()
    lines = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line for line in lines if line.isdigit()] == ["1", "2"]


def test_a_classifier_is_timed_as_onnx_and_as_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = finished(tmp_path, GRADING)
    student = Models(config, config.run_dir).distilled()
    facts = add_onnx(student, config.run_dir / "data" / "heldout.arrow")
    assert onnx_rows.main([str(config.run_dir), "--rows", "3", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.search(rf"^\| onnxruntime \| \d+\.\d+ +\| {facts['bytes']:,} +\|$", lines[-2])
    assert lines[-1].split()[1] == "torch"


def test_preparation_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["--rows", "600", "900", "--words", "8", "--folder", str(tmp_path)]) == 0
    lines = [line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert lines[-2:] == ["600", "900"] and not list(tmp_path.iterdir())


def test_a_way_of_preparing_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="--ways threads:2: processes:2, tasks:4 or ray_data:2 would do"):
        prepare.Way.parse("threads:2")


@pytest.mark.slow
def test_all_ways_of_preparing_leave_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = ["processes:1", "processes:2", "tasks:2", "ray_data:1"]
    assert prepare.main(["--rows", "3000", "--words", "8", "--folder", str(tmp_path), "--ways", *ways]) == 0
    printed = capsys.readouterr().out
    assert "bar files of 3,000 rows that differ measured 0 wanted <=0 met" in printed
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")][-4:] == ways


@pytest.mark.slow
def test_leases_are_taken_and_given_back_on_a_disk_and_in_storage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lease_rate.main([str(tmp_path), "--shards", "6", "--replicas", "1", "4"])
    assert "| 4 " in capsys.readouterr().out and not list(tmp_path.iterdir())
    inner = [sys.executable, "-m", "benchmarks.lease_rate", "s3://scores/rate", "--shards", "6", "--replicas", "4"]
    done = subprocess.run([sys.executable, "-m", "tests.s3_world", "5", *inner], capture_output=True, text=True, timeout=300)
    assert "bar shards/s, 4 replicas measured" in done.stdout, done.stderr
