"""From a row to the messages of a conversation, checked: roles, contents, calls of tools. Nothing is rendered here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config.formats import AlpacaFormat, ChatFormat, ConversationFormat, PromptCompletionFormat, ShareGptFormat
from orchestrator.data.field_templates import FieldTemplate, field_template
from orchestrator.data.row_values import NoAnswer, fields_of, require_text, require_unicode, shown

Message = dict[str, Any]
"""A message as chat templates read it: role, content, and perhaps tool_calls, tool_call_id, name, reasoning_content."""

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
PASSED_ON = ("tool_call_id", "name", "reasoning_content")
"""Texts of a message, besides its content, that a chat template may read."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of one row, as far as the last of the assistant's."""

    messages: list[Message]
    """What follows the last of the assistant's messages is no target of anything, and left out."""

    tools: list[dict[str, Any]] | None
    """The tools that the row offers, JSON schemas."""

    prompt_messages: int = 0
    """How many of the first messages are a prompt whatever their role."""

    @property
    def assistant_turns(self) -> list[int]:
        """Indices of the assistant's messages behind the prompt, ascending."""
        return _assistant_turns(self.messages, self.prompt_messages)


def conversation_of(row: Mapping[str, Any], format: ConversationFormat) -> Conversation:
    """Return the conversation of a row.

    Raises:
        NoAnswer: if no message is the assistant's, or one that is to be learned is null or empty.
        ValueError: naming the message and the field, if a message is malformed.
    """
    messages, prompt_messages = _messages_of(row, format)
    turns = _assistant_turns(messages, prompt_messages)
    if not turns:
        raise NoAnswer("no message has the role 'assistant', so there is nothing to learn")
    if messages[0]["role"] == "assistant":
        raise ValueError("message 0 is the assistant's, with nothing to answer; begin with a system or user message")
    for turn in turns if format.turns == "all" else turns[-1:]:
        if not messages[turn].get("tool_calls"):
            require_text(messages[turn]["content"], f"message {turn}: the assistant's content")
    kept = messages[: turns[-1] + 1]
    return Conversation([_with_text(message) for message in kept], _offered_tools(row, format), prompt_messages)


def prompt_of(row: Mapping[str, Any], format: ConversationFormat) -> Conversation:
    """Return what the assistant of a row's conversation is asked: its messages without the answer, which need not be there.

    Raises:
        ValueError: naming the message and the field, if a message is malformed, or nothing is asked.
    """
    messages = _asked_messages(row, format)
    if not messages or messages[0]["role"] == "assistant":
        raise ValueError("the assistant is asked nothing; a message of the user before its own would do")
    last = messages[-1]
    if not (last["content"] or "").strip() and not last.get("tool_calls"):
        raise ValueError(f"message {len(messages) - 1} is empty: there is nothing to answer")
    return Conversation([_with_text(message) for message in messages], _offered_tools(row, format))


def fields_read(format: ConversationFormat) -> frozenset[str]:
    """Return the fields of a row that hold what people said."""
    match format:
        case AlpacaFormat():
            templates = [template for template in (_system_of(format), _user_of(format)) if template is not None]
            return frozenset({format.output}).union(*(template.fields for template in templates))
        case PromptCompletionFormat():
            return frozenset({format.prompt, format.completion})
        case ChatFormat() | ShareGptFormat():
            return frozenset({format.messages})
        case _:
            raise AssertionError(f"no such format: {format}")


def _messages_of(row: Mapping[str, Any], format: ConversationFormat) -> tuple[list[Message], int]:
    """Return a row's messages, checked one by one, and how many of them are a prompt whatever their role."""
    match format:
        case AlpacaFormat():
            return _alpaca_messages(row, format), 0
        case PromptCompletionFormat():
            prompt = _side(row, format.prompt, "data.format.prompt", "user", 0)
            return prompt + _side(row, format.completion, "data.format.completion", "assistant", len(prompt)), len(prompt)
        case ChatFormat() | ShareGptFormat():
            return _turns_of(row, format), 0
        case _:
            raise AssertionError(f"no such format: {format}")


def _asked_messages(row: Mapping[str, Any], format: ConversationFormat) -> list[Message]:
    """Return a row's messages but for the assistant's at their end, if it is there."""
    match format:
        case AlpacaFormat():
            return _alpaca_question(row, format)
        case PromptCompletionFormat():
            return _side(row, format.prompt, "data.format.prompt", "user", 0)
        case ChatFormat() | ShareGptFormat():
            messages = _turns_of(row, format)
            return messages[:-1] if messages[-1]["role"] == "assistant" else messages
        case _:
            raise AssertionError(f"no such format: {format}")


def _turns_of(row: Mapping[str, Any], format: ChatFormat | ShareGptFormat) -> list[Message]:
    other = "; data.format.kind=sharegpt reads conversations of from and value" if "conversations" in row else ""
    messages = _value_of(row, format.messages, "data.format.messages", other)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"field {format.messages!r} must be a list of messages, not {shown(messages)}")
    check = _sharegpt_message if isinstance(format, ShareGptFormat) else _chat_message
    return [check(message, f"message {turn}") for turn, message in enumerate(messages)]


def _alpaca_messages(row: Mapping[str, Any], format: AlpacaFormat) -> list[Message]:
    answer = _value_of(row, format.output, "data.format.output")
    messages = _alpaca_question(row, format)
    where = f"message {len(messages)} (field {format.output!r})"
    return [*messages, {"role": "assistant", "content": _content(answer, where, may_be_null=True)}]


def _alpaca_question(row: Mapping[str, Any], format: AlpacaFormat) -> list[Message]:
    messages: list[Message] = []
    if (template := _system_of(format)) is not None and (system := template.fill(row)).strip():
        messages.append({"role": "system", "content": require_unicode(system)})
    messages.append({"role": "user", "content": require_unicode(_user_of(format).fill(row))})
    return messages


def _system_of(format: AlpacaFormat) -> FieldTemplate | None:
    return None if format.system is None else field_template(format.system, "data.format.system")


def _user_of(format: AlpacaFormat) -> FieldTemplate:
    return field_template(format.user, "data.format.user")


def _side(row: Mapping[str, Any], field: str, key: str, role: str, first: int) -> list[Message]:
    """Return the messages of a prompt or of a completion; a text is one message of ``role``."""
    value = _value_of(row, field, key)
    if isinstance(value, list) and value:
        return [_chat_message(message, f"message {first + turn}") for turn, message in enumerate(value)]
    if not isinstance(value, str) and (value is not None or role == "user"):
        raise ValueError(f"field {field!r}, which {key} names, must be a text or a list of messages, not {shown(value)}")
    return [{"role": role, "content": _content(value, f"message {first} (field {field!r})", may_be_null=True)}]


def _value_of(row: Mapping[str, Any], field: str, key: str, hint: str = "") -> Any:
    if field not in row:
        raise ValueError(f"has no field {field!r}, which {key} names; {fields_of(row)}{hint}")
    return row[field]


def _assistant_turns(messages: Sequence[Message], first: int) -> list[int]:
    return [turn for turn, message in enumerate(messages) if turn >= first and message["role"] == "assistant"]


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


def _offered_tools(row: Mapping[str, Any], format: ConversationFormat) -> list[dict[str, Any]] | None:
    return _tools_of(row, format.tools) if isinstance(format, ChatFormat | PromptCompletionFormat) else None


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
