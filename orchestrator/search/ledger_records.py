"""The lines of a ledger: what a search or a comparison writes down while it runs. Imports neither torch nor Ray."""

import json
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

Point = dict[str, Any]
"""What one trial sets: a value for each dotted path, such as ``{"loss.easy_ratio": 0.3}``."""

Measured = dict[str, float | None]
"""What was measured on the held-out rows, by name; None where it was not measured."""

Decision = Literal["continue", "stop"]
FinalStatus = Literal["completed", "stopped", "failed"]


class Line(BaseModel):
    """A line of the file; fields that a later version adds are passed over."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    time: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """When it was written, ISO 8601, UTC."""


class SearchSpec(Line):
    """What is searched or compared, and by what."""

    event: Literal["search"] = "search"

    kind: Literal["tune", "compare"]
    """Trials of points, or of arms with several seeds each."""

    name: str
    """Name of the run it belongs to."""

    metric: str
    """What trials are compared by, measured on the held-out rows. Never a training loss: kinds of loss differ in
    scale."""

    mode: Literal["min", "max"]
    """Whether the least or the largest is the best."""

    space: dict[str, Any]
    """What may vary, by dotted path, as the user wrote it."""

    total_steps: int = Field(ge=1)
    """Optimizer steps of a trial that is not stopped."""

    rungs: tuple[int, ...]
    """Optimizer steps after which a trial is measured, ascending."""

    trials: int = Field(ge=1)
    """How many trials there are to be."""

    baseline: str | None = None
    """The arm that the others are compared to."""

    scheduler: str | dict[str, Any] | None = None
    """What says which trials continue: a name, or ``kind`` with arguments; None where all do or it was not written down."""


class Begun(Line):
    """A trial starts, or starts anew: whatever it did before is void."""

    event: Literal["begun"] = "begun"

    trial: int = Field(ge=0)
    """Number of the trial."""

    point: Point
    """What it sets."""

    seed: int
    """Its seed."""

    arm: str | None = None
    """Its arm, in a comparison."""


class Rung(Line):
    """A trial was measured."""

    event: Literal["rung"] = "rung"

    trial: int = Field(ge=0)
    """Number of the trial."""

    rung: int = Field(ge=0)
    """Number of the rung."""

    step: int = Field(ge=0)
    """Optimizer steps so far."""

    metrics: Measured
    """What was measured."""

    decision: Decision
    """Whether the trial may continue."""

    seconds: float
    """Time of the trial so far."""


class Ended(Line):
    """A trial came to its end."""

    event: Literal["ended"] = "ended"

    trial: int = Field(ge=0)
    """Number of the trial."""

    status: FinalStatus
    """How it ended."""

    step: int = Field(ge=0)
    """Optimizer steps it took."""

    metrics: Measured
    """What was measured last."""

    seconds: float
    """Time it took."""

    student_tokens: int = Field(ge=0)
    """Tokens that went through the student in training."""

    error: str | None = None
    """What it failed of."""

    parameters: int | None = None
    """How many its student has, where the run draws them; None where it does not, or it failed before."""


AnyLine = SearchSpec | Begun | Rung | Ended

LINES: TypeAdapter[AnyLine] = TypeAdapter(Annotated[AnyLine, Field(discriminator="event")])


def text_of(line: Line) -> bytes:
    """Return the line as it stands in the file, without its newline."""
    return json.dumps(line.model_dump()).encode("ascii")


def line_of(line: bytes) -> AnyLine:
    """Return the line that a text of the file holds.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        return LINES.validate_python(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {line[error.start]:#04x} is no UTF-8; the file is damaged") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON at column {error.colno}: {error.msg}; the file is damaged") from None
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(step) for step in fault["loc"])
        raise ValueError(f"{place + ': ' if place else ''}{fault['msg']}; got {fault['input']!r}") from None
