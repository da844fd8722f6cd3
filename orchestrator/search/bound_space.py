"""A space bound to a configuration: every path checked before anything starts, and the configuration of each trial.

Imports neither torch nor Ray.
"""

import copy
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from actors.config.model_kinds import is_drawn
from losses.section import NotSearchable, Searchable, marked
from orchestrator.config.classes import is_of_images
from orchestrator.config.load import ConfigError, validate
from orchestrator.config.run import RunConfig
from tune_spaces.ranges import Dimension
from tune_spaces.space import Point, Space

SEARCHABLE = tuple(path for path, _ in marked(RunConfig, Searchable))
"""Keys and sections that may differ between trials."""

NOT_SEARCHABLE = {path: mark.reason for path, mark in marked(RunConfig, NotSearchable)}
"""For each section that is the same in all trials, the reason."""

LARGEST_GRID = 10_000

COMBINATIONS = 256
"""How many combinations of values are tried on the configuration, for each branch."""


@dataclass(frozen=True)
class BoundSpace:
    """A space all of whose points are configurations of trials that can share one score store."""

    config: RunConfig
    space: Space
    origin: str = "tune.space"
    """Where the configuration says it, for errors."""

    def config_of(self, point: Mapping[str, Any]) -> RunConfig:
        """Return the configuration of a trial: the one the space is bound to, with the point's values.

        A section is replaced as a whole; paths into it then change the new one. Trials read a complete store, so nothing of
        theirs overlaps with scoring: ``scores.overlap`` is false in each.

        Raises:
            ConfigError: if the values cannot stand there, alone or together.
        """
        tree = self.config.model_dump(mode="json")
        tree["scores"]["overlap"] = False
        try:
            for path in sorted(point, key=lambda path: path.count(".")):
                _set(tree, path, copy.deepcopy(point[path]))
            trial = validate(tree)
            require_same_samplers(self.config, trial)
            require_drawn_alike(self.config, trial)
            return trial
        except ConfigError as error:
            values = ", ".join(f"{path}={value!r}" for path, value in point.items())
            raise ConfigError(f"{self.origin}, with {values}: {error}{_integer_hint(str(error))}") from None

    def grid(self) -> list[Point]:
        """Return every point.

        Raises:
            ConfigError: naming a path whose range has no points.
        """
        try:
            return list(self.space.grid())
        except ValueError as error:
            raise ConfigError(f"tune.space: {error}") from None


def search_of(config: RunConfig) -> BoundSpace:
    """Return the search that the section ``tune`` asks for, checked against the rest of the configuration.

    Raises:
        ConfigError: naming the key, the value seen and one that would do.
    """
    tune = config.tune
    require_trials(config, "tune")
    bound, size = bind(config, tune.searched), tune.searched.size()
    if tune.search == "grid" and (size or 0) > LARGEST_GRID:
        raise ConfigError(f"tune.search grid tries every point, and tune.space has {size:,}; tune.search=random would do")
    if tune.search == "grid":
        bound.grid()
    elif size is not None and tune.draws > size:
        raise ConfigError(f"tune.trials is {tune.draws}, and tune.space has {size} points; tune.trials={size} would do")
    return bound


def require_same_samplers(config: RunConfig, trial: RunConfig) -> None:
    """Raise if the rollouts of a trial want another teacher or other samplers than those of the search.

    Raises:
        ConfigError: naming the key, its value here and in the trial, and what would do.
    """
    if trial.rollouts is None:
        return
    if config.rollouts is None:
        raise ConfigError(
            "rollouts is null in the configuration, whose samplers and teacher all trials would have; rollouts={max_new_tokens: "
            f"{trial.rollouts.max_new_tokens}}} there would do, and rollouts: null in trials that have none"
        )
    if trial.rollouts.max_new_tokens > config.rollouts.max_new_tokens:
        raise ConfigError(
            f"rollouts.max_new_tokens is {trial.rollouts.max_new_tokens}, but the teacher of all trials takes rows with "
            f"{config.rollouts.max_new_tokens}, as the configuration says; that, or fewer, would do"
        )
    if trial.teacher_sampler_engine is not None and config.teacher_sampler_engine is None:
        raise ConfigError(
            f"rollouts.teacher_share is {trial.rollouts.teacher_share:g}, but 0 in the configuration, whose samplers all trials "
            "have; a share above 0 there would do, and 0 in trials in which the teacher draws nothing"
        )
    if trial.sampler_engine != config.sampler_engine or trial.rollouts.teacher_engine != config.rollouts.teacher_engine:
        raise ConfigError(
            "rollouts.engine differs from the configuration's, but the samplers of all trials are alike; leave it out there"
        )


def require_drawn_alike(config: RunConfig, trial: RunConfig) -> None:
    """Raise if the student of a trial is neither the run's own nor one that the trial can draw.

    Raises:
        ConfigError: with what would do.
    """
    if trial.student.model != config.student.model and not is_drawn(trial.student.model):
        raise ConfigError(
            f"student.model.kind is {trial.student.model.kind}, whose weights come from elsewhere, and trials that do not begin "
            f"with the run's own student draw theirs: {_drawn_kind(config)} would do"
        )


