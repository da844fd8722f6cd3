"""From a row to the messages of a conversation, checked: roles, contents, calls of tools. Nothing is rendered here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.config.data import ChatFormat, ShareGptFormat

Message = dict[str, Any]
"""A message as chat templates read it: role, content, and perhaps tool_calls, tool_call_id, name, reasoning_content."""

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
PASSED_ON = ("tool_call_id", "name", "reasoning_content")
"""Texts of a message, besides its content, that a chat template may read."""


class NoAnswer(ValueError):
    """A row has no answer to learn; ``data.without_answer`` says what happens to it."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of one row, as far as the last of the assistant's."""

    messages: list[Message]
    """What follows the last of the assistant's messages is no target of anything, and left out."""

    tools: list[dict[str, Any]] | None
    """The tools that the row offers, JSON schemas."""

    @property
    def assistant_turns(self) -> list[int]:
        """Indices of the assistant's messages, ascending."""
        return [turn for turn, message in enumerate(self.messages) if message["role"] == "assistant"]


def conversation_of(row: Mapping[str, Any], format: ChatFormat | ShareGptFormat) -> Conversation:
    """Return the conversation of a row.

    Raises:
        NoAnswer: if no message is the assistant's, or one that is to be learned is null or empty.
        ValueError: naming the message and the field, if a message is malformed.
    """
    if format.messages not in row:
        other = "; data.format.kind=sharegpt reads conversations of from and value" if "conversations" in row else ""
        raise ValueError(f"has no field {format.messages!r}, which data.format.messages names; {fields_of(row)}{other}")
    messages = row[format.messages]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"field {format.messages!r} must be a list of messages, not {shown(messages)}")
    check = _sharegpt_message if isinstance(format, ShareGptFormat) else _chat_message
    checked = [check(message, f"message {turn}") for turn, message in enumerate(messages)]
    turns = [turn for turn, message in enumerate(checked) if message["role"] == "assistant"]
    if not turns:
        raise NoAnswer("no message has the role 'assistant', so there is nothing to learn")
    if turns[0] == 0:
        raise ValueError("message 0 is the assistant's, with nothing to answer; begin with a system or user message")
    for turn in turns if format.turns == "all" else turns[-1:]:
        if not checked[turn].get("tool_calls"):
            require_text(checked[turn]["content"], f"message {turn}: the assistant's content")
    tools = _tools_of(row, format.tools) if isinstance(format, ChatFormat) else None
    return Conversation([_with_text(message) for message in checked[: turns[-1] + 1]], tools)


def require_text(value: Any, what: str) -> str:
    """Return ``value`` if it is text with something in it.

    Raises:
        NoAnswer: if it is null or empty.
        ValueError: if it is of another kind.
    """
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{what} must be text, not {shown(value)}")
    if value is None or not value.strip():
        raise NoAnswer(
            f"{what} is {'null' if value is None else 'empty'}: there is nothing to learn; "
            "data.without_answer=drop would leave such rows out"
        )
    return value


def require_unicode(text: str) -> str:
    """Raise if a text holds half a surrogate pair, which JSON can express and no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the character {text[error.start]!r} is half of a surrogate pair, no text") from error
    return text


def fields_of(row: Mapping[str, Any]) -> str:
    """Return a row's field names in words."""
    return f"its fields are {', '.join(map(repr, row)) or 'none at all'}"


def shown(value: Any) -> str:
    """Return a value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _chat_message(message: Any, where: str) -> Message:
    role = _role_of(message, where, "role", "content", {role: role for role in ROLES})
    content, calls = message.get("content"), message.get("tool_calls")
    if "content" not in message and not calls:
        raise ValueError(f"{where} has no 'content'; {fields_of(message)}")
    found: Message = {"role": role, "content": _content(content, where, may_be_null=role == "assistant")}
    if calls:
        if role != "assistant":
            raise ValueError(f"{where} has tool_calls, and its role is {role!r}; only the assistant calls tools")
        if not isinstance(calls, list):
            raise ValueError(f"{where}: tool_calls must be a list of calls, not {shown(calls)}")
        found["tool_calls"] = [_tool_call(call, f"{where}: tool call {index}") for index, call in enumerate(calls)]
    for field in PASSED_ON:
        if message.get(field) is not None:
            found[field] = _content(message[field], f"{where}: {field}", may_be_null=False)
    return found


def _sharegpt_message(message: Any, where: str) -> Message:
    role = _role_of(message, where, "from", "value", SHAREGPT_ROLES)
    if "value" not in message:
        raise ValueError(f"{where} has no 'value'; {fields_of(message)}")
    return {"role": role, "content": _content(message["value"], where, may_be_null=role == "assistant")}


def _role_of(message: Any, where: str, role_field: str, content_field: str, roles: Mapping[str, str]) -> str:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {shown(message)}; a message is an object with {role_field} and {content_field}")
    if role_field not in message:
        other = "; data.format.kind=sharegpt reads from and value" if "from" in message and "value" in message else ""
        raise ValueError(f"{where} has no {role_field!r}; {fields_of(message)}{other}")
    role = message[role_field]
    if not isinstance(role, str) or role not in roles:
        raise ValueError(f"{where} has the role {shown(role)}; {', '.join(roles)} are the roles there are")
    return roles[role]


def _content(value: Any, where: str, may_be_null: bool) -> str | None:
    if value is None and may_be_null:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{where}: the content must be text, not {shown(value)}")
    try:
        return require_unicode(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """Return a call as templates read it: an object whose ``function`` has a name, and arguments as an object or as JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} is {shown(call)}; a call is an object with function: {{name, arguments}}")
    return {name: value for name, value in call.items() if value is not None}


def _tools_of(row: Mapping[str, Any], field: str) -> list[dict[str, Any]] | None:
    tools = row.get(field)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(
            f"field {field!r}, which data.format.tools names, must be a list of tools (JSON schemas), not {shown(tools)}"
        )
    return tools


def _with_text(message: Message) -> Message:
    """Return a message whose null content is empty text: many templates print a null as the word None."""
    return message if message["content"] is not None else {**message, "content": ""}
