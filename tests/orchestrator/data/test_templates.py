"""Rows as text: prompts, conversations, the characters that are targets, and what is refused."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from orchestrator.config.data import TASK_KINDS, DataConfig
from orchestrator.config.formats import ChatFormat, FormatConfig, InstructionFormat
from orchestrator.data.mixture import NumberedRow, numbered
from orchestrator.data.synthetic import make_rows
from orchestrator.data.templates import RenderedRow, render_rows, texts_to_learn
from orchestrator.data.tokenizers import train_tokenizer

INSTRUCTION = InstructionFormat(kind="instruction")
CHAT = ChatFormat(kind="chat")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "It is 2"},
]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(texts_to_learn(numbered(make_rows(60, TASK_KINDS, 0)), DataConfig()), 300)


def without_template() -> PreTrainedTokenizerFast:
    copy = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, eos_token="<|end|>")
    assert copy.chat_template is None
    return copy


def render(row: Mapping[str, Any], format: FormatConfig = INSTRUCTION, **settings: Any) -> RenderedRow:
    (rendered,) = render_rows([NumberedRow(7, row)], DataConfig(format=format, **settings), tokenizer()).rows
    return rendered


def chat(*messages: Any, template: str | None = None) -> RenderedRow:
    return render({"messages": list(messages)}, ChatFormat(kind="chat", template=template))


def targets(rendered: RenderedRow) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.target_spans]


def test_an_instruction_with_and_without_input() -> None:
    with_input = render({"task": "sort", "instruction": "Sort.", "input": "2, 1", "response": "1, 2"})
    assert with_input == RenderedRow(7, "Sort.\n2, 1\n1, 2", ((11, 15),), "Sort.\n2, 1\n", "1, 2", "sort")
    assert render({"instruction": "Go.", "input": "", "response": " é👍"}) == RenderedRow(
        7, "Go.\n é👍", ((4, 7),), "Go.\n", " é👍", None
    )


def test_a_null_field_counts_as_false_in_a_condition() -> None:
    assert render({"instruction": "Go.", "input": None, "response": "x"}).prompt == "Go.\n"


def test_a_null_field_is_not_printed() -> None:
    with pytest.raises(ValueError, match=r"row 7: data\.format\.prompt cannot be filled in: it prints a field that is null"):
        render({"instruction": None, "input": "", "response": "x"})


def test_a_prompt_of_ones_own_keeps_its_line_ends_and_a_field_of_any_kind() -> None:
    format = InstructionFormat(kind="instruction", prompt="Q{{ n }}: {{ question }}\n\nA: ", response="answer")
    rendered = render({"n": 3, "question": "<b>&?", "answer": "yes"}, format)
    assert rendered.text == "Q3: <b>&?\n\nA: yes"
    assert targets(rendered) == ["yes"]


def test_a_missing_field_names_row_field_and_the_fields_there_are() -> None:
    with pytest.raises(ValueError, match=r"row 7: .*'input' is undefined; its fields are 'instruction', 'response'"):
        render({"instruction": "Go.", "response": "x"})
    with pytest.raises(ValueError, match=r"row 7: .*'instruction' is undefined; its fields are none at all"):
        render({})


def test_a_prompt_that_cannot_be_computed_names_the_row() -> None:
    format = InstructionFormat(kind="instruction", prompt="{{ instruction + 1 }}")
    with pytest.raises(ValueError, match=r"row 7: data\.format\.prompt cannot be filled in: can only concatenate str"):
        render({"instruction": "Go.", "response": "x"}, format)


def test_a_prompt_cannot_reach_into_python() -> None:
    format = InstructionFormat(kind="instruction", prompt="{{ instruction.__class__.__mro__ }}")
    with pytest.raises(ValueError, match=r"row 7: .*access to attribute '__class__' of 'str' object is unsafe"):
        render({"instruction": "Go.", "response": "x"}, format)


def test_a_prompt_that_is_no_template() -> None:
    with pytest.raises(ValueError, match=r"data\.format\.prompt is no Jinja template: line 2: "):
        render({"response": "x"}, InstructionFormat(kind="instruction", prompt="\n{% if %}"))


def test_a_missing_response_names_the_key() -> None:
    with pytest.raises(
        ValueError, match=r"row 7: has no field 'response', which data\.format\.response names; its fields are 'i.*'"
    ):
        render({"instruction": "Go.", "input": ""})


@pytest.mark.parametrize("response", ["", " \n\t", None])
def test_an_empty_response_names_the_row_and_the_key(response: str | None) -> None:
    kind = "null" if response is None else "empty"
    with pytest.raises(ValueError, match=rf"row 7: the response \(field 'response'\) is {kind}: .*; data\.without_answer=drop"):
        render({"instruction": "Go.", "input": "", "response": response})


@pytest.mark.parametrize(("response", "shown"), [(3, "3"), (["x" * 99], r"\['x+\.\.\.")])
def test_a_response_that_is_no_text(response: Any, shown: str) -> None:
    with pytest.raises(ValueError, match=rf"row 7: the response \(field 'response'\) must be text, not {shown}"):
        render({"instruction": "Go.", "input": "", "response": response})


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row 7: the character '\\ud83d' is half of a surrogate pair"):
        render({"instruction": "Go.", "input": "", "response": "\ud83d"})
    with pytest.raises(ValueError, match=r"row 7: message 0: the character '\\ud83d' is half of a surrogate pair"):
        chat({"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "x"})


def test_every_assistant_message_is_a_target_with_its_end_of_turn() -> None:
    rendered = chat(*TURNS)
    assert targets(rendered) == ["1<|end|>", "It is 2<|end|>"]
    assert (
        rendered.text
        == "<|system|>Be brief.<|end|><|user|>One?<|end|><|assistant|>1<|end|><|user|>Two?<|end|><|assistant|>It is 2<|end|>"
    )
    assert rendered.prompt == rendered.text.removesuffix("It is 2<|end|>")
    assert rendered.response == "It is 2"


def test_messages_behind_the_last_answer_are_left_out() -> None:
    assert chat(*TURNS, {"role": "user", "content": "Three?"}) == chat(*TURNS)


def test_a_template_of_ones_own_with_text_behind_the_end_of_turn() -> None:
    ending = CHATML.replace("<|im_end|>", "<|end|>")
    assert targets(chat(*TURNS, template=ending)) == ["1<|end|>", "It is 2<|end|>"]


def test_without_an_end_of_sequence_token_the_whole_turn_is_a_target() -> None:
    assert targets(chat(*TURNS, template=CHATML)) == ["1<|im_end|>\n", "It is 2<|im_end|>\n"]


def test_a_field_of_another_name_and_a_task() -> None:
    rendered = render({"talk": TURNS, "task": "chat"}, ChatFormat(kind="chat", messages="talk"))
    assert (rendered.row, rendered.task) == (7, "chat")


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    last_only = (
        "{% for m in messages %}[{{ m.role }}]{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(
        ValueError, match=r"row 7: the chat template does not write message 2 as it stands in the row \('1'\) but ''; "
            r"data\.format\."
        r"turns=last would learn the last turn alone, or data\.format\.template"
    ):  # fmt: skip
        chat(*TURNS, template=last_only + "{% if add_generation_prompt %}[assistant]{% endif %}")


def test_a_template_whose_prompt_does_not_begin_the_answer_is_refused() -> None:
    thinking = CHATML.replace("{% if add_generation_prompt %}<|im_start|>assistant\n", "{% if add_generation_prompt %}<think>")
    with pytest.raises(ValueError, match=r"row 7: the chat template renders the prompt for message 2 differently"):
        chat(*TURNS, template=thinking)


def test_a_template_that_refuses_messages_names_the_row() -> None:
    with pytest.raises(ValueError, match=r"row 7: the chat template refuses the messages: no system message, please"):
        chat(*TURNS, template="{{ raise_exception('no system message, please') }}")


def test_a_tokenizer_without_a_chat_template() -> None:
    with pytest.raises(
        ValueError, match=r"no chat template and data\.format\.template is null: data\.format\.template=\.\.\. names one"
    ):
        render_rows([NumberedRow(0, {"messages": TURNS})], DataConfig(format=CHAT), without_template())
    data = DataConfig(format=ChatFormat(kind="chat", template=CHATML))
    (rendered,) = render_rows([NumberedRow(0, {"messages": TURNS})], data, without_template()).rows
    assert len(rendered.target_spans) == 2


def test_chat_without_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"data\.format chat needs a tokenizer"):
        render_rows([NumberedRow(0, {"messages": TURNS})], DataConfig(format=CHAT))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", r"field 'messages' must be a list of messages, not 'hello'"),
        ([], r"field 'messages' must be a list of messages, not \[\]"),
        (["hello"], r"message 0 is 'hello'; a message is an object with role and content"),
        ([{"content": "x"}], r"message 0 has no 'role'; its fields are 'content'"),
        ([TURNS[1], {"role": "assistant"}], r"message 1 has no 'content'; its fields are 'role'"),
        ([{"role": "human", "content": "x"}], r"message 0 has the role 'human'; system, user, assistant, tool are the roles "
            r"there are"),
        ([TURNS[1], {"role": "assistant", "content": " "}], r"message 1: the assistant's content is empty"),
        ([TURNS[1], {"role": "assistant", "content": None}], r"message 1: the assistant's content is null"),
        ([{"role": "user", "content": ["x"]}, TURNS[2]], r"message 0: the content must be text, not \['x'\]"),
        (TURNS[:2], r"no message has the role 'assistant'"),
        (TURNS[2:3], r"message 0 is the assistant's, with nothing to answer"),
    ],
)
def test_malformed_messages_name_row_and_fault(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^row 7: {message}"):
        render({"messages": messages}, CHAT)
    with pytest.raises(ValueError, match=rf"^row 7: {message}"):
        list(texts_to_learn([NumberedRow(7, {"messages": messages})], DataConfig(format=CHAT)))


def test_missing_messages_name_the_key() -> None:
    with pytest.raises(
        ValueError, match=r"row 7: has no field 'messages', which data\.format\.messages names; its fields are 'text'"
    ):
        render({"text": "x"}, CHAT)


def test_texts_to_learn_hold_what_models_will_see() -> None:
    row = {"instruction": "Go.", "input": "", "response": "x"}
    assert list(texts_to_learn([NumberedRow(0, row)], DataConfig())) == [render(row).text]
    chat = NumberedRow(0, {"messages": TURNS})
    assert list(texts_to_learn([chat], DataConfig(format=CHAT))) == ["Be brief.", "One?", "1", "Two?", "It is 2"]
