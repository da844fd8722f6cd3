"""Configuration schema of how rows become text. Imports no torch."""

import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from losses.section import Section

RESERVED_TEMPLATE_ARGS = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now")


class InstructionFormat(Section):
    """A prompt made from the row's fields, and a response."""

    kind: Literal["instruction"]

    prompt: str = "{{ instruction }}{% if input %}\n{{ input }}{% endif %}\n"
    """Jinja template over the row's fields; a field it names must be in every row."""

    response: str = "response"
    """Name of the field with the response."""


class ConversationFormat(Section):
    """What the formats of conversations have in common: a chat template, and the assistant's messages as targets."""

    template: str | None = None
    """Jinja chat template; defaults to the tokenizer's own."""

    template_args: dict[str, Any] = {}
    """Arguments of the chat template, such as ``{enable_thinking: false}``. The exported chat template has them as defaults."""

    date: datetime.date = datetime.date(2025, 1, 1)
    """Today, for templates that ask for it (``strftime_now``): the same rows must be the same tokens tomorrow."""

    turns: Literal["all", "last"] = "all"
    """Which of the assistant's messages are targets; ``last`` works with templates that rewrite earlier turns."""

    @field_validator("template_args")
    @classmethod
    def _no_argument_of_ours(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in arguments:
            if name in RESERVED_TEMPLATE_ARGS:
                raise ValueError(f"template_args has {name!r}, which is set for each row; leave it out")
            if not name.isidentifier():
                raise ValueError(f"template_args has {name!r}, which is no name in a Jinja template; one like enable_thinking is")
        return arguments


class ChatFormat(ConversationFormat):
    """A list of messages with ``role`` (system, user, assistant, tool) and ``content``; calls of tools are the assistant's."""

    kind: Literal["chat"]

    messages: str = "messages"
    """Name of the field with the messages."""

    tools: str = "tools"
    """Name of the field with the tools that a row offers, JSON schemas; rows without it offer none."""


class ShareGptFormat(ConversationFormat):
    """A list of turns with ``from`` (human, gpt, system) and ``value``."""

    kind: Literal["sharegpt"]

    messages: str = "conversations"
    """Name of the field with the turns."""


class AlpacaFormat(ConversationFormat):
    """Columns with an instruction, perhaps an input, and an answer: a user's message and the assistant's."""

    kind: Literal["alpaca"]

    user: str = "{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}"
    """Jinja template of the user's message over the row's fields; a field it names must be in every row."""

    system: str | None = None
    """Jinja template of the system's message, such as ``{{ system_prompt }}``; null, or empty for a row, for none."""

    output: str = "output"
    """Name of the field with the answer."""


class PromptCompletionFormat(ConversationFormat):
    """A prompt and its completion, each a text or a list of messages; only the completion is learned."""

    kind: Literal["prompt_completion"]

    prompt: str = "prompt"
    """Name of the field with the prompt: a user's message, or messages of ``role`` and ``content``."""

    completion: str = "completion"
    """Name of the field with the completion: the assistant's message, or messages of which its own are learned."""

    tools: str = "tools"
    """Name of the field with the tools that a row offers, JSON schemas; rows without it offer none."""


class TextFormat(Section):
    """A text to classify."""

    kind: Literal["text"]

    text: str = "{{ text }}"
    """Jinja template over the row's fields; a field it names must be in every row."""


class ImageFormat(Section):
    """An image to classify: numbers, of one shape in all rows."""

    kind: Literal["image"]

    field: str = "image"
    """Name of the field with the image: nested lists of [channels, height, width] or [height, width], or a picture as
    ``datasets`` reads it. Where the last of three sizes is 1, 3 or 4 and the first is none of these, colours stand last."""

    divide_by: float = Field(default=1.0, gt=0.0)
    """What values are divided by, such as 255 for bytes."""


FormatConfig = Annotated[
    InstructionFormat | ChatFormat | ShareGptFormat | AlpacaFormat | PromptCompletionFormat | TextFormat | ImageFormat,
    Field(discriminator="kind"),
]
OF_CLASSES = (TextFormat, ImageFormat)
"""Formats of rows that are classified; the others are of language models."""
