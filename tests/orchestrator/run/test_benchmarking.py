"""Benchmarks of a run: measured once by Ray tasks, kept by what they depend on, shown in table, report and model card."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from actors.config import benchmarks as benchmark_settings
from actors.evaluation.benchmark_figures import BenchmarkFigure, BenchmarkResult
from orchestrator.cli import main
from orchestrator.config.load import ConfigError
from orchestrator.config.run import RunConfig
from orchestrator.models.models import Models
from orchestrator.reports.run_report import write_report
from orchestrator.run.benchmarking import (
    Benchmarks,
    benchmark,
    benchmark_again,
    benchmark_rows,
    benchmarks_missing,
    read_benchmarks,
    require_benchmarks,
    require_chat_template,
    students_results,
    write_benchmarks,
)
from orchestrator.run.export import model_card, renew_card, write_model_card
from orchestrator.run.results_table import markdown, read_table, write_table
from orchestrator.run.run_dir import RunDir
from tests.benchmark_world import PICK, ROWS, make_tasks, picked_rightly, said_rightly, save_served, save_words, standard_error
from tests.logs import logged
from tests.orchestrator.config.test_run import changed
from tests.orchestrator.pages import Page, require_closed
from tests.orchestrator.run.test_judging import evaluated

needs_harness = pytest.mark.skipif(not benchmark_settings.find_spec("lm_eval"), reason="the extra benchmarks is not installed")

ACC = BenchmarkFigure("arc_easy", "acc", "none", 0.25, 0.125, 0, 1200, "1.0", "allenai/ai2_arc", "ARC-Easy")
STRICT = BenchmarkFigure("gsm8k", "exact_match", "strict-match", 0.5, None, 5, 1319, "3.0", "openai/gsm8k", "main")
BITS = BenchmarkFigure("wikitext", "bits_per_byte", "none", 1.75, None, 1, 62, "2.0")


def result(*figures: BenchmarkFigure, remarks: tuple[str, ...] = ()) -> BenchmarkResult:
    return BenchmarkResult(figures[0].task, figures, (), "0.4.13", 30.0, remarks)


RESULTS = (result(ACC), result(STRICT, remarks=("a prompt was cut",)), result(BITS))
MEASURED = Benchmarks("transformers", {"student_after": RESULTS})


def asked(output: Path, **settings: object) -> RunConfig:
    given = {"tasks": ["pick", "say"], "folder": str(output / "tasks"), "max_length": 60, **settings}
    return changed("student.model.hidden_size=64", f"output={output / 'runs'}", f"evaluate.benchmarks={json.dumps(given)}")


def trained(run: Path) -> dict[str, Path]:
    """Leave behind the models of a run; return their folders by name."""
    folders = {
        "teacher": run / "models" / "teacher_finetuned", "student_before": run / "models" / "student_scratch",
        "student_after": run / "student",
    }  # fmt: skip
    for seed, folder in enumerate(folders.values()):
        save_served(folder, seed)
    save_words(run / "tokenizer")
    return folders


def kept(run_dir: RunDir) -> dict[Path, int]:
    """When each result was written."""
    return {path: path.stat().st_mtime_ns for path in (run_dir.path / "evaluation" / "benchmarks").iterdir()}


@needs_harness
@pytest.mark.ray
@pytest.mark.slow
def test_each_model_is_measured_once_by_each_task_and_setting(local_ray: None, tmp_path: Path) -> None:
    begun = asked(tmp_path, tasks=["pick"], models=["student_after"])
    whole = asked(tmp_path, models=["teacher", "student_after"])
    with RunDir.open(
        changed("student.model.hidden_size=64", f"output={tmp_path / 'runs'}")
    ) as run_dir:  # begun without benchmarks
        folders, models = trained(run_dir.path), Models(begun, run_dir.path)
        tasks = make_tasks(tmp_path, folders["student_after"])
        assert benchmarks_missing(begun, run_dir)
        require_benchmarks(begun, run_dir)
        evaluated(run_dir)
        benchmark(begun, run_dir, models)
        first = kept(run_dir)
        assert len(first) == 1 and not benchmarks_missing(begun, run_dir) and benchmarks_missing(whole, run_dir)
        benchmark(whole, run_dir, models)
        second = kept(run_dir)
        stage = run_dir.result("benchmark")
        assert stage is not None and stage["measured"] == {"teacher": ["pick", "say"], "student_after": ["say"]}
        assert len(second) == 4 and first.items() <= second.items()
        with logged() as said:
            benchmark(whole, run_dir, models)
        assert said == ["benchmark: done before"] and kept(run_dir) == second

        rows = {row.metric: row for row in read_table(run_dir.path).benchmarks}
        for at, name in ((0, "teacher"), (2, "student_after")):
            for metric, right in (("pick_acc_none", picked_rightly), ("say_exact_match_trimmed", said_rightly)):
                found = right(tasks, folders[name])
                assert rows[metric].values[at] == pytest.approx(sum(found) / ROWS)
                assert rows[f"{metric}_stderr"].values[at] == pytest.approx(standard_error(found))
        assert rows["pick_acc_none"].label == f"pick: acc (0 shots, {ROWS} rows)" and rows["pick_acc_none"].values[1] is None
        for other in ({"limit": 6}, {"shots": 1}, {"seed": 1}, {"max_length": 50}, {"max_new_tokens": 3}):
            assert benchmarks_missing(asked(tmp_path, models=["teacher"], **other), run_dir), "another measurement"
        assert not benchmarks_missing(asked(tmp_path, models=["teacher"], batch_rows=1), run_dir)
        save_served(folders["student_after"], 7)
        assert benchmarks_missing(begun, run_dir), "another student is another measurement"


@needs_harness
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.drill
def test_vllm_measures_what_plain_forward_passes_do(local_ray: None, tmp_path: Path) -> None:
    served = asked(tmp_path, models=["teacher", "student_after"], limit=8, engine="vllm", kv_cache_mib=16)
    with RunDir.open(served) as run_dir:
        folders = trained(run_dir.path)
        tasks = make_tasks(tmp_path, folders["student_after"])
        evaluated(run_dir)
        benchmark(served, run_dir, Models(served, run_dir.path))
    rows = {row.metric: row for row in read_table(run_dir.path).benchmarks}
    for at, name in ((0, "teacher"), (2, "student_after")):
        assert rows["pick_acc_none"].values[at] == pytest.approx(sum(picked_rightly(tasks, folders[name])[:8]) / 8)
        assert rows["say_exact_match_trimmed"].values[at] == pytest.approx(sum(said_rightly(tasks, folders[name])[:8]) / 8)


def test_figures_stand_in_table_report_and_card(tmp_path: Path) -> None:
    with RunDir.open(changed(f"output={tmp_path}")) as run_dir:
        evaluated(run_dir)
    write_benchmarks(run_dir.path, MEASURED)
    assert read_benchmarks(run_dir.path) == MEASURED and students_results(run_dir.path) == RESULTS
    assert read_benchmarks(tmp_path) is None and students_results(tmp_path) == ()
    table = read_table(run_dir.path)
    write_table(run_dir.path, replace(table, benchmarks=benchmark_rows(MEASURED)))
    shown = markdown(read_table(run_dir.path))
    for line in (
        "| arc_easy: acc (0 shots, 1200 rows) | – | – | 25.0 % |", "| arc_easy: its standard error | – | – | 12.5 % |",
        "| gsm8k: exact_match, strict-match (5 shots, 1319 rows) | – | – | 50.0 % |",
        "| wikitext: bits_per_byte (1 shot, 62 rows) | – | – | 1.750 |",
    ):  # fmt: skip
        assert line in shown
    content = write_report(run_dir.path).read_text()
    require_closed(content)
    for words in ("Benchmarks", "1 model measured by lm-evaluation-harness 0.4.13 with transformers", "a prompt was cut"):
        assert words in Page(content).text, words


def test_the_card_tells_the_hub_and_is_read_back(tmp_path: Path) -> None:
    with RunDir.open(changed(f"output={tmp_path}")) as run_dir:
        evaluated(run_dir)
    table = read_table(run_dir.path)
    assert "model-index" not in model_card(changed(), None, table)
    write_model_card(tmp_path, changed(), None, table, benchmarks=RESULTS)
    card = ModelCard.load(tmp_path / "README.md")
    found = {one.metric_name: one for one in card.data.eval_results}
    assert card.data.model_name == "small" and len(found) == 3
    acc, strict, bits = (found[name] for name in ("arc_easy: acc", "gsm8k: exact_match, strict-match", "wikitext: bits_per_byte"))
    assert (acc.dataset_type, acc.dataset_config, acc.metric_type, acc.metric_value) == (
        "allenai/ai2_arc",
        "ARC-Easy",
        "acc",
        0.25,
    )
    assert acc.metric_args == {"standard_error": 0.125, "rows": 1200, "task_version": "1.0", "harness_version": "0.4.13"}
    assert strict.dataset_args == {"num_few_shot": 5} and "standard_error" not in strict.metric_args
    assert (bits.dataset_type, bits.dataset_name, bits.metric_value) == ("wikitext", "wikitext", 1.75)


def test_a_card_is_renewed_and_what_its_owner_wrote_stays(tmp_path: Path) -> None:
    with RunDir.open(changed(f"output={tmp_path}")) as run_dir:
        evaluated(run_dir)
    table, path = read_table(run_dir.path), tmp_path / "README.md"
    write_model_card(tmp_path, changed(), None, table)
    path.write_text(path.read_text().replace("library_name", "license: mit\nlibrary_name", 1) + "My own words.\n")
    fuller = replace(table, benchmarks=benchmark_rows(MEASURED))
    for _ in range(2):
        assert renew_card(tmp_path, "small", fuller, RESULTS)
        text = path.read_text()
        assert text.count("arc_easy: acc (0 shots, 1200 rows)") == 1 and text.count("held-out loss") == 1
        assert text.endswith("My own words.\n") and "## Configuration" in text and "No licence is stated here" in text
        assert ModelCard.load(path).data.license == "mit" and len(ModelCard.load(path).data.eval_results) == 3
    path.write_text("mine alone\n")
    assert not renew_card(tmp_path, "small", fuller, ()) and path.read_text() == "mine alone\n"
    assert not renew_card(tmp_path / "nowhere", "small", fuller, ())


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluate.benchmarks is null, so there is nothing to measure by; .*tasks: \[gsm8k\]"):
        benchmark_again(changed(f"output={tmp_path}"))
    with pytest.raises(ValueError, match=r"there is no run in .*small; the command run makes it"):
        benchmark_again(asked(tmp_path))
    assert not (tmp_path / "runs").exists()
    RunDir.open(asked(tmp_path)).close()
    with pytest.raises(ValueError, match=r"the run in .*small is not evaluated yet; the command evaluate does it"):
        benchmark_again(asked(tmp_path))


def test_turns_need_a_template(tmp_path: Path) -> None:
    save_words(tmp_path / "tokenizer")
    config = asked(tmp_path, apply_chat_template=True)
    with pytest.raises(ValueError, match=r"apply_chat_template is true, but the run's tokenizer has no chat template; .*=false"):
        require_chat_template(config, Models(config, tmp_path))
    require_chat_template(changed(), Models(config, tmp_path))


def test_packages_that_are_not_there_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = asked(tmp_path, engine="vllm").evaluate.benchmarks
    assert settings is not None
    monkeypatch.setattr(benchmark_settings, "find_spec", lambda name: None if name == "lm_eval" else True)
    with pytest.raises(ValueError, match=r"lm-evaluation-harness is not installed: pip install '\.\[benchmarks\]' on every node"):
        benchmark_settings.require_installed(settings)
    monkeypatch.setattr(benchmark_settings, "find_spec", lambda name: None if name == "vllm" else True)
    with pytest.raises(ValueError, match=r"engine is vllm, but vLLM is not installed: .*engine=transformers would do"):
        benchmark_settings.require_installed(settings)


@needs_harness
def test_a_task_that_is_not_there_ends_a_run_before_its_rows_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = f"{{tasks: [pick], folder: {tmp_path / 'gone'}}}"
    assert main(["run", "configs/tiny_cpu.yaml", f"output={tmp_path}", f"evaluate.benchmarks={given}"]) == 2
    assert f"evaluate.benchmarks.folder: there is no folder {tmp_path / 'gone'}" in capsys.readouterr().err
    assert not (tmp_path / "tiny_cpu" / "data").exists()
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "pick.yaml").write_text(PICK)
    assert main(["run", "configs/tiny_cpu.yaml", f"output={tmp_path}", f"evaluate.benchmarks={given}"]) == 2
    assert "the rows of 'pick'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.benchmarks.tasks=[]"], "evaluate.benchmarks.tasks: "),
        (["evaluate.benchmarks.tasks=[a, b, a]"], "evaluate.benchmarks.tasks: a stands twice; once would do"),
        (["evaluate.benchmarks.tasks=['']"], "evaluate.benchmarks.tasks: holds an empty name; [gsm8k] would do"),
        (["evaluate.benchmarks.models=[teacher, teacher]"], "evaluate.benchmarks.models: teacher stands twice"),
        (["evaluate.benchmarks.models=[after]"], "there are teacher, student_before, student_after"),
        (["evaluate.benchmarks.shots=-1"], "evaluate.benchmarks.shots: Input should be greater than or equal to 0; got -1"),
        (["evaluate.benchmarks.limit=0"], "evaluate.benchmarks.limit: Input should be greater than or equal to 1; got 0"),
        (["evaluate.benchmarks.engine=vlm"], "did you mean vllm?"),
        (
            ["evaluate.teacher=scores"],
            "teacher is scores, so that the teacher is not loaded, but benchmarks.models names it; "
            "benchmarks.models=[student_before, student_after] would do, or teacher=model",
        ),
        (
            ["evaluate.benchmarks.engine=vllm", "student.model.hidden_size=24", "teacher.engine.kind=transformers"],
            "student.model has heads of size 12 (hidden_size / heads); vLLM on CPUs serves the sizes",
        ),
    ],
)
def test_a_wrong_key_of_the_benchmarks_is_named_with_what_would_do(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        changed("evaluate.benchmarks={tasks: [gsm8k]}", *overrides)


def test_benchmarks_may_come_change_and_go_when_a_run_is_resumed(tmp_path: Path) -> None:
    for given in ("null", "{tasks: [a]}", "{tasks: [b], limit: 3}", "null"):
        RunDir.open(changed(f"output={tmp_path}", f"evaluate.benchmarks={given}")).close()


def test_the_harness_is_imported_only_where_there_are_benchmarks() -> None:
    code = "import orchestrator.commands, sys; print('lm_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
