"""Which model and which tokenizer a run works with."""

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from orchestrator.config_file import validate
from orchestrator.models import Models
from tests.orchestrator.test_config import SMALL
from tests.worlds import VOCAB, tiny_llama, word_tokenizer


def models_of(folder: Path, **sections: Any) -> Models:
    return Models(validate({**copy.deepcopy(SMALL), **sections}), folder)


def pretrained(path: Path) -> dict[str, Any]:
    return {"model": {"kind": "pretrained", "name": str(path)}}


def test_a_pair_of_one_vocabulary_shares_the_teachers_tokenizer(tmp_path: Path) -> None:
    teacher, student = tiny_llama(tmp_path / "teacher", seed=0), tiny_llama(tmp_path / "student", seed=1)
    models = models_of(tmp_path / "run", tokenizer=None, teacher=pretrained(teacher), student=pretrained(student))
    assert models.tokenizer_for([]).get_vocab() == models.tokenizer().get_vocab() == word_tokenizer().get_vocab()
    assert models.ready("teacher").name == str(teacher) and models.ready("student").name == str(student)


def test_a_pair_of_two_vocabularies_is_refused_with_the_tokens_that_differ(tmp_path: Path) -> None:
    teacher, student = tiny_llama(tmp_path / "teacher", seed=0), tiny_llama(tmp_path / "student", seed=1)
    word_tokenizer(VOCAB - 3).save_pretrained(student)
    models = models_of(tmp_path / "run", tokenizer=None, teacher=pretrained(teacher), student=pretrained(student))
    with pytest.raises(ValueError, match=f"w{VOCAB - 1}"):
        models.tokenizer_for([])


def test_a_scratch_student_is_as_wide_as_a_pretrained_teachers_head(tmp_path: Path) -> None:
    teacher = tiny_llama(tmp_path / "teacher", seed=0)
    word_tokenizer(VOCAB - 6).save_pretrained(teacher)  # a head padded beyond the tokenizer's ids
    models = models_of(tmp_path / "run", tokenizer=None, teacher=pretrained(teacher))
    models.make_scratch_models(models.tokenizer_for([]))
    student = AutoModelForCausalLM.from_pretrained(models.begun("student").name)
    assert student.get_output_embeddings().weight.shape[0] == VOCAB


def test_a_fitted_model_takes_the_place_of_the_one_it_began_as(tmp_path: Path) -> None:
    models = models_of(tmp_path / "run")
    assert models.ready("teacher").name == str(models.fitted_folder("teacher")) != models.begun("teacher").name
    assert models.ready("student") == models.begun("student")


def test_a_chat_template_of_the_configuration_goes_with_the_tokenizer(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    models = models_of(tmp_path / "run", data={"format": {"kind": "chat", "template": template}}, tokenizer={"vocab_size": 300})
    models.tokenizer_for([" ".join(f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmn" for c in "opqrst")])
    assert models.tokenizer().chat_template == template
