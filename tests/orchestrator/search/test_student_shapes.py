"""Searches over the shape of a student: what of it may vary between trials, and what is refused in words."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config.load import ConfigError, load_config, validate
from orchestrator.config.run import RunConfig
from orchestrator.search.bound_space import bind, search_of
from orchestrator.search.compare import bind_arms
from tune_spaces.space import read_space

PRETRAINED = load_config("configs/qwen_7b_to_0.5b_lora.yaml")
TINY = load_config("configs/tiny_cpu.yaml")
UNTUNED = load_config("configs/tiny_cpu.yaml", ["student.finetune=null"])
GRADING = load_config("configs/grading_cpu.yaml")
DIGITS = load_config("configs/digits_reffakd.yaml")


def test_the_shape_of_a_student_made_from_nothing_can_be_searched_by_key_and_as_a_section() -> None:
    by_key = bind(UNTUNED, read_space({"student.model.hidden_size": {"low": 32, "high": 64, "step": 16, "integer": True}}))
    assert [by_key.config_of(point).student.model.hidden_size for point in by_key.grid()] == [32, 48, 64]  # type: ignore[union-attr]
    models = [{"kind": "text_mlp", "hidden": 4}, {"kind": "text_rnn"}]
    whole = bind(GRADING, read_space({"student.model": models, "student.model.width": [2, 4], "loss.distillation_weight": [1.0]}))
    found = [whole.config_of(point).student.model for point in whole.grid()]
    assert [(model.kind, model.width) for model in found] == [  # type: ignore[union-attr]
        ("text_mlp", 2), ("text_mlp", 4), ("text_rnn", 2), ("text_rnn", 4)
    ]  # fmt: skip
    assert found[0].hidden == 4, "keys lie over the section"  # type: ignore[union-attr]


def changed(config: RunConfig, **sections: Any) -> RunConfig:
    return validate({**config.model_dump(mode="json"), **sections})


@pytest.mark.parametrize(
    ("config", "space", "message"),
    [
        (PRETRAINED, {"student.model.name": ["a", "b"]},
         r"cannot vary student\.model\.name: student\.model\.kind is pretrained, .* as student\.model\.kind=scratch"),
        (changed(UNTUNED, student={"model": {"kind": "cut", "layers": 2}}), {"student.model.layers": [1, 2]},
         r"cannot vary student\.model\.layers: student\.model\.kind is cut, whose weights come from elsewhere, and all trials"),
        (changed(UNTUNED, responses={"writer": "student", "engine": {"kind": "transformers"}}), {"student.model.layers": [1, 2]},
         r"student\.model\.layers: responses\.writer is student, and the rows of all .*; responses\.writer=teacher would do"),
        (UNTUNED, {"student.model": [{"kind": "cut", "layers": 2}]},
         r"with student\.model=.*: student\.model\.kind is cut, .* draw theirs: scratch would do"),
        (GRADING, {"student.model": [{"kind": "text_mlp"}, {"kind": "pretrained", "name": "a"}]},
         r"(?s)with student\.model=\{'kind': 'pretrained', .* tokenizer=null would do"),
        (changed(GRADING, tokenizer=None, student={"model": {"kind": "pretrained", "name": "a"}}), {"student.model": [{}]},
         r"cannot vary student\.model: student\.model\.kind is pretrained, .* as student\.model\.kind=text_cnn"),
        (changed(DIGITS, tokenizer=None), {"student.model": [{"kind": "text_mlp"}]}, r"text_mlp does not read images"),
        (UNTUNED, {"student.model.heads": [2, 3]}, r"hidden_size 64 must be an even multiple of heads 3; hidden_size 66 would"),
        (GRADING, {"student.model.hidden": [2]}, r"student\.model\.hidden: does not go with text_cnn"),
        (changed(GRADING, teacher={"model": {"kind": "soft_labels"}}), {"seed": [0, 1]}, r"cannot vary seed: it draws and fine"),
    ],
)  # fmt: skip
def test_students_that_a_trial_cannot_draw_are_refused(config: RunConfig, space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bind(config, read_space(space))


def test_an_arm_whose_student_cannot_be_drawn_is_refused() -> None:
    arms = {"deep": {"student.model.layers": 4}}
    assert bind_arms(UNTUNED, arms).config_of(arms["deep"]).student.model.layers == 4  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"compare\.own_arms\.deep cannot vary student\.model\.layers: student\.finetune"):
        bind_arms(TINY, arms)


def test_the_space_of_the_page_on_classification_can_be_searched() -> None:
    blocks = re.findall(r"^```yaml\n(tune:\n.*?)^```", Path("docs/classification.md").read_text(), re.MULTILINE | re.DOTALL)
    assert [len(search_of(changed(GRADING, **yaml.safe_load(block))).grid()) for block in blocks] == [3 * 3 + 3 * 4]
    assert len(search_of(GRADING).grid()) == 6
