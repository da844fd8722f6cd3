"""From rows to text: the whole text of a row, and which of its characters are targets."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from orchestrator.config.data import DataConfig
from orchestrator.config.formats import ConversationFormat, FormatConfig, InstructionFormat
from orchestrator.data.chat_templates import ChatTemplate
from orchestrator.data.conversations import conversation_of, fields_read, prompt_of
from orchestrator.data.field_templates import field_template
from orchestrator.data.mixture import NumberedRow
from orchestrator.data.row_values import NoAnswer, fields_of, require_text, require_unicode
from orchestrator.data.special_tokens import RowText, SpecialTokens

Read = TypeVar("Read")


@dataclass(frozen=True)
class RenderedRow:
    """One row as text."""

    row: int
    """Index of the row, counted through all sources of its split."""

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

    is_conversation: bool = False
    """Whether a chat template wrote it, all special tokens included."""


@dataclass(frozen=True)
class RenderedRows:
    """The rows of one split as text."""

    rows: list[RenderedRow]
    """Those that have an answer."""

    without_answer: int
    """Rows left out because they have none."""

    template_asked_for_date: bool
    """Whether the chat template has written ``data.format.date``."""


def render_rows(rows: Sequence[NumberedRow], data: DataConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> RenderedRows:
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
    formats = data.formats
    renderers = {source: _renderer(formats[source], tokenizer, special) for source in {row.source for row in rows}}
    rendered = list(_answered(rows, data, lambda row: renderers[row.source].render(row)))
    asked_for_date = any(renderer.asked_for_date for renderer in renderers.values())
    return RenderedRows(rendered, len(rows) - len(rendered), asked_for_date)


def render_prompts(
    rows: Sequence[NumberedRow], format: FormatConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[RenderedRow]:
    """Render what models are asked by rows that need no answer; one that is there is left out.

    Args:
        rows: numbered rows.
        format: how they become text.
        data: what happens to special tokens in people's text.
        tokenizer: its special tokens, and its chat template unless the format has one.

    Returns:
        Rows whose text is the prompt, without targets.

    Raises:
        ValueError: naming the row, if a field is missing or of the wrong kind, or nothing is asked.
    """
    renderer = _renderer(format, tokenizer, SpecialTokens(tokenizer, data.special_tokens))
    rendered = []
    for row in rows:
        try:
            rendered.append(renderer.prompt(row))
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
    return rendered


def texts_to_learn(rows: Iterable[NumberedRow], data: DataConfig) -> Iterator[str]:
    """Yield the plain text of rows, before there is a tokenizer: what a new tokenizer learns from.

    Raises:
        ValueError: as ``render_rows`` does.
    """
    formats, special = data.formats, SpecialTokens(None, data.special_tokens)

    def texts_of(row: NumberedRow) -> list[str]:
        if isinstance(format := formats[row.source], InstructionFormat):
            return [InstructionRenderer(format, special).render(row).text]
        assert isinstance(format, ConversationFormat), "the configuration was checked"
        return [message["content"] for message in conversation_of(row.fields, format).messages]

    return (text for texts in _answered(rows, data, texts_of) for text in texts)


def _answered(rows: Iterable[NumberedRow], data: DataConfig, read: Callable[[NumberedRow], Read]) -> Iterator[Read]:
    """Yield what is read of each row; rows without an answer are refused or left out, as the configuration says."""
    for row in rows:
        try:
            yield read(row)
        except ValueError as error:
            if isinstance(error, NoAnswer) and data.without_answer == "drop":
                continue
            message = str(error)
            if data.formats[row.source] is not data.format:  # the source has one of its own
                message = message.replace("data.format", f"{row.source}.format")
            raise ValueError(f"{row.place}: {message}") from error


class InstructionRenderer:
    """Renders rows with a prompt template."""

    asked_for_date = False

    def __init__(self, format: InstructionFormat, special: SpecialTokens) -> None:
        """Raises: ValueError if the prompt is no Jinja template."""
        self._response, self._special = format.response, special
        self._prompt = field_template(format.prompt, "data.format.prompt")

    def render(self, row: NumberedRow) -> RenderedRow:
        """Return a row as text, or raise ValueError saying what it lacks."""
        texts, fields, name = RowText(self._special), self._prompt.fields | {self._response}, self._response
        treated = texts.treat_fields(row.fields, fields)
        prompt = self._prompt.fill(treated)
        if name not in treated:
            raise ValueError(f"has no field {name!r}, which data.format.response names; {fields_of(row.fields)}")
        response = require_text(treated[name], f"the response (field {name!r})")
        text, ordinary = texts.reveal(require_unicode(prompt + response))
        return RenderedRow(
            row.number, text, ((len(prompt), len(text)),), text[: len(prompt)], text[len(prompt) :], _task_of(row.fields),
            special_tokens=tuple(texts.found.items()), ordinary_spans=ordinary,
        )  # fmt: skip

    def prompt(self, row: NumberedRow) -> RenderedRow:
        """Return what is asked by a row that needs no response, or raise ValueError saying what it lacks."""
        texts = RowText(self._special)
        prompt, ordinary = texts.reveal(require_unicode(self._prompt.fill(texts.treat_fields(row.fields, self._prompt.fields))))
        if not prompt.strip():
            raise ValueError("its prompt is empty: there is nothing to answer")
        return _asked(row, prompt, ordinary, is_conversation=False)


class ConversationRenderer:
    """Renders rows with a chat template."""

    def __init__(self, chat: ChatTemplate, special: SpecialTokens) -> None:
        self._chat, self._special, self._fields = chat, special, fields_read(chat.format)

    @property
    def asked_for_date(self) -> bool:
        """Whether the template has asked what day it is."""
        return self._chat.asked_for_date

    def render(self, row: NumberedRow) -> RenderedRow:
        """Return a row as text, or raise ValueError saying what it lacks."""
        texts = RowText(self._special)
        treated = texts.treat_fields(row.fields, self._fields)
        conversation = conversation_of(treated, self._chat.format)
        rendered = self._chat.render(conversation)
        text, ordinary = texts.reveal(rendered.text)
        response, _ = texts.reveal(conversation.messages[-1]["content"])
        return RenderedRow(
            row.number, text, tuple(turn.span for turn in rendered.turns), text[: rendered.turns[-1].span[0]],
            response or text[slice(*rendered.turns[-1].span)], _task_of(row.fields), tuple(turn.end for turn in rendered.turns),
            sum(turn.respaced for turn in rendered.turns), tuple(texts.found.items()), ordinary, is_conversation=True,
        )  # fmt: skip

    def prompt(self, row: NumberedRow) -> RenderedRow:
        """Return what is asked by a row that needs no answer, or raise ValueError saying what it lacks."""
        texts = RowText(self._special)
        conversation = prompt_of(texts.treat_fields(row.fields, self._fields), self._chat.format)
        return _asked(row, *texts.reveal(self._chat.prompt(conversation)), is_conversation=True)


def _asked(row: NumberedRow, prompt: str, ordinary: tuple[tuple[int, int], ...], is_conversation: bool) -> RenderedRow:
    return RenderedRow(
        row.number, prompt, (), prompt, "", _task_of(row.fields), ordinary_spans=ordinary, is_conversation=is_conversation
    )


def _renderer(
    format: FormatConfig, tokenizer: PreTrainedTokenizerBase | None, special: SpecialTokens
) -> InstructionRenderer | ConversationRenderer:
    if isinstance(format, InstructionFormat):
        return InstructionRenderer(format, special)
    assert isinstance(format, ConversationFormat), "the configuration was checked"
    if tokenizer is None:
        raise ValueError(f"data.format {format.kind} needs a tokenizer to render messages")
    return ConversationRenderer(ChatTemplate(format, tokenizer, special.strings), special)


def _task_of(row: Mapping[str, Any]) -> str | None:
    task = row.get("task")
    return task if isinstance(task, str) else None
