"""From rows to text: the whole text of a row, and which of its characters are targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateRuntimeError, TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from orchestrator.config import ChatFormat, FormatConfig, InstructionFormat

NumberedRow = tuple[int, Mapping[str, Any]]
"""A row's index in its source, and its fields."""

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class RenderedRow:
    """One row as text."""

    row: int
    """Index of the row in its source."""

    text: str
    """All that the models see: prompt and response, or the whole conversation."""

    target_spans: tuple[tuple[int, int], ...]
    """Start and end of the stretches of ``text`` that are targets, in characters, ascending."""

    prompt: str
    """The text up to the response, or up to the last assistant's message: what a model continues."""

    response: str
    """The response, or the last assistant's message."""

    task: str | None
    """Kind of task, where the row's field ``task`` names one."""


def render_rows(
    rows: Sequence[NumberedRow], format: FormatConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[RenderedRow]:
    """Render rows as the format says.

    Args:
        rows: numbered rows.
        format: instruction or chat.
        tokenizer: needed by the chat format: its end-of-sequence token, and its chat template unless the format has one.

    Raises:
        ValueError: naming the row, if a field is missing, empty or of the wrong kind, or if the template cannot serve.
    """
    if isinstance(format, InstructionFormat):
        prompt_template = _compile_prompt(format.prompt)
        rendered = [_render_instruction(number, row, format, prompt_template) for number, row in rows]
    else:
        if tokenizer is None:
            raise ValueError("data.format chat needs a tokenizer to render messages")
        if format.template is None and tokenizer.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template and data.format.template is null: data.format.template=... names one, "
                "or data.format.kind instruction would do"
            )
        rendered = [_render_chat(number, row, format, tokenizer) for number, row in rows]
    return rendered


def texts_to_learn(rows: Sequence[NumberedRow], format: FormatConfig) -> list[str]:
    """Return the plain text of rows, before there is a tokenizer: what a new tokenizer learns from.

    Raises:
        ValueError: as ``render_rows`` does.
    """
    if isinstance(format, InstructionFormat):
        return [rendered.text for rendered in render_rows(rows, format)]
    return [message["content"] for number, row in rows for message in _messages_of(number, row, format)]


def _compile_prompt(prompt: str) -> Template:
    """Compile a prompt template. A field that is null may be tested, ``{% if input %}``, but not printed."""

    def refuse_null(value: Any) -> Any:
        if value is None:
            raise TemplateRuntimeError("it prints a field that is null")
        return value

    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=refuse_null)
    try:
        return environment.from_string(prompt)
    except TemplateSyntaxError as error:
        raise ValueError(f"data.format.prompt is no Jinja template: line {error.lineno}: {error.message}") from error


def _render_instruction(number: int, row: Mapping[str, Any], format: InstructionFormat, template: Template) -> RenderedRow:
    try:
        prompt = template.render(row)
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"row {number}: data.format.prompt cannot be filled in: {error}; {_fields_of(row)}") from error
    if format.response not in row:
        raise ValueError(f"row {number}: has no field {format.response!r}, which data.format.response names; {_fields_of(row)}")
    response = _require_text(row[format.response], f"row {number}: the response (field {format.response!r})")
    text = _require_unicode(prompt + response, f"row {number}")
    return RenderedRow(number, text, ((len(prompt), len(text)),), prompt, response, _task_of(row))


def _render_chat(number: int, row: Mapping[str, Any], format: ChatFormat, tokenizer: PreTrainedTokenizerBase) -> RenderedRow:
    """Render a conversation turn by turn. What follows the last assistant's message is no target of anything: left out."""
    messages = _messages_of(number, row, format)
    text, prompt, response, spans = "", "", "", []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply_chat_template(number, messages[:turn], format, tokenizer, add_generation_prompt=True)
        until_turn = _apply_chat_template(number, messages[: turn + 1], format, tokenizer, add_generation_prompt=False)
        _require_prefix(text, prompt, number, f"the messages before message {turn}")
        _require_prefix(prompt, until_turn, number, f"the prompt for message {turn}")
        text, response = until_turn, message["content"]
        spans.append((len(prompt), _end_of_turn(text, len(prompt), tokenizer.eos_token)))
    return RenderedRow(number, text, tuple(spans), prompt, response, _task_of(row))


def _apply_chat_template(
    number: int,
    messages: list[dict[str, str]],
    format: ChatFormat,
    tokenizer: PreTrainedTokenizerBase,
    add_generation_prompt: bool,
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=format.template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"row {number}: the chat template refuses the messages: {error}") from error


def _require_prefix(beginning: str, text: str, number: int, what: str) -> None:
    """Refuse a template that writes earlier text anew: the student would be trained on prompts it never meets."""
    if not text.startswith(beginning):
        raise ValueError(
            f"row {number}: the chat template renders {what} differently once more messages follow, so the targets have no fixed "
            "place; data.format.template=... with a template that only appends would do"
        )


def _end_of_turn(text: str, start: int, eos_token: str | None) -> int:
    """Return where the targets of a turn end: behind its end-of-sequence token, or at the end of its text."""
    found = text.rfind(eos_token, start) if eos_token else -1
    return len(text) if found < 0 else found + len(eos_token or "")


def _messages_of(number: int, row: Mapping[str, Any], format: ChatFormat) -> list[dict[str, str]]:
    """Return the messages of a row, role and content of each, after checking them."""
    if format.messages not in row:
        raise ValueError(f"row {number}: has no field {format.messages!r}, which data.format.messages names; {_fields_of(row)}")
    messages = row[format.messages]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"row {number}: field {format.messages!r} must be a list of messages, not {_shown(messages)}")
    checked = [_check_message(message, f"row {number}: message {turn}") for turn, message in enumerate(messages)]
    if all(message["role"] != "assistant" for message in checked):
        raise ValueError(f"row {number}: no message has the role 'assistant', so there is nothing to learn")
    if checked[0]["role"] == "assistant":
        raise ValueError(
            f"row {number}: message 0 is the assistant's, with nothing to answer; begin with a system or user message"
        )
    return checked


def _check_message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {_shown(message)}; a message is an object with role and content")
    for field in ("role", "content"):
        if field not in message:
            raise ValueError(f"{where} has no {field!r}; {_fields_of(message)}")
    if message["role"] not in ROLES:
        raise ValueError(f"{where} has the role {message['role']!r}; {', '.join(ROLES)} are the roles there are")
    if message["role"] == "assistant":
        content = _require_text(message["content"], f"{where}: the assistant's content")
    elif isinstance(message["content"], str):
        content = message["content"]
    else:
        raise ValueError(f"{where}: the content must be text, not {_shown(message['content'])}")
    return {"role": message["role"], "content": _require_unicode(content, where)}


def _require_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, not {_shown(value)}")
    if not value.strip():
        raise ValueError(f"{what} is empty: there is nothing to learn; remove the row or fill it in")
    return value


def _require_unicode(text: str, where: str) -> str:
    """Refuse halves of surrogate pairs, which JSON can express and no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the character {text[error.start]!r} is half of a surrogate pair, no text") from error
    return text


def _task_of(row: Mapping[str, Any]) -> str | None:
    task = row.get("task")
    return task if isinstance(task, str) else None


def _fields_of(row: Mapping[str, Any]) -> str:
    return f"its fields are {', '.join(map(repr, row)) or 'none at all'}"


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