def require_trials(config: RunConfig, section: Literal["tune", "compare"]) -> None:
    """Raise if trials would have several workers in one process, or a number of them that changes.

    Raises:
        ConfigError: with what would do.
    """
    if config.workers.elastic:
        raise ConfigError(
            f"workers.max {config.workers.max}: {section} counts how many trials find room at a time, so that each has as many "
            f"workers as the other; workers.count={config.workers.count} in the place of min and max would do"
        )
    if getattr(config, section).trials_in == "reused_process" and config.workers.count > 1:
        raise ConfigError(
            f"{section}.trials_in reused_process trains in one process, and workers.count is {config.workers.count}: "
            f"{section}.trials_in=ray_train would do, or workers.count=1"
        )


def bind(config: RunConfig, space: Space) -> BoundSpace:
    """Return the space as one of configurations like ``config``.

    Tried on the configuration are every value of a list and both ends and the middle of a range, one at a time, and
    combinations of them.

    Raises:
        ConfigError: if a path is not there, may not differ between trials, or holds values that the configuration refuses.
    """
    bound = BoundSpace(config, space)
    for dimensions in space.alternatives().values():
        for path, dimension in dimensions.items():
            require_searchable(config, path)
            if path == "scores.top_k":
                _require_stored(config, dimension)
        for point in _probing_points(dimensions):
            bound.config_of(point)
    return bound


def require_searchable(config: RunConfig, path: str, origin: str = "tune.space") -> None:
    """Raise if what stands at a path may not differ between trials; a path that is not there is left for the configuration.

    Raises:
        ConfigError: with the reason, and what may differ.
    """
    if path == "seed" and not _models_are_taken_as_they_are(config):
        raise ConfigError(
            f"{origin} cannot vary seed: it draws and fine-tunes models of this run as well, and all trials share them; it can "
            "where both models are pretrained, none is fine-tuned, and none writes responses"
        )
    if f"{path}.".startswith("student.model."):
        _require_draws_student(config, f"{origin} cannot vary {path}")
    if any(f"{path}.".startswith(f"{section}.") for section in SEARCHABLE):
        return
    reason = next((reason for section, reason in NOT_SEARCHABLE.items() if f"{path}.".startswith(f"{section}.")), None)
    if reason is not None:
        raise ConfigError(f"{origin} cannot vary {path}: {reason}. What can vary is {', '.join(SEARCHABLE)}")


def _models_are_taken_as_they_are(config: RunConfig) -> bool:
    sides = (config.teacher, config.student)
    as_they_are = ("pretrained", "cut")
    return config.responses is None and all(side.model.kind in as_they_are and side.finetune is None for side in sides)


def _require_draws_student(config: RunConfig, refused: str) -> None:
    """Trials draw students from nothing but a shape and the seed: what else a student has been through, all of them share."""
    model, responses = config.student.model, config.responses
    if not is_drawn(model):
        raise ConfigError(
            f"{refused}: student.model.kind is {model.kind}, whose weights come from elsewhere, and all trials begin with the "
            f"same; a student made from nothing can vary, as student.model.kind={_drawn_kind(config)}"
        )
    if config.student.finetune is not None:
        raise ConfigError(
            f"{refused}: student.finetune trains the run's own student before the trials begin, and one of another shape would "
            "begin without that; student.finetune=null would do, with more train.epochs"
        )
    if responses is not None and responses.writer == "student":
        raise ConfigError(
            f"{refused}: responses.writer is student, and the rows of all trials are those that the run's own student wrote; "
            "responses.writer=teacher would do"
        )


def _drawn_kind(config: RunConfig) -> str:
    if not config.classes:
        return "scratch"
    return "image_cnn" if is_of_images(config.data) else "text_cnn"


def _require_stored(config: RunConfig, dimension: Dimension) -> None:
    """A store of K serves every smaller one, and no larger."""
    stored = config.scores.top_k
    for top_k in dimension.probes():
        if isinstance(top_k, int | float) and top_k > stored:
            raise ConfigError(
                f"tune.space cannot vary scores.top_k up to {top_k:g}: the store that all trials share holds {stored}; raise "
                f"scores.top_k in the configuration, or search up to {stored}"
            )


def _probing_points(dimensions: Mapping[str, Dimension]) -> Iterator[Point]:
    """Yield points of a branch that show whether a configuration accepts it: each value alone first, for a short message."""
    probes = {path: dimension.probes() for path, dimension in dimensions.items()}
    first = {path: values[0] for path, values in probes.items()}
    yield first
    for path, values in probes.items():
        yield from ({**first, path: value} for value in values[1:])
    if math.prod(map(len, probes.values())) <= COMBINATIONS:
        yield from (dict(zip(probes, values, strict=True)) for values in itertools.product(*probes.values()))
    else:
        generator = random.Random(0)
        yield from ({path: generator.choice(values) for path, values in probes.items()} for _ in range(COMBINATIONS))


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set a value in a dumped configuration; a key that is not there is left for its validation to name."""
    *sections, name = path.split(".")
    for depth, section in enumerate(sections, start=1):
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            place = ".".join(sections[:depth])
            raise ConfigError(f"{place} is {inner!r} here and has no keys to search; give it as a mapping first")
        tree = inner
    tree[name] = value


def _integer_hint(message: str) -> str:
    return "\n  (a range of whole numbers says so: integer: true)" if "valid integer" in message else ""
