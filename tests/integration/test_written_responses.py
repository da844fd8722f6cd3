"""Whole runs that learn from what the teacher, or the student, writes; tiny models, real Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.examples import ExampleFile
from actors.monitors.metrics_log import read_metrics
from actors.rollouts.writing import repeated_share
from actors.score_store.store import ScoreStore

MOST = 12
RUN = [
    "tokenizer.vocab_size=400", "data.source.rows=120", "data.heldout_rows=12", "data.max_tokens=96", "scores.top_k=16",
    "scores.rows_per_shard=32", "teacher.model.hidden_size=64", "teacher.model.layers=1", "teacher.model.heads=2",
    "teacher.finetune.train.epochs=20", "teacher.finetune.workers.cpus=1", "teacher.engine.kind=transformers",
    "student.model.hidden_size=32", "student.model.heads=2", "student.model.layers=1", "student.finetune=null", "train.epochs=3",
    "train.batch_rows=16", "evaluate.generate_rows=0", "evaluate.cpus=1",
]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.drill]


def orchestrator(command: str, output: Path, *overrides: str) -> str:
    """Run a command to its end; return what it said."""
    call = [sys.executable, "-m", "orchestrator", command, "configs/tiny_cpu.yaml", f"output={output}", *RUN, *overrides]
    done = subprocess.run(call, capture_output=True, text=True, timeout=600, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


BY_TEACHER = ("name=teacher", f"responses={{writer: teacher, max_new_tokens: {MOST}, temperature: 0}}")
BY_STUDENT = ("name=student", f"responses={{writer: student, max_new_tokens: {MOST}, samples_per_prompt: 2}}")


@pytest.fixture(scope="module")
def by_teacher(output: Path) -> str:
    return orchestrator("run", output, *BY_TEACHER)


def files_of(run: Path) -> tuple[ExampleFile, ExampleFile, list[int]]:
    """The data's own rows, the written ones, and the tokens at which answers end."""
    ends = json.loads((run / "stages" / "prepare.json").read_text())["answer_ends"]
    return ExampleFile(run / "data" / "train.arrow"), ExampleFile(run / "data" / "written.arrow"), ends


def test_rows_are_the_prompts_and_what_the_fine_tuned_teacher_writes(by_teacher: str, output: Path) -> None:
    run = output / "teacher"
    own, written, ends = files_of(run)
    assert len(written) == len(own)
    model = AutoModelForCausalLM.from_pretrained(run / "models" / "teacher_finetuned", dtype=torch.float32).eval()
    others = 0
    for place in range(len(own)):
        assert written[place].last_prompt.tolist() == own[place].last_prompt.tolist()
        others += written[place].targets.tolist() != own[place].targets.tolist()
        if place % 10:
            continue
        text, prompt = own[place].last_prompt.tolist(), len(own[place].last_prompt)
        while len(text) - prompt < MOST and text[prompt:][-1:] not in [[end] for end in ends]:
            with torch.inference_mode():
                text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        assert written[place].token_ids.tolist() == text
    assert others > len(own) / 4, "a small teacher writes other answers than the data has"


def test_what_was_written_is_counted_and_said(by_teacher: str, output: Path) -> None:
    run = output / "teacher"
    _, written, ends = files_of(run)
    responses = [written[place].targets.tolist() for place in range(len(written))]
    facts = json.loads((run / "stages" / "respond.json").read_text())["written"]
    assert (facts["rows"], facts["tokens"]) == (len(responses), sum(map(len, responses)))
    assert facts["ended"] == sum(response[-1] in ends for response in responses) > 0
    assert facts["empty"] == sum(len(response) == 1 and response[0] in ends for response in responses)
    assert facts["repeated"] == pytest.approx(sum(repeated_share(response) for response in responses))
    assert f"respond: {len(responses)} responses by the teacher, {facts['tokens'] / len(responses):.1f} tokens each" in by_teacher
    stages = [by_teacher.index(line) for line in ("finetune_teacher: done", "respond: done", "score: train complete")]
    assert stages == sorted(stages)


def test_the_store_holds_the_written_rows_and_the_student_learned_from_them(by_teacher: str, output: Path) -> None:
    run = output / "teacher"
    _, written, _ = files_of(run)
    store = ScoreStore(json.loads((run / "scores.json").read_text())["train"])
    store.verify()
    assert store.complete and store.identity["examples"] == {"hash": written.hash, "rows": len(written)}
    steps = [step["loss"] for step in read_metrics(run / "metrics" / "train.jsonl") if "loss" in step]
    assert len(steps) >= 3 and steps[-1] < steps[0]
    assert (run / "student" / "model.safetensors").is_file() and (run / "report.html").is_file()


def test_the_same_command_again_writes_nothing(by_teacher: str, output: Path) -> None:
    files = sorted((output / "teacher" / "data").rglob("*.arrow"))
    before = [path.stat().st_mtime_ns for path in files]
    assert "respond: done before" in orchestrator("run", output, *BY_TEACHER)
    assert [path.stat().st_mtime_ns for path in files] == before


def test_the_student_as_it_begins_can_write_instead(output: Path) -> None:
    said = orchestrator("train", output, *BY_STUDENT)
    run = output / "student"
    own, written, _ = files_of(run)
    assert len(written) == 2 * len(own)
    first, second = ([written[place].targets.tolist() for place in range(start, start + len(own))] for start in (0, len(own)))
    assert written.rows.tolist() == 2 * own.rows.tolist()
    assert sum(one == other for one, other in zip(first, second, strict=True)) < len(own) / 10, "samples of a prompt differ"
    assert f"respond: {2 * len(own)} responses by the student" in said
    assert "the student learns few ends" in said  # random weights seldom end
    assert ScoreStore(json.loads((run / "scores.json").read_text())["train"]).complete
