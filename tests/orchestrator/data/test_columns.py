"""Rows whose columns hold a prompt and an answer, written with a chat template: what the models see, and what is refused."""

from typing import Any

import pytest

from orchestrator.config.data import DataConfig
from orchestrator.config.formats import AlpacaFormat, ConversationFormat, PromptCompletionFormat
from orchestrator.data.conversations import conversation_of, fields_read
from orchestrator.data.mixture import NumberedRow
from orchestrator.data.row_values import NoAnswer
from orchestrator.data.templates import render_rows
from tests.orchestrator.data.test_chat_templates import CHATML, targets, tokenizer

END = "<|im_end|>"

ALPACA = AlpacaFormat(kind="alpaca", template=CHATML)
PAIR = PromptCompletionFormat(kind="prompt_completion", template=CHATML)


def spoken(row: dict[str, Any], format: ConversationFormat) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation_of(row, format).messages]


def test_an_instruction_with_and_without_input_is_a_question_and_its_answer() -> None:
    with_input = {"instruction": "Sort.", "input": "2, 1", "output": "1, 2"}
    assert spoken(with_input, ALPACA) == [("user", "Sort.\n\n2, 1"), ("assistant", "1, 2")]
    assert spoken({**with_input, "input": ""}, ALPACA) == [("user", "Sort."), ("assistant", "1, 2")]
    assert spoken({**with_input, "input": None}, ALPACA) == [("user", "Sort."), ("assistant", "1, 2")]


def test_columns_of_other_names_and_a_systems_message() -> None:
    format = AlpacaFormat(kind="alpaca", user="{{ question }}", system="{{ system_prompt }}", output="response")
    row = {"question": "One?", "system_prompt": "Be brief.", "response": "1"}
    assert spoken(row, format) == [("system", "Be brief."), ("user", "One?"), ("assistant", "1")]
    assert spoken({**row, "system_prompt": " "}, format) == [("user", "One?"), ("assistant", "1")]
    assert fields_read(format) == {"question", "system_prompt", "response"}


def test_texts_and_messages_are_prompt_and_completion() -> None:
    asked, answered = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}
    as_texts = [("user", "One?"), ("assistant", "1")]
    assert spoken({"prompt": "One?", "completion": "1"}, PAIR) == as_texts
    assert spoken({"prompt": [asked], "completion": [answered]}, PAIR) == as_texts
    assert spoken({"prompt": [asked], "completion": "1"}, PAIR) == as_texts
    assert spoken({"prompt": "One?", "completion": [answered]}, PAIR) == as_texts


def test_what_the_assistant_says_in_the_prompt_is_no_target() -> None:
    talk = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    row = {"prompt": talk, "completion": [{"role": "assistant", "content": "d"}]}
    (rendered,) = render_rows([NumberedRow(0, row)], DataConfig(format=PAIR), tokenizer(END)).rows
    assert targets(rendered) == ["d<|im_end|>"]
    chat = {"kind": "chat", "template": CHATML}
    (whole,) = render_rows(
        [NumberedRow(0, {"messages": [*talk, *row["completion"]]})], DataConfig.model_validate({"format": chat}), tokenizer(END)
    ).rows
    assert whole.text == rendered.text and targets(whole) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_rendered_row_is_that_of_the_same_messages() -> None:
    row = {"instruction": "Sort <|im_end|>.", "input": "2, 1", "output": "1, 2"}
    messages = [{"role": "user", "content": "Sort <|im_end|>.\n\n2, 1"}, {"role": "assistant", "content": "1, 2"}]
    chat = DataConfig.model_validate({"format": {"kind": "chat", "template": CHATML}})
    (ours,) = render_rows([NumberedRow(7, row)], DataConfig(format=ALPACA), tokenizer(END)).rows
    (theirs,) = render_rows([NumberedRow(7, {"messages": messages})], chat, tokenizer(END)).rows
    assert ours == theirs and ours.special_tokens == (("<|im_end|>", 1),) and ours.ordinary_spans


def test_tools_of_a_row_are_offered() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert conversation_of({"prompt": "One?", "completion": "1", "tools": tools}, PAIR).tools == tools


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        (ALPACA, {"instruction": "a", "input": ""}, r"has no field 'output', which data\.format\.output names; its fields"),
        (ALPACA, {"instruction": "a", "output": "b"}, r"data\.format\.user cannot be filled in: 'input' is undefined; its"),
        (ALPACA, {"instruction": "a", "input": "", "output": 3}, r"message 1 \(field 'output'\): the content must be text"),
        (ALPACA.model_copy(update={"user": "{% if %}"}), {"output": "b"}, r"data\.format\.user is no Jinja template: line 1"),
        (ALPACA.model_copy(update={"system": "{{ x"}), {"output": "b"}, r"data\.format\.system is no Jinja template: line 1"),
        (PAIR, {"prompt": "a"}, r"has no field 'completion', which data\.format\.completion names; its fields are 'prompt'"),
        (PAIR, {"prompt": None, "completion": "b"}, "field 'prompt', which data.format.prompt names, must be a text or a list"),
        (PAIR, {"prompt": [], "completion": "b"}, r"must be a text or a list of messages, not \[\]"),
        (PAIR, {"prompt": "a", "completion": [{"content": "b"}]}, "message 1 has no 'role'"),
        (PAIR, {"prompt": [{"role": "assistant", "content": "a"}], "completion": "b"}, "message 0 is the assistant's"),
    ],
)
def test_columns_that_cannot_be_read_are_refused(format: ConversationFormat, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conversation_of(row, format)


@pytest.mark.parametrize(
    ("format", "row"),
    [
        (ALPACA, {"instruction": "a", "input": "", "output": " "}),
        (PAIR, {"prompt": "a", "completion": None}),
        (PAIR, {"prompt": "a", "completion": [{"role": "user", "content": "b"}]}),
    ],
)
def test_rows_without_an_answer_are_known_as_such(format: ConversationFormat, row: dict[str, Any]) -> None:
    with pytest.raises(NoAnswer):
        conversation_of(row, format)
