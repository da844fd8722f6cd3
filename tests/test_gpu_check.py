"""What ``make gpu`` does, as far as no GPU is needed: its commands parse and their configurations load, and the driver goes on.

Steps that fail, hang, or leave nothing are run for real, with commands that take a moment.
"""

import json
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from tokenizers.pre_tokenizers import Whitespace

from actors.config.models import EngineConfig
from actors.model_source import ModelSource
from benchmarks import batches, losses, student_step
from orchestrator.cli import build_parser
from orchestrator.cluster.node_checks import node_faults
from orchestrator.cluster.ray_session import require_machine
from orchestrator.config.load import load_config
from orchestrator.config.run import RunConfig
from scripts import gpu_check, gpu_scores
from scripts.gpu_check import HOUR_SECONDS, Outcome, page_of, run_all, run_step, shown, without_places
from scripts.gpu_scores import NamedIds, lines_of, measure, named_ids, prose_rows, spread
from scripts.gpu_steps import Step, findings, last_line, measured, run_of, steps, tables
from tests.orchestrator.cluster.test_node_checks import SOUND
from tests.test_docs import commands_of
from tests.worlds import VOCAB, random_examples, tiny_llama, word_tokenizer

ROOT = Path(__file__).parents[1]
ONE, EIGHT = (steps(gpus, "runs/gpu", "a/model", "a/teacher") for gpus in (1, 8))
ALL = [*ONE, *EIGHT]


def names(step: Step) -> str:
    return step.name


def programs(step: Step) -> str:
    """The module that a step runs; its command is ``python -m MODULE ...``."""
    assert step.command[:2] == ("python", "-m")
    return step.command[2]


def configuration_of(step: Step) -> RunConfig:
    options = build_parser().parse_args(step.command[3:])
    return load_config(options.config, options.overrides)


def test_every_step_is_a_program_of_the_project() -> None:
    assert {programs(step) for step in ALL} == {
        "pytest", "orchestrator", "benchmarks.losses", "benchmarks.student_step", "benchmarks.batches", "scripts.gpu_scores",
    }  # fmt: skip


@pytest.mark.parametrize("step", [step for step in ALL if programs(step) == "orchestrator"], ids=names)
def test_what_the_orchestrator_is_to_run_loads_and_finds_room_on_the_machine(step: Step) -> None:
    config = configuration_of(step)
    assert config.train.precision == config.teacher.engine.dtype == config.evaluate.precision == "bfloat16"
    gpus = 1 if step in ONE else 8
    if step.needs_gpus <= gpus:
        require_machine(config, replace(SOUND, gpus=gpus, usable_gpus=gpus))
    assert node_faults(config, SOUND) == []


def test_more_gpus_are_used_where_there_are_more() -> None:
    assert configuration_of(EIGHT[4]).workers.count == 8 and configuration_of(EIGHT[4]).train.sharding == "fsdp"
    assert configuration_of(EIGHT[3]).teacher.engine.tensor_parallel == 2
    assert [step.name for step in ONE if step.needs_gpus == 1] == [step.name for step in EIGHT if step.needs_gpus == 1]


