"""Which models a stage loads on the cluster, and for whom; what is asked of the rows when they are prepared."""

from pathlib import Path

import pytest

from actors.examples import write_examples
from orchestrator.config.run import RunConfig
from orchestrator.models.models import Models
from orchestrator.run.stages import finetuning_task, loads_of, require_references
from tests.worlds import heldout_texts, random_examples


def config_with(**sections: object) -> RunConfig:
    pretrained = {"kind": "pretrained", "name": "someone/model"}
    return RunConfig.model_validate(
        {
            "name": "loads", "data": {"source": {"kind": "builtin"}, "format": {"kind": "instruction"}},
            "teacher": {"model": pretrained, "engine": {"cpus": 3}}, "student": {"model": pretrained},
            "loss": {"kind": "atkd"}, "workers": {"cpus": 2}, "evaluate": {"cpus": 5}, **sections,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("score", [("teacher", "replica", 3)]),
        ("train", [("student", "worker", 2)]),
        ("evaluate", [("teacher", "evaluator", 5), ("student", "evaluator", 5)]),
        ("respond", []),
        ("finetune_teacher", []),
        ("finetune_student", []),
    ],
)
def test_a_stage_loads_models_where_its_actors_stand(stage: str, expected: list[tuple[str, str, float]], tmp_path: Path) -> None:
    config = config_with()
    found = loads_of(stage, config, Models(config, tmp_path))
    assert [(role, request.noun, request.amounts["CPU"]) for role, _, request in found] == expected
    assert {source.name for _, source, _ in found} <= {"someone/model"}


@pytest.mark.parametrize(
    ("responses", "expected"),
    [
        ({"writer": "teacher"}, ("teacher", 3)),
        ({"writer": "student"}, ("student", 3)),
        ({"writer": "student", "engine": {"cpus": 7}}, ("student", 7)),
    ],
)
def test_who_writes_responses_is_loaded_where_it_is_served(
    responses: dict[str, object], expected: tuple[str, float], tmp_path: Path
) -> None:
    config = config_with(responses=responses)
    ((role, source, request),) = loads_of("respond", config, Models(config, tmp_path))
    assert (role, request.amounts["CPU"]) == expected and source.name == "someone/model"


def test_a_teacher_that_draws_tokens_is_loaded_where_it_does(tmp_path: Path) -> None:
    config = config_with(rollouts={"teacher_share": 0.2, "engine": {"cpus": 7}, "teacher_engine": {"cpus": 6}})
    found = loads_of("train", config, Models(config, tmp_path))
    assert [(role, request.noun, request.amounts["CPU"]) for role, _, request in found] == [
        ("student", "worker", 2), ("student", "sampler", 7), ("teacher", "replica", 3), ("teacher", "teacher sampler", 6),
    ]  # fmt: skip


def test_a_model_that_is_fine_tuned_is_loaded_from_the_hub_by_its_fine_tuning_alone(tmp_path: Path) -> None:
    teacher = {"model": {"kind": "pretrained", "name": "someone/model"}, "finetune": {"workers": {"cpus": 4}, "train": {}}}
    config = config_with(teacher=teacher)
    models = Models(config, tmp_path)
    ((role, source, request),) = loads_of("finetune_teacher", config, models)
    assert (role, source.name, request.section) == ("teacher", "someone/model", "teacher.finetune.workers")
    assert request.amounts["CPU"] == 4
    assert [source.name for _, source, _ in loads_of("score", config, models)] == [str(models.finetuned_folder("teacher"))]


def test_a_teacher_that_is_fine_tuned_is_stored_in_the_type_that_is_served(tmp_path: Path) -> None:
    fitted = {"model": {"kind": "pretrained", "name": str(tmp_path)}, "finetune": {"train": {}}}
    config = config_with(teacher={**fitted, "engine": {"dtype": "bfloat16"}}, student=fitted)
    models = Models(config, tmp_path)
    assert finetuning_task("teacher", config, tmp_path, models).dtype == "bfloat16"
    assert finetuning_task("student", config, tmp_path, models).dtype == "float32"


def test_a_teacher_that_is_evaluated_from_its_scores_is_not_loaded_for_that(tmp_path: Path) -> None:
    config = config_with(evaluate={"teacher": "scores"})
    assert [role for role, _, _ in loads_of("evaluate", config, Models(config, tmp_path))] == ["student"]


def test_a_reference_without_an_answer_is_told_when_the_rows_are_prepared(tmp_path: Path) -> None:
    write_examples(tmp_path / "heldout.arrow", random_examples(2, seed=1))
    (tmp_path / "heldout_texts.jsonl").write_text(heldout_texts(["so it is 7", "none"]))
    require_references(config_with(evaluate={"answer_pattern": r"(\d+)", "generate_rows": 1}), tmp_path)
    with pytest.raises(ValueError, match=r"row 1: evaluate.answer_pattern .* finds no answer in its response 'none'"):
        require_references(config_with(evaluate={"answer_pattern": r"(\d+)"}), tmp_path)
