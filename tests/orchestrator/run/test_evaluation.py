"""The evaluation stage: three models through real Ray tasks, their files, and their table."""

import io
import json
import shutil
from pathlib import Path

import pytest
import ray
from rich.console import Console

from actors.evaluation.answers import GeneratedAnswer
from actors.evaluation.evaluator import Evaluation, Metrics
from actors.score_store.store import ScoreStore
from orchestrator.config.load import validate
from orchestrator.config.run import RunConfig
from orchestrator.models.models import Models
from orchestrator.run.evaluation import answers_by_task, comparison_table, evaluate, read_evaluation, write_evaluation
from orchestrator.run.results_table import ComparisonTable, markdown, print_table, read_table, write_table, written
from orchestrator.run.run_dir import RunDir
from tests.evaluation_world import World, load, make_world
from tests.logs import logged
from tests.orchestrator.training_world import processes, when


def metrics(loss: float, exact_match: float | None = 0.5) -> Metrics:
    return Metrics(loss, 0.25, 0.75, 0.0123, exact_match, None, 1_234_567, 42, 1.5, 300.0)


def answer(row: int, task: str | None, correct: bool, rouge_l: float | None = None) -> GeneratedAnswer:
    return GeneratedAnswer(row, task, "p", "r", "<g>", correct, rouge_l)


def three() -> tuple[Evaluation, Evaluation, Evaluation]:
    return (
        Evaluation(metrics(0.5), (answer(1, "sort", True), answer(2, "sort", True), answer(3, "add", True))),
        Evaluation(metrics(4.0), (answer(1, "sort", False), answer(2, "sort", False), answer(3, "add", False))),
        Evaluation(metrics(1.25, None), (answer(1, "sort", True), answer(2, "sort", False), answer(3, "add", True))),
    )


def test_the_table_has_a_row_a_metric_and_a_column_a_model() -> None:
    table = comparison_table(*three())
    rows = {row.metric: row.cells for row in table.rows}
    assert rows["heldout_loss"] == ("0.5000", "4.0000", "1.2500")
    assert rows["top1_agreement"] == ("75.0 %",) * 3
    assert rows["exact_match"] == ("50.0 %", "50.0 %", "–")
    assert rows["rouge_l"] == ("–", "–", "–")
    assert rows["parameters"] == ("1,234,567",) * 3
    assert len(rows) == 7


def test_exact_match_is_broken_down_by_task() -> None:
    table = comparison_table(*three())
    assert [(row.label, row.values) for row in table.tasks] == [("add (1)", (1.0, 0.0, 1.0)), ("sort (2)", (1.0, 0.0, 0.5))]
    assert answers_by_task([(answer(1, None, True),)] * 3, "exact_match") == ()
    assert answers_by_task([(answer(1, "add", True),), ()], "exact_match")[0].values == (1.0, None)


def test_rouge_l_is_shown_by_task_where_it_is_asked_for(tmp_path: Path) -> None:
    """A reference in another script has no Rouge-L and does not count; a task of nothing else has none."""
    asked = [answer(1, "open", False, 0.25), answer(2, "open", False, 0.5), answer(3, "open", False), answer(4, "kana", True)]
    evaluations = [Evaluation(metrics(0.5), tuple(asked)) for _ in range(3)]
    table = comparison_table(*evaluations, by_task="rouge_l")
    assert [(row.label, row.cells[0]) for row in table.tasks_by_rouge_l] == [("kana (1)", "–"), ("open (3)", "0.375")]
    assert table.tasks == () and "| Rouge-L by task |" in markdown(table)
    write_table(tmp_path, table)
    assert read_table(tmp_path) == table


def test_the_table_is_kept_as_json_and_markdown(tmp_path: Path) -> None:
    table = comparison_table(*three())
    write_table(tmp_path, table)
    assert read_table(tmp_path) == table
    assert json.loads((tmp_path / "table.json").read_text())["columns"] == ["teacher", "student before", "student after"]
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2] == "| held-out loss (nats per target) | 0.5000 | 4.0000 | 1.2500 |"
    assert "| sort (2) | 100.0 % | 0.0 % | 50.0 % |" in lines


def test_a_task_name_cannot_break_the_markdown() -> None:
    rows = answers_by_task([(answer(1, "a|b\nc", True),)] * 3, "exact_match")
    assert markdown(ComparisonTable((), rows)).splitlines()[-1] == "| a\\|b c (1) | 100.0 % | 100.0 % | 100.0 % |"


def test_the_table_is_plain_where_there_is_no_terminal() -> None:
    plain, terminal = io.StringIO(), io.StringIO()
    print_table(comparison_table(*three()), Console(file=plain))
    print_table(comparison_table(*three()), Console(file=terminal, force_terminal=True, width=100))
    assert "held-out loss (nats per target)     0.5000          4.0000         1.2500" in plain.getvalue()
    assert plain.getvalue().isascii() is False and "\x1b" not in plain.getvalue() and "─" not in plain.getvalue()
    assert "─" in terminal.getvalue()


def test_a_metric_is_written_by_its_kind() -> None:
    assert [written(0.5, show) for show in ("nats", "share", "score", "count")] == ["0.5000", "50.0 %", "0.500", "0"]


