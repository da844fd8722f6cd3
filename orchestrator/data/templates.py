"""From rows to text: the whole text of a row, and which of its characters are targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateRuntimeError, TemplateSyntaxError, meta
from jinja2.sandbox import SandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from orchestrator.config.data import DataConfig, InstructionFormat
from orchestrator.data.chat_templates import ChatTemplate
from orchestrator.data.conversations import (
    NoAnswer,
    conversation_of,
    fields_of,
    require_text,
    require_unicode,
)
from orchestrator.data.special_tokens import RowText, SpecialTokens

NumberedRow = tuple[int, Mapping[str, Any]]
"""A row's index in its source, and its fields."""


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

    turn_ends: tuple[str, ...] = ()
    """The special token that ends each learned turn of a conversation; empty text for a turn that none ends."""

    respaced_turns: int = 0
    """Learned turns that the chat template writes with other white space than the row."""

    special_tokens: tuple[tuple[str, int], ...] = ()
    """Special tokens that people's text held, and how often."""

    ordinary_spans: tuple[tuple[int, int], ...] = ()
    """Stretches of ``text`` in which special tokens are ordinary characters, ascending."""


@dataclass(frozen=True)
class RenderedRows:
    """The rows of one split as text."""

    rows: list[RenderedRow]
    """Those that have an answer."""

    without_answer: int
    """Rows left out because they have none."""

    template_asked_for_date: bool
    """Whether the chat template has written ``data.format.date``."""


def render_rows(
    rows: Sequence[NumberedRow], data: DataConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> RenderedRows:
    """Render rows as ``data.format`` says.

    Args:
        rows: numbered rows.
        data: the format, and what happens to rows without an answer and to special tokens in people's text.
        tokenizer: needed by formats of conversations: its special tokens, and its chat template unless the format has one.

    Raises:
        ValueError: naming the row, if a field is missing or of the wrong kind, there is no answer and rows without one are
            refused, or the template cannot serve.
    """
    special = SpecialTokens(tokenizer, data.special_tokens)
    chat: ChatTemplate | None = None
    if isinstance(data.format, InstructionFormat):
        render_row = partial(_render_instruction, InstructionTemplate(data.format), special)
    else:
        if tokenizer is None:
            raise ValueError(f"data.format {data.format.kind} needs a tokenizer to render messages")
        chat = ChatTemplate(data.format, tokenizer, special.strings)
        render_row = partial(_render_conversation, chat, special)
    rendered, without_answer = [], 0
    for number, row in rows:
        try:
            rendered.append(render_row(number, row))
        except NoAnswer as error:
            if data.without_answer == "refuse":
                raise ValueError(f"row {number}: {error}") from error
            without_answer += 1
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
    return RenderedRows(rendered, without_answer, chat is not None and chat.asked_for_date)


def texts_to_learn(rows: Sequence[NumberedRow], data: DataConfig) -> list[str]:
    """Return the plain text of rows, before there is a tokenizer: what a new tokenizer learns from.

    Raises:
        ValueError: as ``render_rows`` does.
    """
    if isinstance(data.format, InstructionFormat):
        return [rendered.text for rendered in render_rows(rows, data).rows]
    texts = []
    for number, row in rows:
        try:
            texts += [message["content"] for message in conversation_of(row, data.format).messages]
        except ValueError as error:
            if not (isinstance(error, NoAnswer) and data.without_answer == "drop"):
                raise ValueError(f"row {number}: {error}") from error
    return texts


class InstructionTemplate:
    """The prompt template of instruction rows. A field that is null may be tested, ``{% if input %}``, but not printed."""

    def __init__(self, format: InstructionFormat) -> None:
        """Raises: ValueError if it is no Jinja template."""
        environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_refuse_null)
        try:
            self._template = environment.from_string(format.prompt)
            self.fields = meta.find_undeclared_variables(environment.parse(format.prompt)) | {format.response}
            """The fields of a row that it reads, the response among them."""
        except TemplateSyntaxError as error:
            raise ValueError(f"data.format.prompt is no Jinja template: line {error.lineno}: {error.message}") from error
        self.response = format.response
        """Name of the field with the response."""

    def prompt_of(self, row: Mapping[str, Any]) -> str:
        """Return the prompt of a row.

        Raises:
            ValueError: if the template cannot be filled in.
        """
        try:
            return self._template.render(row)
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"data.format.prompt cannot be filled in: {error}; {fields_of(row)}") from error


def _refuse_null(value: Any) -> Any:
    if value is None:
        raise TemplateRuntimeError("it prints a field that is null")
    return value


def _render_instruction(
    template: InstructionTemplate, special: SpecialTokens, number: int, row: Mapping[str, Any]
) -> RenderedRow:
    texts = RowText(special)
    treated = {name: texts.treat(value) if name in template.fields else value for name, value in row.items()}
    prompt = template.prompt_of(treated)
    if template.response not in row:
        raise ValueError(f"has no field {template.response!r}, which data.format.response names; {fields_of(row)}")
    response = require_text(treated[template.response], f"the response (field {template.response!r})")
    text, ordinary = texts.reveal(require_unicode(prompt + response))
    return RenderedRow(
        number, text, ((len(prompt), len(text)),), text[: len(prompt)], text[len(prompt) :], _task_of(row),
        special_tokens=tuple(texts.found.items()), ordinary_spans=ordinary,
    )  # fmt: skip


def _render_conversation(chat: ChatTemplate, special: SpecialTokens, number: int, row: Mapping[str, Any]) -> RenderedRow:
    texts = RowText(special)
    treated = {name: texts.treat(value) if name == chat.format.messages else value for name, value in row.items()}
    conversation = conversation_of(treated, chat.format)
    rendered = chat.render(conversation)
    text, ordinary = texts.reveal(rendered.text)
    response, _ = texts.reveal(conversation.messages[-1]["content"])
    return RenderedRow(
        number, text, tuple(turn.span for turn in rendered.turns), text[: rendered.turns[-1].span[0]],
        response or text[slice(*rendered.turns[-1].span)], _task_of(row), tuple(turn.end for turn in rendered.turns),
        sum(turn.respaced for turn in rendered.turns), tuple(texts.found.items()), ordinary,
    )  # fmt: skip


def _task_of(row: Mapping[str, Any]) -> str | None:
    task = row.get("task")
    return task if isinstance(task, str) else None
