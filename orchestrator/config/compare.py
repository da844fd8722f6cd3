"""Configuration schema of a comparison: the section ``compare``. Imports neither torch nor Ray."""

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from losses.section import Section
from orchestrator.config.tune import METRICS, Direction, require_count, require_metric

FOLDER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
OF_THE_TEACHER = ("kl_to_teacher", "top1_agreement")

ARMS: dict[str, dict[str, Any]] = {
    "cross_entropy": {"kind": "hard_label"},
    "forward_kl": {"kind": "coupled", "divergence": "forward_kl"},
    "reverse_kl": {"kind": "coupled", "divergence": "reverse_kl"},
    "decoupled": {"kind": "decoupled"},
    "diversity_only": {"kind": "diversity_only"},
    "atkd": {"kind": "atkd", "split": "uncertainty"},
    "atkd_random": {"kind": "atkd", "split": "random"},
    "atkd_inverted": {"kind": "atkd", "split": "inverted"},
}
"""For each arm of a comparison its loss. The last two are controls: if they do as well, it is not the teacher's uncertainty that
helps."""


class CompareConfig(Section):
    """The same student on the same scores, taught in several ways, with several seeds each."""

    name: str = Field(default="compare", min_length=1, max_length=80, pattern=f"^{FOLDER_NAME}$")
    """Name of the comparison, and of its folder in the run's; another one of the same run needs another."""

    arms: tuple[str, ...] = tuple(ARMS)
    """What is compared, by name."""

    own_arms: dict[str, dict[str, Any]] = {}
    """Further arms by name, each with what it sets in the configuration, such as ``loss`` or ``rollouts.student_share``:
    whatever may differ between the trials of a search, and ``rollouts: null`` for those that learn from the data's rows alone."""

    baseline: str = "forward_kl"
    """The arm that each other one is compared to, seed by seed."""

    seeds: int = Field(default=3, ge=1)
    """Trainings of each arm. The seed draws the order of later epochs, dropout and random splits; all arms share each."""

    learning_rates: tuple[float, ...] = ()
    """Tried for each arm with the first seed before the comparison, which then takes each arm's best: losses differ in the
    size of their gradients. Empty: ``train.optimizer.learning_rate`` for all."""

    teachers: dict[str, dict[str, Any]] = {}
    """Teachers by name, each with what it changes in the section ``teacher``: the whole comparison is made under each, and ends
    in what the teacher's size does to each arm. Empty: under the one teacher that the section has."""

    rungs: int = Field(default=4, ge=1)
    """How often a training is measured, evenly over its steps; the last time at its end."""

    metric: str = "heldout_loss"
    """What arms are compared by; which way is better is known."""

    answers: bool = False
    """As in the section ``tune``."""

    concurrent: int | Literal["auto"] = "auto"
    """Trainings at a time; ``auto``: as many as there are devices for."""

    trials_in: Literal["reused_process", "ray_train"] = "ray_train"
    """As in the section ``tune``."""

    @field_validator("arms")
    @classmethod
    def _arms_stand_once(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        for arm in arms:
            if arms.count(arm) > 1:
                raise ValueError(f"arm {arm} stands twice; once would do")
        return arms

    @field_validator("learning_rates")
    @classmethod
    def _rates_are_rates(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        for rate in rates:
            if not 0 < rate < 1:
                raise ValueError(f"{rate:g} is no learning rate; one such as 2e-5 would do")
            if rates.count(rate) > 1:
                raise ValueError(f"learning rate {rate:g} stands twice; once would do")
        return rates

    @field_validator("teachers")
    @classmethod
    def _teachers_are_several(cls, teachers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for teacher in teachers:
            if not re.fullmatch(FOLDER_NAME, teacher):
                raise ValueError(f"{teacher!r} cannot be a folder's name; letters, digits, dots and hyphens would do")
        if len(teachers) == 1:
            raise ValueError(f"{next(iter(teachers))} stands alone; two would do, or none for the one of the section teacher")
        return teachers

    @field_validator("own_arms", "teachers")
    @classmethod
    def _numbers_are_finite(cls, changes: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for path, value in leaves_of(changes, str(info.field_name)):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{path} is {value}, which cannot be written down; a finite number would do")
        return changes

    @field_validator("metric")
    @classmethod
    def _metric_is_measured(cls, metric: str) -> str:
        return require_metric(metric)

    @field_validator("concurrent", mode="before")
    @classmethod
    def _concurrent_is_a_count(cls, concurrent: Any) -> Any:
        return require_count(concurrent)

    @model_validator(mode="after")
    def _arms_are_known(self) -> "CompareConfig":
        for arm in self.own_arms:
            if arm in ARMS:
                raise ValueError(f"own_arms has {arm}, which has its loss already; another name would do")
            if arm not in self.arms:
                raise ValueError(f"own_arms has {arm}, but it is none of the arms {', '.join(self.arms)}; add it to arms")
        known = (*ARMS, *self.own_arms)
        for arm in self.arms:
            if arm not in known:
                nearest = difflib.get_close_matches(arm, known, n=1)
                guess = f"did you mean {nearest[0]}? There" if nearest else "there"
                raise ValueError(f"no arm is called {arm!r}; {guess} are {', '.join(known)}, and more in own_arms")
        return self

    @model_validator(mode="after")
    def _baseline_is_an_arm(self) -> "CompareConfig":
        if len(self.arms) < 2:
            raise ValueError(f"arms holds {f'{self.arms[0]} alone' if self.arms else 'nothing'}; a comparison needs two")
        if self.baseline not in self.arms:
            raise ValueError(f"baseline {self.baseline} is none of the arms {', '.join(self.arms)}; {self.arms[0]} would do")
        return self

    @model_validator(mode="after")
    def _metric_is_of_the_student(self) -> "CompareConfig":
        if self.teachers and self.metric in OF_THE_TEACHER:
            raise ValueError(
                f"metric {self.metric} is measured against each teacher itself and cannot be compared between teachers; "
                "heldout_loss would do"
            )
        return self

    @property
    def direction(self) -> Direction:
        """Whether the least or the largest metric is the best."""
        return METRICS[self.metric]


def leaves_of(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of each leaf of a tree of mappings and lists."""
    if isinstance(tree, Mapping | list | tuple):
        for key, inner in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from leaves_of(inner, f"{path}.{key}")
    else:
        yield path, tree
