"""Chat templates: where turns end, which are learned, and templates that cannot serve."""

import datetime
import re
from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orchestrator.config.data import DataConfig
from orchestrator.config.formats import ChatFormat
from orchestrator.data.chat_templates import with_default_args
from orchestrator.data.mixture import NumberedRow
from orchestrator.data.templates import RenderedRow, RenderedRows, render_rows

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GLM = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
FORGETS_THINKING = CHATML.replace(
    "{{ m.content }}",
    "{% set c = m.content %}{% if m.role == 'assistant' and not loop.last %}{% set c = c.split('</think>')[-1] %}{% endif "
        "%}{{ c }}",
)
REWRITES_THINKING = CHATML.replace(
    "{{ m.content }}",
    "{% if '</think>' in m.content %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1] }}\n</think>\n\n"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}",
)
TALK = [
    {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "It is 2"},
]  # fmt: skip
THOUGHT = [
    {"role": "user", "content": "A colour?"}, {"role": "assistant", "content": "<think>easy</think>Red."},
    {"role": "user", "content": "Another?"}, {"role": "assistant", "content": "<think>again</think>Blue."},
]  # fmt: skip
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "</s>", "<|user|>", "<|assistant|>")


@cache
def tokenizer(eos: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows the special tokens of all templates here."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocabulary, []))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    others = [token for token in SPECIAL if token != eos]
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token=eos, extra_special_tokens=others)


def render_all(messages: Any, template: str, eos: str = "<|endoftext|>", **format: Any) -> RenderedRows:
    row = NumberedRow(7, {"messages": messages, "tools": format.pop("tools", None)})
    data = DataConfig(format=ChatFormat(kind="chat", template=template, **format))
    return render_rows([row], data, tokenizer(eos))


def render(messages: Any, template: str, eos: str = "<|endoftext|>", **format: Any) -> RenderedRow:
    return render_all(messages, template, eos, **format).rows[0]


def targets(row: RenderedRow) -> list[str]:
    return [row.text[start:end] for start, end in row.target_spans]


@pytest.mark.parametrize("eos", ["<|endoftext|>", "<|im_end|>"])
def test_a_turn_ends_with_its_own_token_whichever_is_called_eos(eos: str) -> None:
    row = render(TALK, CHATML, eos)
    assert targets(row) == ["1<|im_end|>", "It is 2<|im_end|>"] and row.turn_ends == ("<|im_end|>", "<|im_end|>")


def test_a_template_that_closes_the_whole_conversation_with_another_token() -> None:
    row = render(TALK, PHI)
    assert row.text.endswith("It is 2<|end|>\n<|endoftext|>") and "1<|end|>\n<|user|>" in row.text
    assert targets(row) == ["1<|end|>", "It is 2<|end|>"] and row.turn_ends == ("<|end|>", "<|end|>")


def test_a_template_without_a_header_before_answers() -> None:
    row = render(TALK, MISTRAL, "</s>")
    assert targets(row) == [" 1</s>", " It is 2</s>"] and row.prompt.endswith("Two?[/INST]")


def test_turns_that_no_token_ends_are_whole_and_told() -> None:
    row = render(TALK, GLM)
    assert targets(row) == ["1", "It is 2"] and row.turn_ends == ("", "")


def test_content_that_stands_in_the_end_of_the_turn_too() -> None:
    talk = [TALK[0], {"role": "assistant", "content": "im_end"}]
    assert targets(render(talk, CHATML)) == ["im_end<|im_end|>"]
    talk = [TALK[0], {"role": "assistant", "content": "a\na"}, TALK[2], {"role": "assistant", "content": "a"}]
    assert targets(render(talk, CHATML)) == ["a\na<|im_end|>", "a<|im_end|>"]


def test_a_template_that_trims_answers_is_counted() -> None:
    trims = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
    talk = [TALK[0], {"role": "assistant", "content": " 1\n"}, *TALK[2:]]
    row = render(talk, trims)
    assert targets(row) == ["1<|im_end|>", "It is 2<|im_end|>"] and row.respaced_turns == 1
    assert render(TALK, trims).respaced_turns == 0


def test_a_template_without_a_generation_prompt_is_refused() -> None:
    deaf = CHATML.split("{% if add_generation_prompt")[0]
    with pytest.raises(ValueError, match=r"row 7: the chat template has no generation prompt .*'<\|im_start\|>assistant\\n' "
        r"before "):
        render(TALK, deaf)


def test_a_template_that_forgets_the_thinking_of_earlier_turns_can_teach_the_last() -> None:
    with pytest.raises(ValueError, match=r"row 7: the chat template does not write message 1 .*; data\.format\.turns=last would"):
        render(THOUGHT, FORGETS_THINKING)
    row = render(THOUGHT, FORGETS_THINKING, turns="last")
    assert targets(row) == ["<think>again</think>Blue.<|im_end|>"] and "easy" not in row.text
    assert row.prompt == row.text.removesuffix("<think>again</think>Blue.<|im_end|>\n")


