"""Conversations: layouts of messages, calls of tools, and what is refused."""

from typing import Any

import pytest

from orchestrator.config.formats import ChatFormat, ShareGptFormat
from orchestrator.data.conversations import conversation_of
from orchestrator.data.row_values import NoAnswer

CHAT, SHAREGPT = ChatFormat(kind="chat"), ShareGptFormat(kind="sharegpt")
ASKED, ANSWERED = {"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "3", "tool_call_id": "c1"}


def messages_of(*messages: Any) -> list[dict[str, Any]]:
    return conversation_of({"messages": list(messages)}, CHAT).messages


def test_sharegpt_turns_become_messages() -> None:
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "1+2?"}, {"from": "gpt", "value": "3"}]
    expected = [{"role": "system", "content": "Be brief."}, ASKED, ANSWERED]
    assert conversation_of({"conversations": turns}, SHAREGPT).messages == expected
    renamed = ShareGptFormat(kind="sharegpt", messages="talk")
    assert conversation_of({"talk": turns}, renamed).messages == expected


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (["x"], r"message 0 is 'x'; a message is an object with from and value"),
        ([{"value": "x"}], r"message 0 has no 'from'; its fields are 'value'"),
        ([{"from": "human"}], r"message 0 has no 'value'; its fields are 'from'"),
        ([{"from": "bot", "value": "x"}], r"message 0 has the role 'bot'; human, gpt, system are the roles there are"),
        ([{"from": ["gpt"], "value": "x"}], r"message 0 has the role \['gpt'\]"),
        ([{"from": "human", "value": 3}], r"message 0: the content must be text, not 3"),
    ],
)
def test_malformed_sharegpt_turns_are_named(turns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        conversation_of({"conversations": turns}, SHAREGPT)


def test_sharegpt_is_never_guessed_but_named() -> None:
    turns = [{"from": "human", "value": "1+2?"}, {"from": "gpt", "value": "3"}]
    with pytest.raises(ValueError, match=r"has no field 'messages', .*; data\.format\.kind=sharegpt reads conversations"):
        conversation_of({"conversations": turns}, CHAT)
    with pytest.raises(ValueError, match=r"message 0 has no 'role'; .*; data\.format\.kind=sharegpt reads from and value"):
        messages_of(*turns)


def test_calls_of_tools_and_their_answers_reach_the_template() -> None:
    row = {"messages": [ASKED, {**CALLING, "name": None}, TOOL, ANSWERED], "tools": [{"type": "function"}]}
    found = conversation_of(row, CHAT)
    assert found.messages == [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}, TOOL, ANSWERED]
    assert found.tools == [{"type": "function"}] and found.assistant_turns == [1, 3]
    assert conversation_of({"messages": [ASKED, ANSWERED], "tools": None}, CHAT).tools is None
    other = ChatFormat(kind="chat", tools="functions")
    assert conversation_of({"messages": [ASKED, ANSWERED], "functions": [{"type": "function"}]}, other).tools is not None


def test_a_call_without_text_needs_no_content_field() -> None:
    assert messages_of(ASKED, {"role": "assistant", "tool_calls": [CALL]})[1]["content"] == ""


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({**ASKED, "tool_calls": [CALL]}, r"message 1 has tool_calls, and its role is 'user'; only the assistant calls tools"),
        ({**CALLING, "tool_calls": "add"}, r"message 1: tool_calls must be a list of calls, not 'add'"),
        ({**CALLING, "tool_calls": [{"function": {}}]}, r"message 1: tool call 0 is .*; a call is an object with function"),
        ({**CALLING, "tool_calls": ["add"]}, r"message 1: tool call 0 is 'add'; a call is an object"),
        ({**TOOL, "content": None}, r"message 1: the content must be text, not None"),
        ({**TOOL, "tool_call_id": 5}, r"message 1: tool_call_id: the content must be text, not 5"),
    ],
)
def test_malformed_calls_are_named(message: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=f"^{fault}"):
        messages_of(ASKED, message, ANSWERED)


@pytest.mark.parametrize("tools", ["add", ["add"], {"name": "add"}])
def test_tools_that_are_no_schemas_name_the_key(tools: Any) -> None:
    with pytest.raises(ValueError, match=r"field 'tools', which data\.format\.tools names, must be a list of tools"):
        conversation_of({"messages": [ASKED, ANSWERED], "tools": tools}, CHAT)


@pytest.mark.parametrize("content", [None, "", "  "])
def test_an_answer_that_is_not_there_is_an_error_of_its_own(content: str | None) -> None:
    empty = {"role": "assistant", "content": content}
    with pytest.raises(NoAnswer, match=r"message 1: the assistant's content is (null|empty): .*data\.without_answer=drop"):
        messages_of(ASKED, empty, ASKED, ANSWERED)
    last = ChatFormat(kind="chat", turns="last")  # the empty one is not learned
    assert conversation_of({"messages": [ASKED, empty, ASKED, ANSWERED]}, last).assistant_turns == [1, 3]
    with pytest.raises(NoAnswer, match="no message has the role 'assistant'"):
        messages_of(ASKED)
