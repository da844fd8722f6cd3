"""Configuration schema of a search: the section ``tune``. Imports neither torch nor Ray."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from actors.config.models import EvaluateConfig, TrainConfig
from losses.section import LARGEST_SEED, Section
from orchestrator.config.schedulers import SchedulerConfig, name_of
from tune_spaces.registry import space_named
from tune_spaces.space import Space, read_space

Direction = Literal["min", "max"]

METRICS: dict[str, Direction] = {
    "heldout_loss": "min",
    "kl_to_teacher": "min",
    "top1_agreement": "max",
    "calibration_error": "min",
    "exact_match": "max",
    "rouge_l": "max",
    "accuracy": "max",
    "macro_f1": "max",
    "weighted_kappa": "max",
}
"""What is measured of each trial on the held-out rows, and which way is better."""

OF_ANSWERS = ("exact_match", "rouge_l")
"""Those of them that are measured at the last rung alone: answers cost more than a rung may."""

OF_LABELS = ("accuracy", "macro_f1", "weighted_kappa")
"""Those of them that only classifiers have; the last only those of grades."""

DRAWS = 12


class TuneConfig(Section):
    """A search over keys of this configuration; every trial reads the same score store."""

    name: str = Field(default="tune", min_length=1, max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the search, and of its folder in the run's; another search of the same run needs another."""

    space: str | dict[str, Any] = "atkd"
    """What is searched: the name of a space, or a mapping of dotted paths to lists and ranges."""

    search: Literal["grid", "random", "tpe"] = "tpe"
    """Every point, independent draws, or Optuna's tree-structured Parzen estimator, which learns from trials that are done."""

    trials: int | None = Field(default=None, ge=1)
    """How many points are tried; null for all points of a grid, and in other searches for 12, or all where there are fewer."""

    scheduler: SchedulerConfig = "asha"
    """Which trials are stopped early: all but the best of each rung (ASHA), those below the median of the others, or none; or a
    scheduler of Ray Tune with its arguments, ``{kind: async_hyperband, reduction_factor: 2}``."""

    rungs: int = Field(default=4, ge=1)
    """How often a trial is measured, evenly over its steps; the last time at its end."""

    reduction: int = Field(default=3, ge=2)
    """ASHA lets one in so many trials continue from each rung."""

    metric: str = "heldout_loss"
    """What trials are compared by; which way is better is known."""

    answers: bool = False
    """Have each student answer held-out prompts at its end, as the section ``evaluate`` says: exact match and Rouge-L."""

    concurrent: int | Literal["auto"] = "auto"
    """Trials at a time; ``auto``: as many as there are devices for."""

    trials_in: Literal["reused_process", "ray_train"] = "ray_train"
    """Where a trial trains: in a process that is kept from trial to trial, for students of one worker, or in Ray Train workers
    started anew, 10 to 20 seconds a trial."""

    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Draws the points; what a trial itself draws follows the seed of the run."""

    @field_validator("space", mode="before")
    @classmethod
    def _space_can_be_read(cls, space: Any) -> Any:
        if isinstance(space, str):
            space_named(space)
        elif isinstance(space, Mapping):
            read_space(space)
        else:
            raise ValueError(f"name a space, or map paths to values, such as {{loss.easy_ratio: [0.3, 0.5]}}; got {space!r}")
        return space

    @field_validator("concurrent", mode="before")
    @classmethod
    def _concurrent_is_a_count(cls, concurrent: Any) -> Any:
        return require_count(concurrent)

    @field_validator("metric")
    @classmethod
    def _metric_is_measured(cls, metric: str) -> str:
        return require_metric(metric)

    @model_validator(mode="after")
    def _knobs_act(self) -> "TuneConfig":
        if self.search == "grid" and self.trials is not None:
            raise ValueError(
                f"search grid tries every point, and trials is {self.trials}: set trials to null, or search to random for so many"
            )
        scheduler = name_of(self.scheduler)
        if scheduler != "none" and self.rungs == 1:
            raise ValueError(
                f"scheduler {scheduler} stops trials between rungs, and rungs is 1: set rungs to 2 or more, or scheduler to none"
            )
        if scheduler != "none" and self.metric in OF_ANSWERS:
            raise ValueError(
                f"scheduler {scheduler} stops trials by {self.metric}, and answers are given at the last rung alone: set "
                "scheduler to none, or metric to heldout_loss"
            )
        if not isinstance(self.scheduler, str) and self.scheduler.grace_period >= self.rungs:
            raise ValueError(
                f"scheduler {scheduler} stops no trial before rung {self.scheduler.grace_period}, its grace_period, and rungs is "
                f"{self.rungs}: grace_period {self.rungs - 1} would do, or more rungs"
            )
        return self

    @property
    def searched(self) -> Space:
        """The space, named or written out."""
        return space_named(self.space) if isinstance(self.space, str) else read_space(self.space)

    @property
    def direction(self) -> Direction:
        """Whether the least or the largest metric is the best."""
        return METRICS[self.metric]

    @property
    def draws(self) -> int:
        """How many points a search that is no grid tries."""
        return self.trials or min(DRAWS, self.searched.size() or DRAWS)


def rung_steps(total_steps: int, rungs: int, section: Literal["tune", "compare"] = "tune") -> tuple[int, ...]:
    """Return the optimizer steps after which a trial of so many steps is measured, ascending; the last is its end.

    Args:
        total_steps: of a trial that is not stopped.
        rungs: how often it is measured.
        section: where the configuration says so.

    Raises:
        ValueError: with the number of rungs that would do, if the trial is too short to be measured at every rung.
    """
    if total_steps < rungs:
        raise ValueError(
            f"{section}.rungs is {rungs}, but a trial has {total_steps} optimizer steps, less than one a rung: "
            f"{section}.rungs={total_steps} would do, or more train.epochs"
        )
    return tuple(total_steps * rung // rungs for rung in range(1, rungs + 1))


def require_metric(metric: str) -> str:
    """Return a metric that trials report; refuse any other."""
    if metric not in METRICS:
        nearest = difflib.get_close_matches(metric, METRICS, n=1)
        guess = f"did you mean {nearest[0]}? There" if nearest else "there"
        raise ValueError(f"no trial reports {metric!r}; {guess} are {', '.join(METRICS)}")
    return metric


def require_count(concurrent: Any) -> Any:
    """Return a number of trials, or ``auto``; refuse anything else."""
    if concurrent != "auto" and (not isinstance(concurrent, int) or isinstance(concurrent, bool) or concurrent < 1):
        raise ValueError(f"{concurrent!r} is no number of trials; 1 or auto would do")
    return concurrent


def require_answered(
    section: Literal["tune", "compare"], metric: str, answers: bool, evaluate: EvaluateConfig, train: TrainConfig
) -> None:
    """Raise if students of trials are to answer and cannot, or are compared by answers that they do not give.

    Raises:
        ValueError: naming the key, its value and one that would do.
    """
    if metric in OF_ANSWERS and not answers:
        raise ValueError(
            f"{section}.metric {metric} is measured of answers, and {section}.answers is false; {section}.answers=true would do"
        )
    if answers and evaluate.generate_rows == 0:
        raise ValueError(
            f"{section}.answers is true, and evaluate.generate_rows is 0: no prompt would be answered; "
            "evaluate.generate_rows=100 would do"
        )
    if answers and train.sharding == "fsdp":
        raise ValueError(
            f"{section}.answers is true, and with train.sharding fsdp no worker holds a whole student that could answer; "
            f"train.sharding=replicate would do, or {section}.answers=false"
        )
