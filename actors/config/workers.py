"""Configuration schema of training workers, the number of replicas, and the nodes of both."""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_serializer, model_validator

from losses.section import Section

OWN_KEYS = {"CPU": "cpus", "GPU": "gpu or gpus"}
"""Ray's own resources, and the key that a section has for each."""
LABEL_VALUE = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?"
LABEL_SELECTOR = re.compile(rf"!?(?:{LABEL_VALUE}|in\({LABEL_VALUE}(?:, ?{LABEL_VALUE})*\))")


def _require_replicas(replicas: object) -> object:
    if replicas != "auto" and (not isinstance(replicas, int) or isinstance(replicas, bool) or replicas < 1):
        raise ValueError(f"{replicas!r} is no number of replicas; 1 or auto would do")
    return replicas


def _require_custom(resources: dict[str, float]) -> dict[str, float]:
    for name, amount in resources.items():
        if name in OWN_KEYS:
            raise ValueError(f"{name} is no custom resource; {OWN_KEYS[name]}, beside resources, is the key for it")
        if amount <= 0:
            raise ValueError(f"{name} {amount:g} asks for nothing; {name} 1 would do")
    return resources


def _require_selectors(labels: dict[str, str]) -> dict[str, str]:
    for name, selector in labels.items():
        if not LABEL_SELECTOR.fullmatch(selector):
            raise ValueError(f"{name} {selector!r} selects no label; 'teacher', '!teacher' or 'in(teacher, both)' would do")
    return labels


Replicas = Annotated[int | Literal["auto"], BeforeValidator(_require_replicas)]
CustomResources = Annotated[dict[str, float], AfterValidator(_require_custom)]
NodeLabels = Annotated[dict[str, str], AfterValidator(_require_selectors)]


class WorkersConfig(Section):
    """Ray Train workers and what each of them holds."""

    count: int = Field(default=1, ge=1)
    """Number of workers; where ``min`` and ``max`` stand in its place, the number that is sure: ``min``."""

    min: int | None = Field(default=None, ge=1)
    """With ``max``, in the place of ``count``: train with as many workers as there is room for, but with no fewer than this."""

    max: int | None = Field(default=None, ge=1)
    """The most workers. Which rows a step takes does not depend on how many there are."""

    grow_seconds: float = Field(default=60.0, ge=0)
    """How long workers train at least before they make way, at a checkpoint, for more of them; starting again takes a while."""

    cpus: float = Field(default=1.0, gt=0)
    """CPUs of each worker, also its number of threads."""

    gpus: int = Field(default=0, ge=0, le=1)
    """GPUs of each worker."""

    resources: CustomResources = {}
    """Ray's custom resources of each worker, such as ``{student_node: 1}``; only nodes that offer them hold workers."""

    labels: NodeLabels = {}
    """Labels a node must have to hold workers, such as ``{role: student}``; ``!teacher`` and ``in(a, b)`` work too."""

    @model_validator(mode="before")
    @classmethod
    def _count_is_what_is_sure(cls, said: Any) -> Any:
        if not isinstance(said, Mapping):
            return said
        try:
            fewest = int(said["min"])
        except (KeyError, TypeError, ValueError):
            return said  # there is none, or its own field says what is wrong with it
        if said.get("count") is not None:
            raise ValueError(
                f"count {said['count']} and min {said['min']} exclude each other; count null would do, or min null and max null"
            )
        return {**said, "count": fewest} if fewest > 0 else said

    @model_validator(mode="after")
    def _range_has_two_ends(self) -> "WorkersConfig":
        if (self.min is None) != (self.max is None):
            known, unknown = ("min", "max") if self.max is None else ("max", "min")
            value = self.min or self.max
            raise ValueError(f"{known} {value} needs {unknown} beside it; {unknown} {value} would do, or count {value} alone")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}; min {self.max} would do")
        return self

    @model_serializer(mode="wrap")
    def _as_it_may_be_said(self, fields: Callable[["WorkersConfig"], dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in fields(self).items() if name != "count" or not self.elastic}

    @property
    def most(self) -> int:
        """The most workers there may be."""
        return self.max or self.count

    @property
    def elastic(self) -> bool:
        """Whether their number follows the room there is."""
        return self.max is not None