@pytest.mark.parametrize(
    ("module", "main"),
    [("benchmarks.losses", losses.main), ("benchmarks.student_step", student_step.main), ("benchmarks.batches", batches.main),
     ("scripts.gpu_scores", gpu_scores.main)],
)  # fmt: skip
def test_what_benchmarks_are_told_they_understand(module: str, main: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that is asked for beside the step's own ends the program only once those are read."""
    for step in [one for one in ALL if programs(one) == module]:
        monkeypatch.setattr(sys, "argv", [module, *step.command[3:], "--no-such-option"])
        with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
            said: list[str] = []
            patch.setattr("argparse.ArgumentParser.error", lambda self, message, said=said: said.append(message) or sys.exit(2))
            main()  # type: ignore[operator]
        assert said == ["unrecognized arguments: --no-such-option"]


def test_all_steps_end_within_an_hour() -> None:
    assert sum(step.limit_seconds for step in EIGHT) <= HOUR_SECONDS < 3600


def test_names_of_steps_are_names_of_files() -> None:
    assert len({step.name for step in EIGHT}) == len(EIGHT)
    assert not any("/" in step.name for step in EIGHT)


# ---- the driver, with commands that take a moment


def python(name: str, code: str, limit_seconds: float = 30.0, **changes: object) -> Step:
    return replace(Step(name, "nothing", ("python", "-c", code), limit_seconds, measured), **changes)  # type: ignore[arg-type]


def test_the_driver_goes_on_and_the_page_says_what_came_of_each(tmp_path: Path) -> None:
    mark = f"time.sleep(777.{os.getpid()})"  # a process of another test run sleeps for another time
    child = f"[sys.executable, '-c', 'import time; {mark}']"
    hanging = f"import subprocess, sys, time; subprocess.Popen({child}); {mark}"
    wanted = [
        python("good", "print('measured speed: 5 tokens/s')"),
        python("bad", "print('about to fail'); raise SystemExit(3)"),
        python("hanging", hanging, limit_seconds=1.5),
        python("many", "print('never')", needs_gpus=2),
        python("last", "print('| a |'); print('bar a measured 1 wanted <=1 met')", read=tables),
    ]
    said: list[str] = []
    outcomes = run_all(wanted, 1, tmp_path, 60.0, said.append)
    assert [one.word for one in outcomes] == [
        "passed", "FAILED: exit code 3", "FAILED: over its limit of 2 s", "left out: needs 2 GPUs, and there is 1", "passed",
    ]  # fmt: skip
    assert outcomes[2].seconds < 15 and len(said) == 9
    assert not [one for one in psutil.process_iter(["cmdline"]) if mark in " ".join(one.info["cmdline"] or [])]
    page = page_of(outcomes, SOUND, ["NVIDIA H100 80GB HBM3"] * 8, "2026-01-31")
    assert "- 8 x NVIDIA H100 80GB HBM3; this machine has 8 GPUs, driver 580.95.05" in page
    assert "| bad | FAILED: exit code 3 | 0 |" in page and "about to fail" in page
    assert "- speed: 5 tokens/s" in page and "\n| a |\n\n- bar a measured 1" in page
    assert "| many | left out: needs 2 GPUs, and there is 1 | 0 |" in page and "## many" not in page
    assert page.count("```bash\npython -c ") == 4


def test_a_step_that_ignores_being_asked_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "PATIENCE_SECONDS", 0.5)
    stubborn = python("stubborn", "import signal, time; signal.signal(signal.SIGTERM, lambda *a: None); time.sleep(777)")
    started = time.monotonic()
    assert run_step(stubborn, tmp_path, 1.0).word == "FAILED: over its limit of 1 s"
    assert time.monotonic() - started < 15


def test_once_the_hour_is_over_nothing_more_is_begun(tmp_path: Path) -> None:
    wanted = [python("slow", "import time; time.sleep(777)"), python("next", "print(1)")]
    outcomes = run_all(wanted, 1, tmp_path, 1.0, lambda _: None)
    assert [one.word for one in outcomes] == ["FAILED: over its limit of 1 s", "left out: the time of all steps was over"]


def test_what_cannot_be_read_is_a_failure_of_its_step_alone(tmp_path: Path) -> None:
    def read(printed: str) -> list[str]:
        raise KeyError("mfu")

    outcome = run_step(python("odd", "print('here')", read=read), tmp_path, 30.0)
    assert outcome.word == "FAILED: what it left could not be read (KeyError: 'mfu')" and outcome.lines == ("here",)


def test_the_commands_of_a_page_are_those_of_the_documents(tmp_path: Path) -> None:
    page = page_of([Outcome(step, "passed") for step in EIGHT], SOUND, [], "2026-01-31")
    commands = commands_of(page)
    assert len(commands) == 4 and all(command[1] == "configs/tiny_cpu.yaml" for command in commands)
    assert [shlex.join(step.command) for step in EIGHT if shlex.join(step.command) not in page] == []
    assert shown(Outcome(EIGHT[0], "passed")) == ["Nothing to read off it."]


def test_a_page_names_no_folder_of_the_machine() -> None:
    home = str(Path.home())
    text = without_places(f"{ROOT}/runs/gpu/x {home}/cache")
    assert str(ROOT) not in text and home not in text and text.startswith("./runs/gpu/x")


def test_where_torch_can_use_no_gpu_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "read_node_facts", lambda: replace(SOUND, usable_gpus=0))
    assert gpu_check.main(["--page", str(tmp_path / "page.md")]) == 2
    assert "error: torch can use no GPU; this machine has 0 GPUs, driver 580.95.05" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_the_steps_that_are_asked_for_are_run_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def table(gpus: int, output: str, model: str, teacher: str) -> tuple[Step, ...]:
        said = f"print('measured arguments: {gpus} {model} {teacher}'); raise SystemExit({int(gpus != 8)})"
        return python("doctor", said), python("losses", "raise SystemExit(1)")

    monkeypatch.setattr(gpu_check, "read_node_facts", lambda: SOUND)
    monkeypatch.setattr(gpu_check, "steps", table)
    page = tmp_path / "page.md"
    arguments = ["--page", str(page), "--output", str(tmp_path / "runs"), "--model", "a/b"]
    assert gpu_check.main([*arguments, "--only", "doctor"]) == 0
    assert "- arguments: 8 a/b Qwen/Qwen2.5-7B-Instruct" in page.read_text() and "losses" not in page.read_text()
    assert gpu_check.main(arguments) == 1
    assert "| losses | FAILED: exit code 1 |" in page.read_text()
    with pytest.raises(SystemExit):
        gpu_check.main([*arguments, "--only", "doktor"])
    assert "invalid choice: 'doktor'" in capsys.readouterr().err


