"""Whole runs from the command line: real vLLM, real Ray Train, tiny models."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.monitors.metrics_log import read_metrics
from actors.score_store.identity import identity_hash
from actors.score_store.store import ScoreStore
from orchestrator.cli import main
from tests.judge_server import Said, serving
from tests.recovery import Record, record_recovery

TINY = [
    "tokenizer.vocab_size=400", "data.source.rows=160", "data.heldout_rows=16", "data.max_tokens=96", "scores.top_k=16",
    "scores.rows_per_shard=32", "teacher.model.hidden_size=64", "teacher.model.layers=1", "teacher.model.heads=2",
    "teacher.finetune.train.epochs=1", "teacher.finetune.workers.cpus=1", "student.model.hidden_size=32", "student.model.heads=2",
    "student.model.layers=1", "student.finetune=null", "train.epochs=12", "train.batch_rows=16", "train.checkpoint_every_steps=4",
    "evaluate.generate_rows=8", "evaluate.max_new_tokens=8", "evaluate.cpus=1",
]  # fmt: skip

SECRETS = {
    "HF_TOKEN": "hf_NotARealTokenOfAnyone", "RAY_AUTH_TOKEN": "not-a-token-of-any-cluster", "WANDB_API_KEY": "40aa7f3b55c8d6e1",
}  # fmt: skip
"""What stands in many users' environments, and must stay there."""

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def command(output: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "orchestrator", "run", "configs/tiny_cpu.yaml", f"output={output}", *TINY, *overrides]


