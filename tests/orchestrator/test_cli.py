"""The command line answers at once, and errors come before anything is started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import Whitespace

from orchestrator.cli import OTHERS, PIPELINE, TRIALS, build_parser, main
from orchestrator.config.load import load_config
from orchestrator.run.pipeline import STAGES
from tests.worlds import scored_world, tiny_llama, word_tokenizer


def test_help_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, contextlib\n"
        "from orchestrator.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['run', '--help'])\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'vllm', 'numpy', 'pydantic') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "section.key=value" in result.stdout


def test_a_config_error_comes_before_torch_and_ray(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys\n"
        "from orchestrator.cli import main\n"
        "exit_code = main(['run', 'configs/tiny_cpu.yaml', 'loss.easy_ration=0.3'])\n"
        "print(exit_code, [name for name in ('torch', 'ray', 'transformers', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "2 []"
    assert "did you mean easy_ratio?" in result.stderr


def test_the_doctor_is_asked_of_a_configuration_as_every_command_is(capsys: pytest.CaptureFixture[str]) -> None:
    options = build_parser().parse_args(["doctor", "configs/tiny_cpu.yaml", "seed=7"])
    assert (options.command, options.config, options.overrides) == ("doctor", "configs/tiny_cpu.yaml", ["seed=7"])
    assert main(["doctor", "configs/tiny_cpu.yaml", "loss.easy_ration=0.3"]) == 2
    assert "did you mean easy_ratio?" in capsys.readouterr().err


def test_verify_reads_the_stores_of_a_run_whole(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["verify", "configs/tiny_cpu.yaml", f"output={tmp_path}", "name=scored"]
    assert main(command) == 2
    assert "has no score stores yet; the command score fills them" in capsys.readouterr().err
    _, store = scored_world(tmp_path / "world", rows=20)
    (tmp_path / "scored").mkdir(exist_ok=True)
    (tmp_path / "scored" / "scores.json").write_text(json.dumps({"heldout": str(Path(store.place))}))
    assert main(command) == 0
    assert "heldout: 3 of 3 shards are there, each row as it was written" in capsys.readouterr().out
    rows = Path(store.place) / "shard-00002.rows"
    rows.write_bytes(rows.read_bytes()[:-1] + b"?")
    assert main(command) == 2
    assert "shard-00002.rows is damaged: the checksum of its row 3" in capsys.readouterr().err


def test_config_prints_what_a_file_could_hold(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config", "configs/tiny_cpu.yaml", "seed=7"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config(path) == load_config("configs/tiny_cpu.yaml", ["seed=7"])


def test_overrides_may_be_left_out_and_the_usage_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (*PIPELINE, *TRIALS, *OTHERS):
        with pytest.raises(SystemExit) as ended:
            main([command])
        assert ended.value.code == 2
        required = "RUN, ROWS" if command == "predict" else "config"
        assert f"the following arguments are required: {required}\n" in capsys.readouterr().err


def test_a_command_that_is_not_there_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["rnu", "configs/tiny_cpu.yaml"])
    assert ended.value.code == 2
    assert "there is no 'rnu'; did you mean run? there are run, prepare, finetune," in capsys.readouterr().err


def test_no_place_for_temporary_files_is_an_error_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/proc/nonexistent")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert main(["prepare", "configs/tiny_cpu.yaml", f"output={tmp_path}"]) == 2
    assert "error: the home folder /proc/nonexistent cannot be written, and neither can" in capsys.readouterr().err


def test_a_library_that_cannot_be_imported_is_named_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError('libfoo.so is not there')")
    command = [sys.executable, "-m", "orchestrator", "plan", "configs/tiny_cpu.yaml", f"output={tmp_path}"]
    surroundings = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    said, kept = done.stderr.splitlines()[-2:]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert said.startswith("error: what every command needs cannot be imported (ImportError: libfoo.so is not there); make setup")
    assert "libfoo.so" in Path(kept.removeprefix("the traceback is in ")).read_text()


def test_a_plan_of_what_cannot_be_leaves_no_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert (
        main(["plan", "configs/tiny_cpu.yaml", f"output={tmp_path / 'runs'}", "data.source={kind: files, path: nowhere.jsonl}"])
        == 2
    )
    error = capsys.readouterr().err
    assert "there is no file" in error and "Traceback" not in error and "story" not in error
    assert not (tmp_path / "runs").exists()


def test_a_plan_says_what_the_models_cannot_take(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pair = []
    for role in ("teacher", "student"):
        tokenizer = word_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save_pretrained(tiny_llama(tmp_path / role, seed=1))
        pair.append(f"{role}.model={{kind: pretrained, name: {tmp_path / role}}}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"instruction": "w5", "input": "", "response": "{" w6" * 90} {n}"}}\n' for n in range(20)))
    asked = [
        "configs/tiny_cpu.yaml",
        f"output={tmp_path / 'runs'}",
        "tokenizer=null",
        "teacher.finetune=null",
        "student.finetune=null",
    ]
    asked += [*pair, f"data.source={{kind: files, path: {rows}}}", "data.heldout_rows=4", "evaluate.answer_pattern=null"]
    assert main(["plan", *asked]) == 2
    assert "knows 64 positions, one of which vLLM keeps" in capsys.readouterr().err
    assert main(["prepare", *asked]) == 2
    assert "knows 64 positions, one of which vLLM keeps" in capsys.readouterr().err


def test_every_command_leads_to_a_stage() -> None:
    assert {stage for stage, _ in PIPELINE.values()} == {*STAGES, "report"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source={kind: files, path: nowhere.jsonl}"], "nowhere.jsonl"),
        (["data.source.rows=10", "data.heldout_rows=10"], "data.heldout_rows 10 leaves none of 10 rows to train on"),
        (["tokenizer.vocab_size=5000"], "tokenizer.vocab_size 5000 cannot be reached"),
    ],
)
def test_bad_data_is_an_error_before_ray_is_started(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, overrides: list[str], message: str
) -> None:
    assert main(["run", "configs/tiny_cpu.yaml", f"output={tmp_path}", *overrides]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_prepare_alone_needs_no_ray(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["prepare", "configs/tiny_cpu.yaml", f"output={tmp_path}", "data.source.rows=400", "tokenizer.vocab_size=400"]
    assert main(arguments) == 0
    assert "400 rows read: 100 to train on" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "prepare: done before" in capsys.readouterr().out


@pytest.mark.ray
def test_prepare_on_the_cluster_is_prepare_and_wants_no_devices(tmp_path: Path, local_ray: None) -> None:
    gpus = ["teacher.engine.gpu=true", "workers.gpus=1"]
    rows = ["configs/tiny_cpu.yaml", *gpus, "data.source.rows=400", "tokenizer.vocab_size=400"]
    assert main(["prepare", *rows, f"output={tmp_path / 'here'}"]) == 0
    assert main(["prepare", *rows, f"output={tmp_path / 'there'}", "data.cluster_tasks=2"]) == 0
    here, there = (next((tmp_path / name).glob("*/data/train.arrow")).read_bytes() for name in ("here", "there"))
    assert here == there


def test_rows_that_changed_under_a_run_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    words = [f"{a}{b}{c}" for a in "abcdefghij" for b in "klmno" for c in "pqrstuvw"]
    lines = [f'{{"instruction": "say {word} again", "input": "", "response": "{word} {word}"}}\n' for word in words]
    rows.write_text("".join(lines))
    arguments = [
        "prepare", "configs/tiny_cpu.yaml", f"output={tmp_path}", f"data.source={{kind: files, path: {rows}}}",
        "tokenizer.vocab_size=300",
    ]  # fmt: skip
    assert main(arguments) == 0, capsys.readouterr().err
    assert main(arguments) == 0
    rows.write_text("".join(lines[:-1]))
    assert main(arguments) == 2
    assert "rows.jsonl was changed since this run read it; give the run another name" in capsys.readouterr().err
    rows.unlink()
    assert main(arguments) == 0  # what was read from them stands
