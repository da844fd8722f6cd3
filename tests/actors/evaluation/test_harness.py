"""The lm-evaluation-harness over tiny models: its figures are those of plain forward passes, and bad tasks are refused."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from actors.config.benchmarks import BenchmarksConfig
from actors.config.models import EvaluateConfig
from actors.evaluation.benchmark_figures import BenchmarkResult, read_result
from actors.evaluation.task_folder import folder_hash
from actors.model_source import ModelSource
from tests.benchmark_world import PICK, ROWS, SAY, make_tasks, picked_rightly, said_rightly, save_words, standard_error
from tests.evaluation_world import save_model

pytest.importorskip("lm_eval")

from actors.evaluation.harness import WantedTask, measure_model  # noqa: E402
from actors.evaluation.harness_tasks import TaskFinder, require_tasks  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model", seed=3)
    save_words(folder / "tokenizer")
    make_tasks(folder, folder / "model")
    return folder


def settings(world: Path, *tasks: str, **changes: object) -> BenchmarksConfig:
    return BenchmarksConfig(**{"tasks": tasks, "folder": str(world / "tasks"), "batch_rows": 4, "max_length": 60, **changes})


def measured(world: Path, into: Path, *tasks: str, **changes: object) -> list[BenchmarkResult]:
    asked = settings(world, *tasks, **changes)
    wanted = [WantedTask(name, str(into / f"{name}.json"), {"task": name}) for name in tasks]
    model, tokenizer = ModelSource(str(world / "model")), ModelSource(str(world / "tokenizer"))
    measure_model(model, tokenizer, wanted, EvaluateConfig(benchmarks=asked))
    return [read_result(Path(one.path)) for one in wanted]


def test_figures_are_those_of_plain_forward_passes(world: Path, tmp_path: Path) -> None:
    pick, say = measured(world, tmp_path, "pick", "say")
    picked, said = picked_rightly(world / "tasks", world / "model"), said_rightly(world / "tasks", world / "model")
    assert 0 < sum(picked) < ROWS and 0 < sum(said) < ROWS, "else a constant would do as well"
    for result, right, name, version in ((pick, picked, "acc", "1.5"), (say, said, "exact_match, trimmed", "2.0")):
        (figure,) = result.figures
        assert figure.value == pytest.approx(sum(right) / ROWS)
        assert figure.stderr == pytest.approx(standard_error(right))
        assert (figure.name, figure.version) == (name, version)
        assert (figure.rows, figure.shots, figure.dataset) == (ROWS, 0, None)
        assert result.remarks == () and result.parts == () and result.harness.startswith("0.4.")


def test_shots_come_before_the_question_and_limit_takes_the_first_rows(world: Path, tmp_path: Path) -> None:
    (result,) = measured(world, tmp_path, "pick", shots=2, limit=7)
    right = picked_rightly(world / "tasks", world / "model", shots=2)[:7]
    (figure,) = result.figures
    assert (figure.value, figure.shots, figure.rows) == (pytest.approx(sum(right) / 7), 2, 7)


def test_what_the_harness_cuts_or_leaves_out_is_said(world: Path, tmp_path: Path) -> None:
    no_shots = own_task(world, tmp_path / "tasks", SAY + "num_fewshot: 0\n")
    (result,) = measured(world, tmp_path, "say", folder=str(no_shots), shots=3, max_length=8, limit=3)
    assert result.remarks[0] == "say says that it has no shots, so that shots=3 is left out"
    assert "Left truncation applied. Original sequence length was 5, truncating to last 4 tokens" in result.remarks[1]


def test_a_group_has_its_own_figure_and_those_of_its_tasks(world: Path, tmp_path: Path) -> None:
    group = "group: both\ntask: [pick, again]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
    folder = own_task(world, tmp_path / "tasks", PICK)
    (folder / "again.yaml").write_text((folder / "one.yaml").read_text().replace("task: pick", "task: again"))
    (folder / "both.yaml").write_text(group)
    (result,) = measured(world, tmp_path, "both", folder=str(folder), limit=4)
    right = picked_rightly(world / "tasks", world / "model")[:4]
    assert [(one.task, one.value, one.rows) for one in result.figures] == [("both", pytest.approx(sum(right) / 4), 8)]
    assert sorted(one.task for one in result.parts) == ["again", "pick"]


def own_task(world: Path, folder: Path, text: str) -> Path:
    """Return a folder with one task over the rows of the world."""
    folder.mkdir()
    (folder / "one.yaml").write_text(text.replace("../rows", str(world / "rows")))
    return folder


def test_answers_that_leave_no_room_for_prompts_are_refused_with_a_number(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"to say may have 80 tokens, and the model takes 60, .*max_new_tokens=30 would do"):
        measured(world, tmp_path, "say", max_new_tokens=80)


FAULTS = {
    "unsafe": (SAY + "unsafe_code: true\n", "say runs code that the model writes, which is not done here"),
    "images": (SAY + "doc_to_image: question\n", "say shows images or plays sounds, and models here read text"),
    "rows": (SAY.replace("say.jsonl", "gone.jsonl"), r"the rows of 'say' of .*one.yaml cannot be loaded: .*gone.jsonl.*would do"),
    "kind": (SAY.replace("generate_until", "guess"), r"'say' of .*one.yaml cannot be built: ValueError: Got invalid output_type"),
}


@pytest.mark.parametrize(("text", "said"), FAULTS.values(), ids=FAULTS)
def test_a_task_that_cannot_be_measured_is_refused_in_words(world: Path, tmp_path: Path, text: str, said: str) -> None:
    folder = own_task(world, tmp_path / "tasks", text)
    with pytest.raises(ValueError, match=said):
        require_tasks(settings(world, "say", folder=str(folder)))


@pytest.mark.skipif(find_spec("sklearn") is not None, reason="speaks of an environment without scikit-learn")
def test_a_metric_that_needs_scikit_learn_is_refused_before_it_is_computed(world: Path, tmp_path: Path) -> None:
    folder = own_task(world, tmp_path / "tasks", PICK.replace("acc, aggregation: mean", "f1, aggregation: f1"))
    with pytest.raises(ValueError, match="pick computes f1 by scikit-learn, which is not installed: pip install scikit-learn"):
        require_tasks(settings(world, "pick", folder=str(folder)))


def test_a_folder_that_cannot_serve_is_refused_in_words(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere; one that holds a YAML file for each task would do"):
        require_tasks(settings(world, "say", folder=str(tmp_path / "nowhere")))
    (tmp_path / "rows.yaml").write_text("a: 1\n")
    with pytest.raises(ValueError, match=r"holds no task of the harness; a file such as my_task\.yaml with the keys"):
        require_tasks(settings(world, "say", folder=str(tmp_path)))
    (tmp_path / "rows.yaml").write_text("task: [\n")
    with pytest.raises(ValueError, match=r"rows\.yaml is not YAML \(.*line 2, column 1: .*\); correct it, or take it away"):
        require_tasks(settings(world, "say", folder=str(tmp_path)))


@pytest.mark.slow
def test_the_harness_own_tasks_are_known_and_need_the_hub(world: Path) -> None:
    finder = TaskFinder(settings(world, "say", "gsm8k"))
    finder.require_names(["say", "gsm8k", "mmlu", "drop", "bbh"])
    with pytest.raises(ValueError, match=r"the harness or .*tasks has no task 'gsmk8'; did you mean gsm8k"):
        finder.require_names(["gsmk8"])
    with pytest.raises(ValueError, match=r"has no task '\?\?\?\?'; gsm8k would do"):
        finder.require_names(["????"])
    with pytest.raises(ValueError, match=r"rows of 'gsm8k', which come from the hub \(openai/gsm8k\), cannot be .*HF_HOME"):
        finder.load("gsm8k")


def test_the_hash_of_a_folder_follows_its_tasks_and_their_rows(world: Path, tmp_path: Path) -> None:
    folder = make_tasks(tmp_path, world / "model")
    before = folder_hash(folder)
    assert folder_hash(folder) == before and folder_hash(None) is None
    with open(tmp_path / "rows" / "say.jsonl", "a") as file:
        file.write('{"question": "w3", "answer": "w4"}\n')
    with_a_row = folder_hash(folder)
    (folder / "say.yaml").write_text(SAY.replace("w3", "w4") + "# " + "another\n")
    assert len({before, with_a_row, folder_hash(folder)}) == 3
    (folder / "helper.yaml").write_text("task: x\nprocess_docs: !function utils.first\n")
    assert folder_hash(folder) is not None, "Python in a task is no hindrance"