def finish(output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    surroundings = {**os.environ, **SECRETS}
    return subprocess.run(command(output, *overrides), capture_output=True, text=True, timeout=600, env=surroundings)


def begun(output: Path, metrics: Path, steps: int, *overrides: str) -> subprocess.Popen[str]:
    """Start a run and return it once a training has logged so many steps."""
    run = subprocess.Popen(command(output, *overrides), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    while len(read_metrics(metrics)) < steps and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.05)
    assert run.poll() is None, "the run ended before it could be stopped"
    return run


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def undisturbed(output: Path) -> subprocess.CompletedProcess[str]:
    return finish(output, "name=undisturbed")


def test_a_run_goes_from_rows_to_a_report_and_says_so(undisturbed: subprocess.CompletedProcess[str], output: Path) -> None:
    assert undisturbed.returncode == 0, undisturbed.stderr
    for line in ("prepare: done in", "finetune_teacher: done in", "score: train complete", "train: done in", "evaluate: done in"):
        assert line in undisturbed.stdout
    for row in ("held-out loss", "top-1 agreement with teacher", "exact match of answers", "parameters"):
        assert row in undisturbed.stdout
    run = output / "undisturbed"
    assert f"report: {run / 'report.html'}" in undisturbed.stdout
    assert f"student: {run / 'student'}" in undisturbed.stdout
    assert (run / "report.html").stat().st_size > 20_000


def test_no_file_of_a_run_holds_a_secret_of_its_environment(undisturbed: subprocess.CompletedProcess[str], output: Path) -> None:
    files = [path for path in output.rglob("*") if path.is_file()]
    assert {"report.html", "events.jsonl", "config.yaml", "train.jsonl", "README.md"} <= {path.name for path in files}
    for secret in SECRETS.values():
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
        assert secret not in undisturbed.stdout + undisturbed.stderr


def test_the_student_learned_and_the_teacher_agrees_with_itself(
    undisturbed: subprocess.CompletedProcess[str], output: Path
) -> None:
    rows = {row["metric"]: row["values"] for row in json.loads((output / "undisturbed" / "table.json").read_text())["rows"]}
    teacher, before, after = rows["heldout_loss"]
    assert after < before - 0.3  # 108 steps, from random weights, of a teacher that itself took 5
    assert rows["kl_to_teacher"][0] == pytest.approx(0, abs=1e-4)  # what vLLM served is what a plain forward pass gives
    assert rows["top1_agreement"][0] > 0.99
    assert rows["parameters"][2] < rows["parameters"][0]


def test_the_exported_student_is_an_ordinary_folder(undisturbed: subprocess.CompletedProcess[str], output: Path) -> None:
    folder = output / "undisturbed" / "student"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("What is 1 plus 2?\n", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    assert (folder / "model.safetensors").exists()
    card = (folder / "README.md").read_text()
    identity = json.loads((output / "undisturbed" / "scores.json").read_text())["train"]
    assert identity_hash(ScoreStore(identity).identity) in card and "held-out loss" in card
    assert len(list((output / "scores").iterdir())) == 2  # training rows and held-out rows


def test_new_prompts_are_answered_as_a_plain_greedy_loop_answers_them(
    undisturbed: subprocess.CompletedProcess[str], output: Path, local_ray: None, tmp_path: Path
) -> None:
    asked = [{"instruction": f"Add {n} and {n + 1}.", "input": "" if n % 2 else f"n is {n}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    command = ["predict", str(output / "undisturbed"), str(tmp_path / "rows.jsonl"), "evaluate.cpus=0.5"]
    assert main([*command, "--engine", "transformers", "--batch-rows", "4"]) == 0
    folder = output / "undisturbed" / "student"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    answers = [json.loads(line) for line in (tmp_path / "rows.predicted.jsonl").read_text().splitlines()]
    for number, (answer, row) in enumerate(zip(answers, asked, strict=True)):
        prompt = f"{row['instruction']}\n" + (f"{row['input']}\n" if row["input"] else "")
        tokens = tokenizer(prompt)["input_ids"]
        length = len(tokens)
        while len(tokens) < length + 8 and tokens[-1] != tokenizer.eos_token_id:
            with torch.inference_mode():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        response = tokenizer.decode(tokens[length:], skip_special_tokens=True)
        assert answer == {"row": number, "prompt": prompt, "response": response}


def test_the_same_command_again_does_nothing_twice(undisturbed: subprocess.CompletedProcess[str], output: Path) -> None:
    again = finish(output, "name=undisturbed")
    assert again.returncode == 0, again.stderr
    for stage in ("prepare", "finetune_teacher", "train", "evaluate", "export"):
        assert f"{stage}: done before" in again.stdout
    assert "held-out loss" in again.stdout


def test_a_finished_run_gets_a_judge_and_nothing_else_is_done(
    undisturbed: subprocess.CompletedProcess[str], output: Path
) -> None:
    table = (output / "undisturbed" / "table.json").read_text()
    with serving(lambda text, before: Said("Rating A: 6\nRating B: 6")) as server:
        settings = f"{{model: m, base_url: {server.url}, api_key_variable: null, rows: 5}}"
        again = finish(output, "name=undisturbed", f"evaluate.judge={settings}")
    assert again.returncode == 0, again.stderr
    assert "evaluate: done before" in again.stdout and "judge: done in" in again.stdout and "export: done before" in again.stdout
    assert 0 < len(server.questions) <= 3 * 5, "equal answers of two models are one question"
    judged = json.loads((output / "undisturbed" / "table.json").read_text())
    assert judged | {"judge": []} == json.loads(table)
    assert judged["judge"][0]["values"] == [1.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def before_training(undisturbed: subprocess.CompletedProcess[str], output: Path) -> Path:
    """Set the run back to where it stood before it trained, and keep a copy of its student; return the copy."""
    run, kept = output / "undisturbed", output / "kept"
    shutil.move(run / "student", kept)
    for stage in ("train", "evaluate", "export"):
        (run / "stages" / f"{stage}.json").unlink()
    (run / "metrics" / "train.jsonl").unlink()
    shutil.rmtree(run / "checkpoints" / "train")
    return kept


def test_ctrl_c_ends_a_run_with_a_word(before_training: Path, output: Path) -> None:
    stopped = begun(output, output / "undisturbed" / "metrics" / "train.jsonl", 1, "name=undisturbed")
    stopped.send_signal(signal.SIGINT)
    _, errors = stopped.communicate(timeout=120)
    assert stopped.returncode == 130, errors
    assert "error: interrupted; the same command resumes where it stopped" in errors and "Traceback" not in errors
    log = output / "undisturbed" / "error.log"
    assert f"the traceback is in {log}" in errors and "KeyboardInterrupt" in log.read_text()


@pytest.mark.drill
def test_a_run_killed_in_training_ends_with_the_weights_of_the_one_that_was_not(
    before_training: Path, output: Path, record_property: Record
) -> None:
    run = output / "undisturbed"
    metrics = run / "metrics" / "train.jsonl"
    victim = begun(output, metrics, len(read_metrics(metrics)) + 6, "name=undisturbed")
    for process in [*psutil.Process(victim.pid).children(recursive=True), victim]:  # as when the machine goes down
        with suppress(psutil.NoSuchProcess):
            process.kill()
    victim.wait()
    assert not (run / "student").exists()

    done = len(read_metrics(metrics))
    started = time.monotonic()
    again = begun(output, metrics, done + 1, "name=undisturbed")
    record_recovery(record_property, time.monotonic() - started)
    said, errors = again.communicate(timeout=600)
    assert again.returncode == 0, errors
    assert "finetune_teacher: done before" in said and "train: done before" not in said
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (run / "student", before_training))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [step["step"] for step in read_metrics(metrics)] == list(range(1, 109))


@pytest.mark.drill
def test_a_run_killed_while_it_evaluates_measures_only_what_is_missing(
    undisturbed: subprocess.CompletedProcess[str], output: Path
) -> None:
    run = output / "undisturbed"
    table = (run / "table.json").read_text()
    for stage in ("evaluate", "export"):
        (run / "stages" / f"{stage}.json").unlink()
    shutil.rmtree(run / "evaluation")
    victim = subprocess.Popen(command(output, "name=undisturbed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(run.glob("evaluation/*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    victim.send_signal(signal.SIGSTOP)  # whatever else is measured from now on, it does not write down
    for process in [*psutil.Process(victim.pid).children(recursive=True), victim]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    victim.wait()
    measured = list(run.glob("evaluation/*.json"))
    kept = {path: path.stat().st_mtime_ns for path in measured}
    assert 1 <= len(kept) < 3

    again = finish(output, "name=undisturbed")
    assert again.returncode == 0, again.stderr
    assert "train: done before" in again.stdout and "export: done in" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in measured} == kept
    assert (run / "table.json").read_text() == table


def test_another_configuration_is_refused_in_the_same_folder(undisturbed: subprocess.CompletedProcess[str], output: Path) -> None:
    other = finish(output, "name=undisturbed", "loss.easy_ratio=0.3")
    assert other.returncode == 2
    assert "was made by another configuration" in other.stderr and "loss.easy_ratio: 0.3 here, 0.5 there" in other.stderr


@pytest.mark.drill
def test_a_flipped_byte_in_the_store_stops_a_run_before_it_trains(
    undisturbed: subprocess.CompletedProcess[str], output: Path
) -> None:
    store = Path(json.loads((output / "undisturbed" / "scores.json").read_text())["train"])
    shard = store / "shard-00001.rows"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    run = output / "undisturbed"
    for stage in ("score", "train", "evaluate", "export"):
        (run / "stages" / f"{stage}.json").unlink()
    shutil.rmtree(run / "student")
    hurt = finish(output, "name=undisturbed")
    assert hurt.returncode == 2
    assert "finetune_teacher: done before" in hurt.stdout
    assert "shard-00001.rows is damaged" in hurt.stderr and "delete shard-00001.json" in hurt.stderr
