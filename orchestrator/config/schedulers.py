"""Configuration schema of the schedulers: what stops trials early. Imports neither torch nor Ray.

Of Ray Tune's schedulers those are here that decide by stopping alone, each with the arguments that act in a search.
"""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag

from losses.section import Section

OwnScheduler = Literal["asha", "median", "none"]

OWN: tuple[str, ...] = get_args(OwnScheduler)
"""Schedulers that are written as a name alone."""

SET_BY_SEARCH = {
    "metric": "tune.metric says it",
    "mode": "it follows from tune.metric",
    "time_attr": "time is counted in rungs",
    "max_t": "it is tune.rungs",
    "stop_last_trials": "a trial ends at its last rung anyway",
    "min_time_slice": "no trial is paused",
    "hard_stop": "no trial is paused",
}
"""Arguments of Ray Tune's schedulers that are no choice here, and why."""

REFUSED = {
    "hyperband": "pauses trials, and a trial here keeps no checkpoint to resume from; async_hyperband halves without pausing",
    "hb_bohb": "pauses trials, and a trial here keeps no checkpoint to resume from; async_hyperband with search tpe would do",
    "pbt": "hands weights from trial to trial, and a trial here keeps no checkpoint; async_hyperband would do",
    "pbt_replay": "changes a trial's settings while it runs, and a trial here has one point; none would do",
    "pb2": "hands weights from trial to trial, and a trial here keeps no checkpoint; async_hyperband with search tpe would do",
    "resource_changing": "changes what trials hold while they run, and here that is fixed; async_hyperband would do",
    "fifo": "stops no trial; none would do",
}
"""Schedulers of Ray Tune that cannot be used, and what would do."""


class AsyncHyperBand(Section):
    """Ray Tune's ``AsyncHyperBandScheduler``, also called ``ASHAScheduler`` (arXiv 1810.05934)."""

    kind: Literal["async_hyperband"]

    grace_period: int = Field(default=1, ge=1)
    """The first rung, counted from 1, at which a trial may be stopped; the next is ``reduction_factor`` times as far."""

    reduction_factor: float = Field(default=4.0, gt=1.0)
    """About one in so many trials continues."""

    brackets: int = Field(default=1, ge=1)
    """Each bracket begins to stop ``reduction_factor`` times as late as the one before; trials are dealt out at random."""


class MedianStopping(Section):
    """Ray Tune's ``MedianStoppingRule``: a trial's best value against the median of the others' means so far."""

    kind: Literal["median_stopping_rule"]

    grace_period: int = Field(default=1, ge=1)
    """The first rung, counted from 1, at which a trial may be stopped, and from which means are taken."""

    min_samples_required: int = Field(default=3, ge=1)
    """With fewer other trials at a rung, a trial continues."""


NativeScheduler = AsyncHyperBand | MedianStopping

NATIVE = ("async_hyperband", "median_stopping_rule")
"""Schedulers of Ray Tune that a search takes, by Ray Tune's own names."""


def readable_scheduler(value: Any) -> Any:
    """Return a scheduler as it is read further, a native one as a mapping; refuse what no search takes.

    Raises:
        ValueError: naming the scheduler or argument, and what would do.
    """
    if isinstance(value, Section) or value in OWN:
        return value
    said: Mapping[Any, Any] = value if isinstance(value, Mapping) else {"kind": value}
    if "kind" not in said:
        raise ValueError(f"needs kind, one of {', '.join(NATIVE)}; got {value!r}")
    _require_kind(said["kind"], isinstance(value, Mapping))
    for argument, reason in SET_BY_SEARCH.items():
        if argument in said:
            raise ValueError(f"{argument} is set by the search: {reason}; leave it out")
    return said


def name_of(scheduler: str | NativeScheduler) -> str:
    """Return the name of a scheduler, whatever its arguments."""
    return scheduler if isinstance(scheduler, str) else scheduler.kind


def _require_kind(kind: Any, in_mapping: bool) -> None:
    if kind in NATIVE:
        return
    if isinstance(kind, str) and kind in REFUSED:
        raise ValueError(f"scheduler {kind} of Ray Tune {REFUSED[kind]}")
    if in_mapping and kind in OWN:
        raise ValueError(f"scheduler {kind} is written as a name alone; asha's reduction is tune.reduction")
    close = difflib.get_close_matches(str(kind).lower(), (*OWN, *NATIVE), n=1, cutoff=0.5)
    guess = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"there is no scheduler {kind!r}; {guess}there are {', '.join((*OWN, *NATIVE))}")


def _variant_of(value: Any) -> str:
    if isinstance(value, str):
        return "name"
    return str(value["kind"] if isinstance(value, Mapping) else value.kind)


SchedulerConfig = Annotated[
    Annotated[OwnScheduler, Tag("name")]
    | Annotated[AsyncHyperBand, Tag("async_hyperband")]
    | Annotated[MedianStopping, Tag("median_stopping_rule")],
    Discriminator(_variant_of),
    BeforeValidator(readable_scheduler),
]
