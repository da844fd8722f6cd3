"""Where answers end: one set of tokens for evaluation, for the exported folder, and for those who serve it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from actors.config.models import EvaluateConfig, TrainConfig
from actors.evaluation.answer_ends import (
    AnswerEnds,
    own_ends,
    read_answer_ends,
    settle_answer_ends,
    stop_as_evaluated,
    write_answer_ends,
)
from actors.evaluation.generation import generate_answers
from actors.examples import ExampleFile, write_examples
from actors.model_source import ModelSource
from actors.records import Example, example_key
from actors.student.loop import distil
from actors.student.task import TrainingTask
from actors.student.train_checkpoints import NoCheckpoints
from losses.config import HardLabelLoss

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "user", "assistant", "red", "blue", "sky", "?", "green", "grass", "Ċ"]
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def chat_tokenizer(eos: str = "<|endoftext|>") -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=eos, unk_token="?", chat_template=CHATML, additional_special_tokens=WORDS[:3]
    )


def model_in(folder: Path, generation: dict[str, Any] | None) -> ModelSource:
    """Write a small Llama; ``generation`` is its generation_config.json, None for none."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelSource(str(folder))


def test_ends_come_from_rows_tokenizer_and_models(tmp_path: Path) -> None:
    both = model_in(tmp_path / "both", {"eos_token_id": [0, 2]})
    assert own_ends(both) == (0, 2)
    assert own_ends(model_in(tmp_path / "one", {"eos_token_id": 2})) == (2,)
    assert own_ends(model_in(tmp_path / "none", {})) == own_ends(model_in(tmp_path / "no_file", None)) == (0,)  # config.json's
    assert settle_answer_ends(chat_tokenizer(), ["<|im_end|>"], []) == AnswerEnds((2, 0), ())
    assert settle_answer_ends(chat_tokenizer(), [""], [both]) == AnswerEnds((0, 2), ())
    odd = model_in(tmp_path / "odd", {"eos_token_id": [2, 7]})
    assert settle_answer_ends(chat_tokenizer(), [], [odd]) == AnswerEnds((0, 2), (7,))


@pytest.mark.parametrize("eos", ["<|endoftext|>", "<|im_end|>"])
def test_the_ends_are_the_same_whichever_is_called_eos(tmp_path: Path, eos: str) -> None:
    both = model_in(tmp_path / "both", {"eos_token_id": [0, 2]})
    assert set(settle_answer_ends(chat_tokenizer(eos), ["<|im_end|>"], [both]).ids) == {0, 2}


def test_no_end_at_all_is_refused() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(
        ValueError,
        match=r"no end-of-sequence token, no turn ends in a special token, "
        r".*data\.format\.template that",
    ):
        settle_answer_ends(tokenizer, [""], [])


def test_ends_are_kept_beside_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert read_answer_ends(tmp_path, tokenizer) == (0,)  # a tokenizer alone
    write_answer_ends(AnswerEnds((2, 0), ()), tokenizer, tmp_path)
    assert read_answer_ends(tmp_path, tokenizer) == (2, 0)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-sequence token, so no answer would end"):
        read_answer_ends(tmp_path / "elsewhere", tokenizer)


def test_a_model_keeps_how_it_samples(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    write_answer_ends(AnswerEnds((2, 0), ()), tokenizer, tmp_path)
    source = model_in(tmp_path / "m", {"do_sample": True, "temperature": 0.7, "eos_token_id": 0})
    model = AutoModelForCausalLM.from_pretrained(source.name)
    stop_as_evaluated(model, tmp_path)
    settings = model.generation_config
    assert (settings.eos_token_id, settings.pad_token_id, settings.do_sample, settings.temperature) == ([2, 0], 2, True, 0.7)
    assert model.config.eos_token_id == [2, 0]
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    stop_as_evaluated(other, tmp_path / "nothing")
    assert other.generation_config.eos_token_id == 0


TALK = {"sky ?": "blue", "grass ?": "green green"}


def chat_rows(tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    rows = []
    for number, (question, answer) in enumerate(TALK.items()):
        asked = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        ids = np.array([*prompt, *tokenizer(f"{answer} <|im_end|>", add_special_tokens=False)["input_ids"]], np.int32)
        mask = np.arange(len(ids)) >= len(prompt)
        rows.append(Example(ids, mask, example_key(ids, mask), number))
    return rows


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base student, which ends at <|endoftext|>, taught to end its turns with <|im_end|>: its exported folder."""
    folder = tmp_path_factory.mktemp("ends")
    base = {"eos_token_id": 0, "do_sample": True, "temperature": 0.5}
    student, tokenizer = model_in(folder / "student", base), chat_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    teacher = model_in(folder / "teacher", {"eos_token_id": [0, 2]})
    write_answer_ends(settle_answer_ends(tokenizer, ["<|im_end|>"], [teacher, student]), tokenizer, folder / "tokenizer")
    write_examples(folder / "train.arrow", chat_rows(tokenizer) * 4)
    train = {"epochs": 60, "batch_rows": 8, "micro_batch_rows": 8, "optimizer": {"learning_rate": 1e-2}}
    task = TrainingTask(
        "train", student, str(folder / "tokenizer"), None, HardLabelLoss(kind="hard_label"),
        TrainConfig.model_validate(train), str(folder / "train.arrow"), None, 8, 1.0, 0, 1, False, str(folder / "metrics"),
        str(folder / "out"),
    )  # fmt: skip
    distil(task, NoCheckpoints())
    return folder / "out"


def test_evaluation_stops_at_the_end_of_the_turn(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ends = read_answer_ends(exported, tokenizer)
    assert ends == (2, 0)
    model = AutoModelForCausalLM.from_pretrained(exported)
    write_examples(exported.parent / "heldout.arrow", chat_rows(tokenizer))
    settings = EvaluateConfig(max_new_tokens=12)
    heldout = ExampleFile(exported.parent / "heldout.arrow")
    prompts = [heldout[row].last_prompt for row in range(len(heldout))]
    answers = generate_answers(model, tokenizer, prompts, settings, ends)
    assert answers == list(TALK.values())
    at_eos_alone = generate_answers(model, tokenizer, prompts, settings, (0,))
    assert at_eos_alone != answers, "what stands behind the end of the turn would be part of the answer"


def test_a_users_plain_generate_stops_where_evaluation_did(exported: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    for question, answer in TALK.items():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )  # fmt: skip
        generated = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(generated) == f"{answer} <|im_end|>"
    settings = GenerationConfig.from_pretrained(exported)
    assert (settings.eos_token_id, settings.do_sample, settings.temperature) == ([2, 0], True, 0.5)


SERVE = """
import json, sys
from vllm import LLM
llm = LLM(model=sys.argv[1], dtype="float32", max_model_len=64, kv_cache_memory_bytes=1 << 24, enforce_eager=True)
settings = llm.get_default_sampling_params()  # as vllm serve has them, from the folder's generation_config.json
settings.max_tokens, settings.temperature = 12, 0.0
talks = [[{"role": "user", "content": question}] for question in json.loads(sys.argv[2])]
print("ANSWERS", json.dumps([output.outputs[0].text.split() for output in llm.chat(talks, settings, use_tqdm=False)]))
"""


@pytest.mark.slow
def test_vllm_stops_where_evaluation_did(exported: Path) -> None:
    surroundings = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", SERVE, str(exported), json.dumps(list(TALK))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=surroundings)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert json.loads(line.removeprefix("ANSWERS")) == [answer.split() for answer in TALK.values()]
