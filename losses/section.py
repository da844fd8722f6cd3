"""The base of every section of the configuration, and marks of what may be done with a field. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict

LARGEST_SEED = 2**32 - 1
"""What every random generator in use takes; Optuna's takes no more."""

Mark = TypeVar("Mark")


class Section(BaseModel):
    """A frozen section of the configuration: unknown keys are errors, the docstring under a field is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class MayChange:
    """Marks a field that may change when a run is resumed: it says who does the work and in what pieces, which trials are made of
    the run, or who watches or judges it, and not what comes out but for rounding and the draws of dropout."""


@dataclass(frozen=True, slots=True)
class Searchable:
    """Marks a field that may differ between the trials of a search."""

    limit: str = ""
    """In what bounds, for the reader."""


@dataclass(frozen=True, slots=True)
class NotSearchable:
    """Marks a field that is the same in all trials of a search."""

    reason: str
    """Why; ends the sentence "it ..."."""


def marked(model: type[BaseModel], kind: type[Mark], prefix: str = "") -> Iterator[tuple[str, Mark]]:
    """Yield the dotted paths of the fields that have a mark, whole sections included, with it."""
    for name, field in model.model_fields.items():
        if mark := next((one for one in field.metadata if isinstance(one, kind)), None):
            yield prefix + name, mark
            continue
        for section in sections_of(field.annotation):
            yield from marked(section, kind, f"{prefix}{name}.")


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the classes of sections that a field may hold, or the items of its list."""
    if get_origin(annotation) is Annotated:
        return sections_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType, tuple):
        return [found for part in get_args(annotation) for found in sections_of(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