def test_the_last_turn_alone_can_be_learned_with_any_template() -> None:
    assert targets(render(TALK, PHI, turns="last")) == ["It is 2<|end|>"]
    assert targets(render(TALK, CHATML, turns="last")) == ["It is 2<|im_end|>"]


def test_a_template_that_sets_thinking_apart_by_white_space_is_counted() -> None:
    row = render(THOUGHT[:2], REWRITES_THINKING)
    assert targets(row) == ["<think>\neasy\n</think>\n\nRed.<|im_end|>"] and row.respaced_turns == 1


def test_a_template_that_leaves_thinking_out_of_what_is_learned_is_refused() -> None:
    strips = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    with pytest.raises(ValueError, match=r"does not write message 1 as it stands in the row \('<think>easy</think>Red\.'\)"):
        render(THOUGHT[:2], strips, turns="last")


def test_a_template_that_moves_a_message_behind_is_refused() -> None:
    reorders = "{% for m in messages | reverse %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(ValueError, match=r"row 7: the chat template renders the prompt for message 1 differently once the "
        r"answer"):
        render(TALK[:2], reorders)


def test_the_clock_stands_still_and_its_use_is_told() -> None:
    dated = "It is {{ strftime_now('%d %b %Y %H:%M:%S') }}.\n" + CHATML
    rows = render_all(TALK, dated)
    assert rows.rows[0].text.startswith("It is 01 Jan 2025 00:00:00.\n") and rows.template_asked_for_date
    assert render(TALK, dated, date="2026-02-03").text.startswith("It is 03 Feb 2026 00:00:00.\n")
    assert not render_all(TALK, CHATML).template_asked_for_date
    assert ChatFormat(kind="chat").model_dump(mode="json")["date"] == "2025-01-01"
    assert ChatFormat(kind="chat", date=datetime.date(2026, 2, 3)) == ChatFormat(kind="chat", date="2026-02-03")


def test_a_template_that_draws_random_numbers_is_refused() -> None:
    draws = "{{ range(99999) | random }}" + CHATML
    with pytest.raises(ValueError, match="row 7: the chat template renders the same messages differently each time"):
        render(TALK, draws)


def test_arguments_reach_the_template_and_become_its_defaults() -> None:
    thinks = CHATML + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}<think>{% endif %}"
    talk = [TALK[0], {"role": "assistant", "content": "<think></think>1"}]
    with pytest.raises(ValueError, match="does not write"):
        render(talk, thinks.replace("{{ m.content }}", "{{ m.content[7:] }}"))
    row = render(TALK[:2], CHATML.replace("assistant\n", "{{ name }}\n"), template_args={"name": "assistant"})
    assert targets(row) == ["1<|im_end|>"]
    template = "{{ flag }} {{ text }} {{ nothing is none }} {{ many }}"
    args = {"flag": False, "text": "it's \"é\"", "nothing": None, "many": {"a": [1, None, 2.5]}}
    defaulted = tokenizer("</s>").apply_chat_template(TALK, chat_template=with_default_args(template, args), tokenize=False)
    given = tokenizer("</s>").apply_chat_template(TALK, chat_template=template, tokenize=False, **args)
    assert defaulted == given == "False it's \"é\" True {'a': [1, None, 2.5]}"
    over = tokenizer("</s>").apply_chat_template(TALK, chat_template=with_default_args("{{ a }}", {"a": 1}), tokenize=False, a=2)
    assert over == "2"


@pytest.mark.parametrize(
    ("name", "message"), [("messages", "is set for each row; leave it out"), ("no name", "is no name in a Jinja")]
)
def test_arguments_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"template_args has {name!r}, which {message}"):
        ChatFormat(kind="chat", template_args={name: 1})


WRITES_CALLS = CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% "
        "endfor %}"
)
CALLING: list[dict[str, Any]] = [
    TALK[0],
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 0}}}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]


def test_a_call_of_a_tool_is_a_target_and_the_tools_answer_is_not() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    row = render(CALLING, "{{ tools | tojson }}" + WRITES_CALLS, tools=tools)
    call = '<tool_call>{"name": "add", "arguments": {"a": 0}}</tool_call><|im_end|>'
    assert targets(row) == [call, "It is 3.<|im_end|>"] and "<|im_start|>tool\n3<|im_end|>" in row.text
    assert row.text.startswith('[{"type": "function"')


def test_a_template_that_drops_a_call_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row 7: the chat template leaves out the call of 'add' in message 1; "
        r"data\.format\.template"):
        render(CALLING, CHATML)
    mentions = [*CALLING[:1], {**CALLING[1], "content": "I add."}]
    with pytest.raises(ValueError, match="leaves out the call of 'add'"):
        render(mentions, CHATML)


def test_a_conversation_that_ends_in_a_call() -> None:
    row = render(CALLING[:2], WRITES_CALLS)
    assert targets(row) == ['<tool_call>{"name": "add", "arguments": {"a": 0}}</tool_call><|im_end|>']
    assert re.fullmatch(r"<tool_call>.*</tool_call><\|im_end\|>", row.response)
