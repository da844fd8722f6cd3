"""Configuration schema of the data: where rows come from, how they become text, which of them are used. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from actors.config.places import in_object_storage, resolved
from losses.section import LARGEST_SEED, MayChange, Section
from orchestrator.config.formats import ConversationFormat, FormatConfig, InstructionFormat

TASK_KINDS = (
    "add", "subtract", "largest", "smallest", "sort", "reverse", "count", "first", "last", "uppercase", "weekday", "opposite",
)  # fmt: skip


DRAWN_HELDOUT_ROWS = 200


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


class GradingSource(Section):
    """Short answers to school questions with their grades (wrong, partly, right), made by a seeded generator, for classifiers."""

    kind: Literal["builtin_grading"]

    rows: int = Field(default=3000, ge=10)
    """Distinct rows to make, held-out rows included: ``question``, ``answer`` and ``grade``."""


class DigitsSource(Section):
    """1,797 images of handwritten digits, 8 x 8, that come with scikit-learn: ``image`` (0 to 16) and ``label``."""

    kind: Literal["digits"]


class FilesSource(Section):
    """Rows from JSON Lines, JSON (a list of objects), CSV (a header, then texts), each perhaps gzipped, or Parquet files."""

    kind: Literal["files"]

    path: str = Field(min_length=1)
    """A file, or a folder of such files, taken in the order of their names: a path, or an address in object storage
    (``s3://bucket/rows.jsonl``, ``gs://``, ``abfs://``)."""

    @field_validator("path")
    @classmethod
    def _a_place(cls, path: str) -> str:
        if in_object_storage(path):
            resolved(path)  # raises if it is no address
        return path


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


SourceConfig = Annotated[BuiltinSource | GradingSource | DigitsSource | FilesSource | HubSource, Field(discriminator="kind")]


class SourceShare(Section):
    """One of several sources of training rows."""

    source: SourceConfig
    """Where its rows come from."""

    format: FormatConfig | None = None
    """How its rows become a prompt and a response; null for ``data.format``."""

    weight: float | None = Field(default=None, gt=0)
    """Its share of the rows, in relation to the others' weights: of each source as many rows are drawn, by ``data.seed``, as
    the shares allow without taking a row twice. Null, for all sources or none: all of its rows."""

    max_rows: int | None = Field(default=None, ge=1)
    """Use only so many of its rows, drawn by ``data.seed``; null for all."""


class HeldoutConfig(Section):
    """Held-out rows from a source of their own."""

    source: Annotated[FilesSource | HubSource, Field(discriminator="kind")]
    """Where they come from."""

    format: FormatConfig | None = None
    """How they become a prompt and a response; null for ``data.format``."""

    max_rows: int | None = Field(default=None, ge=1)
    """Use only so many, drawn by ``data.seed``; null for all."""


class DataConfig(Section):
    """From rows to token ids and loss masks."""

    source: SourceConfig | None = None
    """Where rows come from; defaults to ``{kind: builtin}`` where ``sources`` is null."""

    sources: tuple[SourceShare, ...] | None = Field(default=None, min_length=1)
    """Several sources, mixed; instead of ``source``."""

    format: FormatConfig = InstructionFormat(kind="instruction")
    """How a row becomes a prompt and a response."""

    max_tokens: int = Field(default=512, ge=4)
    """Longest row, end-of-sequence included."""

    too_long: Literal["drop", "truncate"] = "drop"
    """What happens to longer rows; how many there were is shown either way."""

    heldout_rows: int | None = Field(default=None, ge=1)
    """Rows kept aside for evaluation, drawn by ``seed``; defaults to 200 where ``heldout`` is null."""

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

    processes: Annotated[int, MayChange()] = Field(default=1, ge=1)
    """Processes of the driver's machine that render and tokenize training rows; what comes of it is the same with any number.
    Each takes some seconds to start, and some hundred MiB: for hundreds of thousands of rows."""

    cluster_tasks: Annotated[int | None, MayChange()] = Field(default=None, ge=1)
    """Instead, Ray tasks of one CPU each, on all nodes of the cluster, as many at one time where CPUs are free; what comes of it
    is the same. For millions of rows. `plan` reads rows with ``processes``."""

    @model_validator(mode="before")
    @classmethod
    def _source_or_sources(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("sources") is None:
            return values if values.get("source") is not None else {**values, "source": {"kind": "builtin"}}
        if values.get("source") is not None:
            raise ValueError("source and sources both say where rows come from; leave one of them out, or set data.source=null")
        return values

    @model_validator(mode="after")
    def _weights_of_all_or_none(self) -> "DataConfig":
        weights = [share.weight for share in self.sources or ()]
        if None in weights and set(weights) != {None}:
            raise ValueError(
                f"sources.{weights.index(None)}.weight is null while others have one; give each source a weight, such as 1.0, or "
                "none of them"
            )
        return self

    @model_validator(mode="after")
    def _one_chat_template(self) -> "DataConfig":
        """The student has one chat template; what its rows were rendered with must be that."""
        chats = {key: format for key, format in self.formats.items() if isinstance(format, ConversationFormat)}
        for key, format in chats.items():
            first_key, first = next(iter(chats.items()))
            for name in ("template", "template_args", "date"):
                if getattr(format, name) != getattr(first, name):
                    raise ValueError(
                        f"{key} and {first_key} have different formats: {name} is {getattr(format, name)!r} in one and "
                        f"{getattr(first, name)!r} in the other, and a student has one chat template; the same in both would do"
                    )
        return self

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
    def training_sources(self) -> dict[str, SourceShare]:
        """The sources of training rows, by their keys."""
        if self.sources is not None:
            return {f"data.sources.{index}": share for index, share in enumerate(self.sources)}
        assert self.source is not None, "one of the two is there"
        return {"data.source": SourceShare(source=self.source)}

    @property
    def formats(self) -> dict[str, FormatConfig]:
        """How the rows of each source become text, by the keys of the sources."""
        formats = {key: share.format or self.format for key, share in self.training_sources.items()}
        return formats if self.heldout is None else formats | {"data.heldout": self.heldout.format or self.format}

    @property
    def chat(self) -> ConversationFormat | None:
        """A format of conversations with the chat template of all that are conversations; None if no rows are."""
        return next((format for format in self.formats.values() if isinstance(format, ConversationFormat)), None)

    @property
    def planned_heldout_rows(self) -> int:
        """Held-out rows as far as they can be told before the source is read."""
        return self.heldout_rows or (self.heldout and self.heldout.max_rows) or DRAWN_HELDOUT_ROWS
