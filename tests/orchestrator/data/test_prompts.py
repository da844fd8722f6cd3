"""What models are asked by rows without an answer is what rows with one begin with in training."""

from functools import cache
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from orchestrator.config.data import TASK_KINDS, DataConfig
from orchestrator.config.formats import (
    AlpacaFormat,
    ChatFormat,
    FormatConfig,
    InstructionFormat,
    PromptCompletionFormat,
    ShareGptFormat,
)
from orchestrator.data.mixture import numbered
from orchestrator.data.synthetic import make_rows
from orchestrator.data.templates import render_prompts, render_rows, texts_to_learn
from orchestrator.data.tokenization import tokenize, tokenize_prompts
from orchestrator.data.tokenizers import train_tokenizer

INSTRUCTION, CHAT, SHAREGPT = InstructionFormat(kind="instruction"), ChatFormat(kind="chat"), ShareGptFormat(kind="sharegpt")
ALPACA, COMPLETION = AlpacaFormat(kind="alpaca", system="{{ system }}"), PromptCompletionFormat(kind="prompt_completion")
ASKED, ANSWERED = {"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3"}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(texts_to_learn(numbered(make_rows(60, TASK_KINDS, 0)), DataConfig()), 300)


def bracketed() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a token before and another behind every text."""
    found = train_tokenizer(texts_to_learn(numbered(make_rows(60, TASK_KINDS, 0)), DataConfig()), 300)
    ends = [(token, found.convert_tokens_to_ids(token)) for token in ("<|user|>", "<|end|>")]
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|user|> $A <|end|>", special_tokens=ends)
    return found


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def both(
    answered: dict[str, Any], format: FormatConfig, asked: dict[str, Any], of: PreTrainedTokenizerFast | None = None, **data: Any
) -> tuple[list[int], str]:
    """Compare the prompts of a row with its answer and without; return tokens and text."""
    speaks, settings = of or tokenizer(), DataConfig(format=format, **data)
    (trained,) = tokenize(render_rows(numbered([answered]), settings, speaks).rows, speaks, settings).examples
    rendered = render_prompts(numbered([asked, answered]), format, settings, speaks)
    bare, kept = tokenize_prompts(rendered, speaks)
    assert bare.tolist() == kept.tolist() == trained.last_prompt.tolist()
    assert not rendered[0].target_spans and rendered[0].text == rendered[1].text
    return bare.tolist(), rendered[0].prompt


def test_an_instruction_needs_no_response() -> None:
    for row in make_rows(40, TASK_KINDS, seed=3):
        _, prompt = both(row, INSTRUCTION, without(row, "response"))
        assert prompt.startswith(row["instruction"]) and prompt.endswith("\n")


def test_what_a_tokenizer_puts_behind_a_text_does_not_come_before_the_answer() -> None:
    row, speaks = {"instruction": "Go.", "input": "", "response": "1"}, bracketed()
    tokens, _ = both(row, INSTRUCTION, without(row, "response"), speaks)
    assert speaks("Go.\n")["input_ids"] == [*tokens, speaks.eos_token_id]


def test_special_tokens_of_people_are_ordinary_characters_here_too() -> None:
    row = {"instruction": "Say <|end|> now.", "input": "", "response": "no"}
    tokens, prompt = both(row, INSTRUCTION, without(row, "response"))
    assert tokenizer().eos_token_id not in tokens and prompt == "Say <|end|> now.\n"
    _, stripped = both(row, INSTRUCTION, without(row, "response"), special_tokens="strip")
    assert stripped == "Say  now.\n"


@pytest.mark.parametrize(
    ("format", "answered", "asked"),
    [
        (CHAT, {"messages": [ASKED, ANSWERED, ASKED, ANSWERED]}, {"messages": [ASKED, ANSWERED, ASKED]}),
        (CHAT, {"messages": [{"role": "system", "content": "Be brief."}, ASKED, ANSWERED]},
         {"messages": [{"role": "system", "content": "Be brief."}, ASKED]}),
        (SHAREGPT, {"conversations": [{"from": "human", "value": "1+2?"}, {"from": "gpt", "value": "3"}]},
         {"conversations": [{"from": "human", "value": "1+2?"}]}),
        (ALPACA, {"system": "", "instruction": "1+2?", "input": "", "output": "3"},
         {"system": "", "instruction": "1+2?", "input": ""}),
        (COMPLETION, {"prompt": "1+2?", "completion": "3"}, {"prompt": "1+2?"}),
        (COMPLETION, {"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]}, {"prompt": [ASKED, ANSWERED, ASKED]}),
    ],
)  # fmt: skip
def test_conversations_need_no_last_answer(format: FormatConfig, answered: dict[str, Any], asked: dict[str, Any]) -> None:
    _, prompt = both(answered, format, asked)
    assert prompt.endswith("1+2?<|end|><|assistant|>")


def test_what_follows_the_last_answer_is_answered() -> None:
    rows = numbered([{"messages": [ASKED, ANSWERED, {"role": "user", "content": "And 4?"}]}])
    (rendered,) = render_prompts(rows, CHAT, DataConfig(format=CHAT), tokenizer())
    assert rendered.prompt == "<|user|>1+2?<|end|><|assistant|>3<|end|><|user|>And 4?<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        (INSTRUCTION, {"instruction": "x"}, r"data\.format\.prompt cannot be filled in: 'input' is undefined; its"),
        (INSTRUCTION, {"instruction": " ", "input": ""}, r"its prompt is empty: there is nothing to answer"),
        (CHAT, {"text": "x"}, r"has no field 'messages', which data\.format\.messages names; its fields are 'text'"),
        (CHAT, {"messages": []}, r"field 'messages' must be a list of messages, not \[\]"),
        (CHAT, {"messages": [ANSWERED]}, r"the assistant is asked nothing; a message of the user before its own would do"),
        (CHAT, {"messages": [ANSWERED, ASKED]}, r"the assistant is asked nothing"),
        (CHAT, {"messages": [ASKED, ANSWERED, {"role": "user", "content": " "}]}, r"message 2 is empty: there is nothing"),
        (ALPACA, {"system": "", "instruction": "", "input": ""}, r"message 0 is empty: there is nothing to answer"),
        (COMPLETION, {"completion": "3"}, r"has no field 'prompt', which data\.format\.prompt names"),
    ],
)  # fmt: skip
def test_rows_that_ask_nothing_are_named(format: FormatConfig, row: dict[str, Any], message: str) -> None:
    sound = {"instruction": "Go.", "input": "", "messages": [ASKED], "system": "", "prompt": "1+2?"}
    with pytest.raises(ValueError, match=f"^row 1: {message}"):
        render_prompts(numbered([sound, row]), format, DataConfig(format=format), tokenizer())