def test_readers_take_what_they_know() -> None:
    printed = "noise\nok devices: fine\nFAILED raw: bad\nmeasured way: fast\n| a | b |\nbar x measured 1 wanted <=2 met\n\n"
    assert findings(printed) == ["ok devices: fine", "FAILED raw: bad"]
    assert measured(printed) == ["way: fast"]
    assert tables(printed) == ["measured way: fast", "| a | b |", "bar x measured 1 wanted <=2 met"]
    assert last_line("x\n3 passed in 1 s\n\n") == ["3 passed in 1 s"] and last_line("") == []


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    assert run_of(str(tmp_path), "gone")("") == []
    run = tmp_path / "tiny"
    (run / "metrics").mkdir(parents=True)
    same = {"workers": 2, "gpu_memory_bytes": 2**30}
    for step in range(1, 10):
        line = {"step": step, "tokens_per_second": 100.0 * step, "loss": 1.0 / step, "mfu": 0.01 * step, **same}
        with open(run / "metrics" / "train.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    (run / "metrics" / "finetune_teacher.jsonl").write_text('{"step": 1}\n')
    (run / "run.log").write_text("12:00:00 teacher: vLLM 0.32.0, bfloat16; only some rows go through the output head\n")
    (run / "events.jsonl").write_text(
        '{"event": "compared", "targets": 256, "mean_target_error": 0.01, "largest_target_error": 0.2, "topk_agreement": 0.95}\n'
        '{"event": "shard_scored", "split": "train", "tokens_per_second": 5000.0}\n'
        '{"event": "shard_scored", "split": "heldout", "tokens_per_second": 1.0}\n'
    )
    assert run_of(str(tmp_path), "tiny")("") == [
        "vLLM 0.32.0, bfloat16; only some rows go through the output head",
        "256 targets lie 1.0e-02 nats from float32 on average, the furthest 2.0e-01; top-K agree to 95.0%",
        "the teacher scored 5,000 tokens/s",
        "train: 750 tokens/s with 2 workers, MFU 7.50%, 1.00 GiB of tensors at most; last loss 0.111",
    ]


# ---- what the steps measure


def test_the_scores_of_a_teacher_are_measured(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", seed=1)
    rows = random_examples(6, seed=2)
    engine = EngineConfig(kind="transformers", dtype="bfloat16")
    way, ids, found = measure(ModelSource(str(folder)), engine, rows, tokenizer_ids=VOCAB - 30)
    assert way == "measured way: transformers, bfloat16"
    targets = sum(len(row.targets) for row in rows)
    assert ids.startswith(f"measured ids: the teacher has {VOCAB}, the tokenizer {VOCAB - 30}; {targets} of {targets} targets")
    assert found.startswith(f"measured spread: {targets} targets lie ")
    exact = measure(ModelSource(str(folder)), EngineConfig(kind="transformers", dtype="float32"), rows, VOCAB)
    assert "; 0 of " in exact[1] and float(exact[2].split("the furthest ")[1]) < 1e-4 < float(found.split("the furthest ")[1])


def test_a_reference_that_does_not_fit_is_said() -> None:
    lines = lines_of("vLLM", NamedIds(100, 90, 5, 1, 0.25), "it does not fit")
    assert "1 of 5 targets have one beyond the tokenizer's among the 64 most likely, of 2.5e-01 of the mass" in lines[1]
    assert lines[2] == "measured spread: none, since it does not fit"


def test_spread_and_ids_are_those_of_plain_counting() -> None:
    class Scores:
        target_logprob = np.array([-1.0, -2.0], dtype=np.float32)
        topk_ids = np.array([[1, 95], [3, 4]], dtype=np.int32)
        topk_logprobs = np.log(np.array([[0.5, 0.25], [0.5, 0.25]], dtype=np.float32))

    class Plain:
        example = random_examples(1, 0)[0]
        target_logprob = np.array([[np.nan, 0.0], [-1.5, -2.0], [0.0, 0.0]])

    found = spread([Plain()], [Scores()])  # type: ignore[list-item]
    assert (found.targets, found.mean, found.largest) == (2, 0.25, 0.5) and 0.49 < found.quantile_99 < 0.5
    named = named_ids([Scores()], 100, 90)  # type: ignore[list-item]
    assert (named.targets, named.beyond) == (2, 1) and named.largest_mass == pytest.approx(0.25)


def test_rows_are_prose_of_the_projects_pages() -> None:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    rows = prose_rows(tokenizer, 5, row_tokens=40)
    assert len(rows) == 5 and all(len(row.token_ids) == 40 and row.loss_mask.sum() == 24 for row in rows)
    with pytest.raises(ValueError, match="tokens, and a row takes 10000000"):
        prose_rows(tokenizer, 5, row_tokens=10_000_000)
