"""What is refused of models before a device is taken: windows, vocabularies, adapters."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from actors.examples import write_examples
from actors.records import Example, example_key
from orchestrator.config.load import validate
from orchestrator.config.run import RunConfig
from orchestrator.data.tokenizers import require_same_tokens
from orchestrator.models.model_checks import RowLimits, require_models_fit, row_limits, window_of
from orchestrator.models.models import Models
from tests.worlds import tiny_llama, word_tokenizer

FITS = RowLimits(longest=20, longest_prompt=10, largest_id=90)
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 96}


def config_for(model_type: str, **settings: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **settings)


def scaled(kind: str, **settings: Any) -> PreTrainedConfig:
    return config_for("llama", **SIZES, max_position_embeddings=64, rope_scaling={"rope_type": kind, "factor": 4.0, **settings})


@pytest.mark.parametrize(
    ("settings", "window", "by_vllm"),
    [
        (config_for("llama", max_position_embeddings=64), 64, 64),
        (scaled("linear"), 256, 256),
        (scaled("dynamic"), 256, 256),
        (scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16), 64, 64),
        (scaled("yarn", original_max_position_embeddings=64), 256, 64),
        (config_for("gpt2", n_positions=128), 128, 128),
        (config_for("opt", max_position_embeddings=128), 128, 128),
        (config_for("mpt", max_seq_len=128), 128, 128),
        (config_for("gemma3_text", max_position_embeddings=512), 512, 512),
        (config_for("bloom"), None, None),
        (config_for("mamba"), None, None),
    ],
)
def test_the_window_of_a_model(settings: PreTrainedConfig, window: int | None, by_vllm: int | None) -> None:
    assert (window_of(settings), window_of(settings, served_by_vllm=True)) == (window, by_vllm)


def run_in(folder: Path, **sections: Any) -> tuple[RunConfig, Models]:
    for seed, name in enumerate(("teacher", "student"), start=1):
        if not (folder / name).exists():
            tiny_llama(folder / name, seed=seed)
    tree: dict[str, Any] = {
        "name": "small", "output": str(folder), "evaluate": {"max_new_tokens": 8},
        "teacher": {"model": {"kind": "pretrained", "name": str(folder / "teacher")}},
        "student": {"model": {"kind": "pretrained", "name": str(folder / "student")}},
    }  # fmt: skip
    for section, said in sections.items():
        tree[section] = {**tree.get(section, {}), **said}
    config = validate(tree)
    models = Models(config, folder / "run")
    models.tokenizer_for([])
    return config, models


def test_rows_that_fit_pass_without_a_word(tmp_path: Path) -> None:
    assert require_models_fit(*run_in(tmp_path), FITS) == []


def test_rows_beyond_a_window_name_both_models_and_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        require_models_fit(*run_in(tmp_path), RowLimits(70, 10, 90))
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    assert str(caught.value) == (
        f"the models cannot take the rows: the longest row has 70 tokens, the teacher {teacher} knows 64 positions, one of which "
        f"vLLM keeps for a token that it generates; the longest row has 70 tokens, the student {student} knows 64 positions; "
        "data.max_tokens=63 would do"
    )
    require_models_fit(*run_in(tmp_path), RowLimits(63, 10, 90))


def test_a_row_as_long_as_the_window_is_too_long_for_vllm_alone(tmp_path: Path) -> None:
    whole = RowLimits(64, 10, 90)
    with pytest.raises(
        ValueError,
        match=r"the teacher .* knows 64 positions, one of which vLLM keeps .*data\.max_tokens=63 "
        r"would do",
    ):
        require_models_fit(*run_in(tmp_path), whole)
    require_models_fit(*run_in(tmp_path, teacher={"engine": {"kind": "transformers", "dtype": "float32"}}), whole)


def test_answers_beyond_a_window_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        require_models_fit(*run_in(tmp_path), RowLimits(62, 60, 90))
    prompt = "evaluation continues a prompt of 60 tokens by evaluate.max_new_tokens 8, the"
    assert str(caught.value) == (
        f"the models cannot take the rows: {prompt} teacher {tmp_path / 'teacher'} knows 64 positions; {prompt} student "
        f"{tmp_path / 'student'} knows 64 positions; evaluate.max_new_tokens=4 would do"
    )
    with pytest.raises(ValueError, match=r"evaluate\.generate_rows=0 would do"):
        require_models_fit(*run_in(tmp_path, teacher={"engine": {"kind": "transformers"}}), RowLimits(64, 64, 90))
    require_models_fit(*run_in(tmp_path), RowLimits(62, 0, 90))  # nothing is generated


def test_a_tokenizer_with_more_tokens_than_a_model_is_said_and_refused_only_where_rows_use_them(tmp_path: Path) -> None:
    for name in ("teacher", "student"):
        word_tokenizer(110).save_pretrained(tiny_llama(tmp_path / name, seed=1))
    teacher, student = require_models_fit(*run_in(tmp_path), RowLimits(20, 10, 95))
    assert teacher.startswith("the tokenizer has 110 tokens, the teacher knows 96: the others stand in no row")
    assert "the student knows 96" in student
    with pytest.raises(
        ValueError,
        match=r"the rows use token 96, and the teacher knows 96 tokens: "
        r".*resize_token_embeddings\) would do",
    ):
        require_models_fit(*run_in(tmp_path), RowLimits(20, 10, 96))


def test_a_student_whose_tokenizer_knows_more_is_allowed_and_said(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "teacher", seed=1)
    longer = AutoTokenizer.from_pretrained(tiny_llama(tmp_path / "student", seed=2))
    longer.add_tokens(["<one>", "<two>", "<three>", "<four>"])
    longer.save_pretrained(tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    student.resize_token_embeddings(len(longer))
    student.save_pretrained(tmp_path / "student")
    (said,) = require_models_fit(*run_in(tmp_path), FITS)
    assert said == (
        "the student's tokenizer has 4 tokens that the teacher's has not ('<one>', '<two>', '<three>', ...); they stand in no "
        "row, "
        "and the exported tokenizer is the teacher's"
    )
    with pytest.raises(ValueError, match="do not speak the same tokens"):
        require_same_tokens(longer, word_tokenizer())  # the teacher's rows may use what the student lacks


def test_adapters_are_tried_before_anything_is_scored(tmp_path: Path) -> None:
    on_head = {"lora": {"rank": 2, "modules": ["q_proj", "lm_head"]}}
    (said,) = require_models_fit(*run_in(tmp_path, student=on_head), FITS)
    assert said == (
        "student.lora.modules gives lm_head an adapter of its own, and the weight is shared with another layer: the exported "
        "student has the two apart, 1,536 weights more"
    )
    assert require_models_fit(*run_in(tmp_path, student={"lora": {"rank": 2}}), FITS) == []
    with pytest.raises(ValueError, match=r"student\.lora\.modules names \['c_attn'\], which the model does not have"):
        require_models_fit(*run_in(tmp_path, student={"lora": {"modules": ["c_attn"]}}), FITS)


def test_attention_that_cannot_learn_on_cpus_is_asked_of_the_workers_that_train(tmp_path: Path) -> None:
    run_in(tmp_path)
    flex = {"model": {"kind": "pretrained", "name": str(tmp_path / "teacher"), "attention": "flex_attention"}}
    assert require_models_fit(*run_in(tmp_path, teacher=flex), FITS) == []  # it only scores
    fitted = {**flex, "finetune": {"train": {"epochs": 1}}}
    with pytest.raises(ValueError, match=r"teacher\.model\.attention flex_attention"):
        require_models_fit(*run_in(tmp_path, teacher=fitted, workers={"gpus": 1}), FITS)
    on_gpu = {**flex, "finetune": {"train": {"epochs": 1}, "workers": {"gpus": 1}}}
    assert require_models_fit(*run_in(tmp_path, teacher=on_gpu), FITS) == []


def test_the_limits_of_prepared_rows(tmp_path: Path) -> None:
    def example(row: int, tokens: list[int], targets: list[int]) -> Example:
        ids, mask = np.array(tokens, np.int32), np.isin(np.arange(len(tokens)), targets)
        return Example(ids, mask, example_key(ids, mask), row)

    write_examples(tmp_path / "train.arrow", [example(0, [1, 2, 3, 4, 5, 6], [4, 5])])
    write_examples(tmp_path / "heldout.arrow", [example(1, [1, 50, 3, 4, 5], [1, 4]), example(2, [1, 2], [1])])
    config, _ = run_in(tmp_path, evaluate={"generate_rows": 5})
    assert row_limits(config, tmp_path) == RowLimits(longest=6, longest_prompt=4, largest_id=50)
    config, _ = run_in(tmp_path, evaluate={"generate_rows": 0})
    assert row_limits(config, tmp_path).longest_prompt == 0
