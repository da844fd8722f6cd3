"""Whole runs in which the student learns from what it writes: real Ray and Ray Train, samplers and teacher beside them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import AutoModelForCausalLM

from actors.dataloader.row_sources import written_by_student
from actors.examples import ExampleFile
from actors.monitors.metrics_log import read_metrics
from actors.score_store.rollout_log import RolloutLog

pytestmark = [pytest.mark.slow, pytest.mark.ray]

TINY = [
    "tokenizer.vocab_size=400", "data.source.rows=160", "data.heldout_rows=16", "data.max_tokens=96", "scores.top_k=16",
    "scores.rows_per_shard=32", "teacher.model.hidden_size=64", "teacher.model.layers=1", "teacher.model.heads=2",
    "teacher.finetune.train.epochs=1", "teacher.finetune.workers.cpus=1", "teacher.engine.kind=transformers",
    "teacher.engine.cpus=0.5", "student.model.hidden_size=32", "student.model.heads=2", "student.model.layers=1",
    "student.finetune=null", "workers.cpus=0.5", "train.epochs=1", "train.batch_rows=12", "train.checkpoint_every_steps=4",
    "evaluate.generate_rows=4", "evaluate.max_new_tokens=4", "evaluate.cpus=1",
]  # fmt: skip
STEPS = 12


def command(output: Path, name: str, rollouts: str, *overrides: str) -> list[str]:
    settings = [f"output={output}", f"name={name}", *TINY, f"rollouts={{max_new_tokens: 12, {rollouts}}}", *overrides]
    return [sys.executable, "-m", "orchestrator", "run", "configs/tiny_cpu.yaml", *settings]


def finish(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=600)  # type: ignore[arg-type]


def test_a_run_mixes_the_datas_rows_with_what_the_student_writes(tmp_path: Path) -> None:
    engine = "{kind: transformers, dtype: float32, cpus: 0.2, replicas: 2}"
    settings = f"student_share: 0.5, lag: 1, refresh_steps: 2, engine: {engine}"
    done = finish(tmp_path, "mixed", settings)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "mixed"
    log, examples = RolloutLog(folder / "rollouts" / "log"), ExampleFile(folder / "data" / "train.arrow")
    for step in range(1, STEPS + 1):
        mine = [row for row in range((step - 1) * 12, step * 12) if written_by_student(0, step, 12, 0.5)[row % 12]]
        rows = log.examples(step)
        assert rows.rows.tolist() == [examples.row(row) for row in mine]
        assert {one.weights_step for one in log.sampled(step)} == {max(0, (step - 1) // 2 - 1) * 2}
    steps = read_metrics(folder / "metrics" / "rollouts.jsonl")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(line["hand_over_largest_gap"] < 1e-4 for line in steps if "hand_over_gap" in line)
    assert sum("hand_over_gap" in line for line in steps) == 4, "after steps 2, 4, 6 and 8"
    assert not list((folder / "rollouts" / "weights").glob("*"))
    page = (folder / "report.html").read_text()
    assert "What the student writes" in page and "Sampler beside trainer" in page and "<h3>Step 12</h3>" in page
    again = finish(tmp_path, "mixed", settings)
    assert again.returncode == 0 and "train: done in" not in again.stdout


@pytest.mark.drill
@pytest.mark.parametrize("wire", ["candidates", "hidden"])
def test_a_run_by_another_wire_has_what_it_asks_for_and_keeps_to_it(tmp_path: Path, wire: str) -> None:
    rollouts = "student_share: 1.0, lag: 1, engine: {kind: transformers, dtype: float32, cpus: 0.2}"
    overrides = ["teacher.engine.kind=vllm", "train.epochs=0.5", "loss={kind: coupled, divergence: reverse_kl}"]
    done = finish(tmp_path, wire, f"wire: {wire}, {rollouts}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    log = RolloutLog(tmp_path / wire / "rollouts" / "log")
    scores = log.scores(1, 0)
    if wire == "candidates":
        assert scores.topk_ids.shape[1] == 2 * 16 and scores.hidden is None
    else:
        assert scores.topk_ids.shape[1] == 16 and scores.hidden is not None and scores.hidden.shape[1] == 64
    losses = [line["loss"] for line in read_metrics(tmp_path / wire / "metrics" / "train.jsonl")]
    assert losses and np.isfinite(losses).all()
    other = finish(tmp_path, wire, f"wire: top_k, {rollouts}", *overrides)
    assert other.returncode != 0 and "rollouts.wire" in other.stdout + other.stderr
@pytest.mark.drill
def test_two_workers_learn_from_what_both_models_write_as_one_does(tmp_path: Path) -> None:
    engine = "{kind: transformers, dtype: float32, cpus: 0.2}"
    rollouts = f"student_share: 0.7, teacher_share: 0.3, refresh_steps: 2, inner_epochs: 2, engine: {engine}"
    rollouts += f", teacher_engine: {engine}"
    loss = ["loss={kind: policy_gradient, corpus_weight: 0.5}", "train.epochs=0.5", "train.micro_batch_rows=5"]
    for workers in (1, 2):
        done = finish(tmp_path, f"of-{workers}", rollouts, *loss, f"workers={{count: {workers}, cpus: 0.3}}")
        assert done.returncode == 0, done.stdout + done.stderr
    folders, deals = [tmp_path / "of-1", tmp_path / "of-2"], STEPS // 2
    one, two = (read_metrics(folder / "metrics" / "train.jsonl") for folder in folders)
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, 2 * deals + 1))
    assert [line["tokens"] for line in one] == [line["tokens"] for line in two]
    for key in ("loss", "divergence", "clipped_share", "gradient_norm"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=2e-3, abs=1e-4), key
    logs = [RolloutLog(folder / "rollouts" / "log") for folder in folders]
    for deal in range(1, deals + 1):
        assert logs[0].examples(deal).hash == logs[1].examples(deal).hash
        assert {sampled.weights_step for sampled in logs[1].sampled(deal)} == {(deal - 1) // 2 * 4}
        assert all(sampled.drawn_logprobs is not None for sampled in logs[1].sampled(deal))
    assert {path.name for path in (folders[1] / "logs").glob("*sampler*")} == {"sampler-0.log", "teacher-sampler-0.log"}
    lines = read_metrics(folders[1] / "metrics" / "rollouts.jsonl")
    assert [line["step"] for line in lines] == list(range(1, deals + 1))
    assert all(0 < line["effective_share"] <= 1 for line in lines)


@pytest.mark.drill
def test_a_run_whose_driver_is_killed_between_steps_ends_with_the_same_student(tmp_path: Path) -> None:
    rollouts = "student_share: 1.0, engine: {kind: transformers, dtype: float32, cpus: 0.2}"
    whole = finish(tmp_path, "whole", rollouts)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    run = subprocess.Popen(command(tmp_path, "killed", rollouts), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shard, deadline = tmp_path / "killed" / "rollouts" / "log" / "shard-00005.json", time.monotonic() + 400
    while not shard.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    children = psutil.Process(run.pid).children(recursive=True)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    psutil.wait_procs(children, timeout=60)  # its Ray ends with it
    log = RolloutLog(tmp_path / "killed" / "rollouts" / "log")
    there = [step for step in range(1, STEPS + 1) if log.is_there(step)]
    assert 6 <= len(there) < STEPS, "it was killed on the way"
    written = {step: log.examples(step).hash for step in there}
    done = finish(tmp_path, "killed", rollouts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {step: log.examples(step).hash for step in there} == written
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "student").state_dict() for name in ("whole", "killed")]
    assert all((weight == weights[1][name]).all() for name, weight in weights[0].items())
    lines = read_metrics(tmp_path / "killed" / "metrics" / "rollouts.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


@pytest.mark.drill
def test_a_sampler_that_is_killed_is_started_again_and_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    rollouts = "student_share: 1.0, engine: {kind: transformers, dtype: float32, cpus: 0.2}"
    run = subprocess.Popen(command(tmp_path, "sampler", rollouts), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    shard, deadline = tmp_path / "sampler" / "rollouts" / "log" / "shard-00002.json", time.monotonic() + 400
    while not shard.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    samplers = [
        process for process in psutil.Process(run.pid).children(recursive=True)
        if re.search(r"ray::RolloutWorker", " ".join(process.cmdline()))
    ]  # fmt: skip
    assert len(samplers) == 1
    samplers[0].kill()
    printed, _ = run.communicate(timeout=600)
    assert run.returncode == 0, printed
    log = RolloutLog(tmp_path / "sampler" / "rollouts" / "log")
    assert [log.sampled(step)[0].weights_step for step in range(1, STEPS + 1)] == list(range(STEPS))
    lines = read_metrics(tmp_path / "sampler" / "metrics" / "rollouts.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


@pytest.mark.drill
def test_the_papers_table_is_a_comparison_that_ends(tmp_path: Path) -> None:
    settings = [one for one in TINY if not one.startswith("student.finetune")]
    few = [*settings, "rollouts.max_new_tokens=8", "rollouts.engine={kind: transformers, dtype: float32, cpus: 0.2}",
           "compare.seeds=1", "compare.learning_rates=[]", "compare.rungs=2", "student.finetune.train.epochs=0.2"]  # fmt: skip
    command = [sys.executable, "-m", "orchestrator", "compare", "configs/paper_table2.yaml", f"output={tmp_path}", *few]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("completed") == 8 + 1, "eight arms, and the line about the best"
