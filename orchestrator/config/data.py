"""Configuration schema of the data: where rows come from, how they become text, which of them are used. Imports no torch."""

import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from losses.section import LARGEST_SEED, Section

TASK_KINDS = (
    "add", "subtract", "largest", "smallest", "sort", "reverse", "count", "first", "last", "uppercase", "weekday", "opposite",
)  # fmt: skip


DRAWN_HELDOUT_ROWS = 200
RESERVED_TEMPLATE_ARGS = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now")


class BuiltinSource(Section):
    """Instruction tasks with checkable answers, made by a seeded generator."""

    kind: Literal["builtin"]

    rows: int = Field(default=6000, ge=10)
    """Distinct rows to make, held-out rows included."""

    tasks: tuple[str, ...] = TASK_KINDS
    """Kinds of tasks to draw from."""

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if task not in TASK_KINDS:
                raise ValueError(f"no task is called {task!r}; there are {', '.join(TASK_KINDS)}")
        if not tasks:
            raise ValueError("tasks is empty; name at least one")
        return tasks


class FilesSource(Section):
    """Rows from JSON Lines, JSON (a list of objects), CSV (a header, then texts), each perhaps gzipped, or Parquet files."""

    kind: Literal["files"]

    path: str = Field(min_length=1)
    """A file, or a folder of such files, taken in the order of their names."""


class HubSource(Section):
    """Rows from a dataset of the Hugging Face hub, or of a folder that ``datasets`` can load."""

    kind: Literal["hub"]

    name: str = Field(min_length=1)
    """Name of the dataset (``openai/gsm8k``) or folder."""

    subset: str | None = None
    """Name of its configuration, where it has several."""

    split: str = "train"
    """Which split to take, in the notation of ``datasets`` (``train[:1000]``)."""

    revision: str | None = None
    """Commit, tag or branch on the hub."""


SourceConfig = Annotated[BuiltinSource | FilesSource | HubSource, Field(discriminator="kind")]


class InstructionFormat(Section):
    """A prompt made from the row's fields, and a response."""

    kind: Literal["instruction"]

    prompt: str = "{{ instruction }}{% if input %}\n{{ input }}{% endif %}\n"
    """Jinja template over the row's fields; a field it names must be in every row."""

    response: str = "response"
    """Name of the field with the response."""


class ConversationFormat(Section):
    """What the formats of conversations have in common; the assistant's messages are the targets."""

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


FormatConfig = Annotated[InstructionFormat | ChatFormat | ShareGptFormat, Field(discriminator="kind")]


class HeldoutConfig(Section):
    """Held-out rows from a source of their own."""

    source: Annotated[FilesSource | HubSource, Field(discriminator="kind")]
    """Where they come from; their format is that of the training rows."""

    max_rows: int | None = Field(default=None, ge=1)
    """Use only so many, drawn by ``data.seed``; null for all."""


class DataConfig(Section):
    """From rows to token ids and loss masks."""

    source: SourceConfig = BuiltinSource(kind="builtin")
    """Where rows come from."""

    format: FormatConfig = InstructionFormat(kind="instruction")
    """How a row becomes a prompt and a response."""

    max_tokens: int = Field(default=512, ge=4)
    """Longest row, end-of-sequence included."""

    too_long: Literal["drop", "truncate"] = "drop"
    """What happens to longer rows; how many there were is shown either way."""

    heldout_rows: int | None = Field(default=None, ge=1)
    """Rows of the source kept aside for evaluation, drawn by ``seed``; defaults to 200 where ``heldout`` is null."""

    heldout: HeldoutConfig | None = None
    """Rows for evaluation from a source of their own, instead of rows drawn from the training source."""

    max_rows: int | None = Field(default=None, ge=10)
    """Use only so many rows, drawn by ``seed`` before the held-out rows are."""

    without_answer: Literal["refuse", "drop"] = "refuse"
    """What happens to rows whose response, or whose every assistant message to learn, is null or empty."""

    special_tokens: Literal["split", "strip", "keep", "refuse"] = "split"
    """What happens to the tokenizer's special tokens inside people's text: read as the ordinary characters that they are,
    removed, kept as special tokens, or the row is refused. How many there were is shown either way."""

    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Draws the held-out rows and shuffles the training rows, once."""

    @model_validator(mode="before")
    @classmethod
    def _one_way_to_hold_out(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("heldout") is None:
            drawn = values.get("heldout_rows")
            return {**values, "heldout_rows": DRAWN_HELDOUT_ROWS if drawn is None else drawn}
        if values.get("heldout_rows") is not None:
            raise ValueError(
                f"heldout_rows {values['heldout_rows']} draws rows of the training source, heldout names a source of its own: "
                "leave one of them out, or set data.heldout_rows=null (data.heldout.max_rows limits the latter)"
            )
        return values

    @property
    def planned_heldout_rows(self) -> int:
        """Held-out rows as far as they can be told before the source is read."""
        return self.heldout_rows or (self.heldout and self.heldout.max_rows) or DRAWN_HELDOUT_ROWS