def test_an_evaluation_is_read_as_it_was_written(tmp_path: Path) -> None:
    evaluation = three()[0]
    write_evaluation(tmp_path / "one.json", evaluation)
    assert read_evaluation(tmp_path / "one.json") == evaluation


def run_config(output: Path, **evaluate_settings: object) -> RunConfig:
    shape = {"kind": "scratch", "hidden_size": 64, "layers": 2, "heads": 2}
    return validate(
        {
            "name": "run", "output": str(output), "tokenizer": {"vocab_size": 300},
            "teacher": {"model": shape, "finetune": {"train": {}}}, "student": {"model": shape}, "scores": {"top_k": 5},
            "evaluate": {"generate_rows": 4, "max_new_tokens": 3, **evaluate_settings},
        }
    )  # fmt: skip


def settle(world: World, config: RunConfig, models: Models) -> ScoreStore:
    """Put the world's models and rows where a run has them before it evaluates; the student after is the teacher itself."""
    run = config.run_dir
    for name, place in (("heldout.arrow", "data/heldout.arrow"), ("texts.jsonl", "data/heldout_texts.jsonl")):
        (run / place).parent.mkdir(exist_ok=True)
        shutil.copy(world.folder / name, run / place)
    places = [
        ("tokenizer", models.tokenizer_folder), ("teacher", models.finetuned_folder("teacher")),
        ("student", Path(models.begun("student").name)), ("teacher", models.student_folder),
    ]  # fmt: skip
    for name, place in places:
        shutil.copytree(world.folder / name, place)
    return ScoreStore(world.folder / "scores-5")


@pytest.mark.ray
@pytest.mark.slow
def test_the_stage_measures_what_is_missing(local_ray: None, tmp_path: Path) -> None:
    world, config = make_world(tmp_path / "world"), run_config(tmp_path)
    with logged() as said, RunDir.open(config) as run_dir:
        models = Models(config, run_dir.path)
        store = settle(world, config, models)
        facts = evaluate(config, run_dir, models, store)

        rows = {row.metric: row.values for row in read_table(run_dir.path).rows}
        assert rows["kl_to_teacher"][0] == rows["kl_to_teacher"][2] == pytest.approx(0.0, abs=1e-6)
        assert rows["kl_to_teacher"][1] > 0.1
        assert rows["top1_agreement"][0] == 1.0 > rows["top1_agreement"][1]
        assert rows["parameters"][0] == sum(weights.numel() for weights in load(world.folder / "teacher").parameters())
        assert [row["metric"] for row in facts["table"]] == list(rows)
        assert [task.metric for task in read_table(run_dir.path).tasks] == ["t0", "t1"]
        events = [json.loads(line) for line in (run_dir.path / "events.jsonl").read_text().splitlines()]
        assert [event["model"] for event in events] == ["teacher", "student_before", "student_after"]
        assert len(said) == 3 and said[0].startswith("evaluate: teacher done, held-out loss ")

        kept = run_dir.path / "evaluation" / "teacher.json"
        content = json.loads(kept.read_text())
        content["metrics"]["heldout_loss"] = 123.0
        kept.write_text(json.dumps(content))
        (run_dir.path / "evaluation" / "student_after.json").unlink()
        evaluate(config, run_dir, models, store)
        assert len(said) == 4 and said[3].startswith("evaluate: student after done")
        again = {row.metric: row.values for row in read_table(run_dir.path).rows}
        assert again["heldout_loss"] == (123.0, *rows["heldout_loss"][1:])

        kept.unlink()
        by_scores = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"teacher": "scores"})})
        evaluate(by_scores, run_dir, models, store)
        table = read_table(run_dir.path)
        for metric, values in {row.metric: row.values for row in table.rows}.items():
            wanted = None if metric in ("exact_match", "rouge_l") else pytest.approx(rows[metric][0], abs=1e-3)
            assert values == (wanted, *rows[metric][1:])
        assert [task.values[0] for task in table.tasks] == [None, None]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.drill
def test_an_evaluator_that_is_killed_begins_again(local_ray: None, tmp_path: Path) -> None:
    world, config, killed = make_world(tmp_path / "world"), run_config(tmp_path), list[int]()

    def kill() -> None:
        for evaluator in processes("ray::evaluate"):
            evaluator.kill()
            killed.append(evaluator.pid)

    with RunDir.open(config) as run_dir:
        models = Models(config, run_dir.path)
        store = settle(world, config, models)
        killer = when(lambda: len(processes("ray::evaluate")) > 0, kill)
        evaluate(config, run_dir, models, store)
        killer.join()
        rows = {row.metric: row.values for row in read_table(run_dir.path).rows}
    assert killed
    assert rows["kl_to_teacher"][0] == rows["kl_to_teacher"][2] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.ray
@pytest.mark.slow
def test_an_error_in_the_task_reaches_the_stage(local_ray: None, tmp_path: Path) -> None:
    world, config = make_world(tmp_path / "world"), run_config(tmp_path, answer_pattern=r"#### (\d+)")
    with RunDir.open(config) as run_dir:
        models = Models(config, run_dir.path)
        with pytest.raises(ray.exceptions.RayTaskError, match="row 100: evaluate.answer_pattern"):
            evaluate(config, run_dir, models, settle(world, config, models))
