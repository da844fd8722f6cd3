"""What a user may write of a language model that answers with label words, and what a user is told."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config.load import ConfigError, apply_override, validate
from orchestrator.config.run import RunConfig

SHIPPED: dict[str, Any] = yaml.safe_load(Path("configs/grading_lm_cpu.yaml").read_text())


def changed(*overrides: str) -> RunConfig:
    tree = yaml.safe_load(yaml.safe_dump(SHIPPED))
    for override in overrides:
        apply_override(tree, override)
    return validate(tree)


def test_the_teacher_may_be_served_by_either_engine_and_is_measured_by_its_scores() -> None:
    assert changed().teacher.engine.dtype == "float32" and not changed().loads_teacher_to_measure
    assert changed("teacher.engine.kind=vllm").teacher.engine.kind == "vllm"
    assert changed("teacher.label_words=null").loads_teacher_to_measure


def test_words_that_are_not_said_are_the_labels_texts() -> None:
    words = changed("task.labels=[1, 2, 3]", "teacher.label_words.words=null").teacher.label_words
    assert words is not None and words.texts((1, 2, 3)) == ("1", "2", "3")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["teacher.label_words.words=[good, bad]"],
            r"words has 2, and task\.labels has 3 \(wrong, partly, right\); one word .* \[' wrong', ' partly', ' right'\]",
        ),
        (["teacher.label_words.words=[a, '', c]"], r"words has an empty word for the label 'partly'; ' partly' would do"),
        (["teacher.label_words.prompt=''"], r"teacher\.label_words\.prompt: .*at least 1 character"),
        (
            ["teacher.model={kind: text_mlp}"],
            r"label_words are the answers of a causal language model, and teacher\.model\.kind is text_mlp; .*kind=pretrained",
        ),
        (["teacher.model={kind: soft_labels}"], r"teacher\.model\.kind is soft_labels; teacher\.label_words=null would do"),
        (["teacher.finetune={train: {}}"], r"a teacher with teacher\.label_words is taken as it is: teacher\.finetune=null"),
        (
            ["teacher.label_words=null", "teacher.engine.kind=vllm"],
            r"kind vllm serves language models, .*kind=transformers would do, or teacher\.label_words for a causal",
        ),
        (
            ["task={kind: language_model}", "data.format={kind: instruction}", "tokenizer=null", "scores.top_k=8",
             "student.model={kind: pretrained, name: x}"],
            r"label_words says how .* tells labels apart, and the task is language_model: teacher\.label_words=null would do, or",
        ),
    ],
)  # fmt: skip
def test_what_cannot_answer_with_words_is_refused_by_key_and_value(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(*overrides)
