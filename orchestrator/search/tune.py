"""``tune``: a search over loss and optimizer, at the cost of one scoring."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.cluster.ray_session import ray_for
from orchestrator.config.run import RunConfig
from orchestrator.config.tune import rung_steps
from orchestrator.run.run_dir import RunDir
from orchestrator.search.bound_space import BoundSpace, search_of
from orchestrator.search.controller import Outcome
from orchestrator.search.driver import (
    Ground,
    TrialQueue,
    assignments_to_repeat,
    begin_ledger,
    note_cost,
    prepare_ground,
    run_search,
)
from orchestrator.search.ledger import Search, Trial
from orchestrator.search.ledger_records import SearchPlan
from orchestrator.search.pruning import StoppingRule
from orchestrator.search.samplers import LearnedPoints, ListedPoints, PointSource
from orchestrator.search.search_results import show_search


def tune(config: RunConfig, say: Callable[[str], None] = print) -> Path:
    """Search the space of the section ``tune``, going on where an earlier search stopped; return the search's folder.

    Raises:
        ValueError: if the space, the budget or the devices will not do, or another search's ledger stands there.
    """
    bound = search_of(config)
    folder = config.run_dir / config.tune.name
    with RunDir.open(config, say) as books, ray_for(config):
        ground = prepare_ground(config, books)
        plan = plan_of(config, ground)
        found = begin_ledger(folder, plan, say)
        note_cost(books, folder)

        def queue_of(judge: Any, trials: Path) -> TrialQueue:
            return TrialQueue(
                judge, trials, source_of(bound, found), assignments_to_repeat(found), len(found.trials), config.seed
            )

        settings = config.tune
        search = run_search(
            bound, ground, folder, plan, StoppingRule(settings.scheduler, settings.direction, settings.reduction), say, queue_of,
            in_process=settings.trials_in == "reused_process",
            concurrent=None if settings.concurrent == "auto" else settings.concurrent,
        )  # fmt: skip
    show_search(search, bound, folder, say)
    return folder


def plan_of(config: RunConfig, ground: Ground) -> SearchPlan:
    """Return what the ledger says of the search.

    Raises:
        ValueError: if a trial has fewer steps than rungs.
    """
    settings, size = config.tune, config.tune.searched.size()
    return SearchPlan(
        kind="tune",
        name=config.name,
        metric=settings.metric,
        mode=settings.direction,
        space=settings.searched.as_written(),
        total_steps=ground.total_steps,
        rungs=rung_steps(ground.total_steps, settings.rungs),
        trials=(size or 0) if settings.search == "grid" else settings.draws,
    )


def source_of(bound: BoundSpace, found: Search) -> PointSource:
    """Return where the points come from that were not tried yet."""
    settings = bound.config.tune
    tried = [(dict(trial.begun.point), outcome_of(found, trial)) for trial in found.trials]
    if settings.search == "grid":
        return ListedPoints(bound.grid(), [point for point, _ in tried])
    if settings.search == "random":
        draws = bound.space.sample(settings.draws, random.Random(settings.seed))
        return ListedPoints(draws, [point for point, _ in tried])
    return LearnedPoints(bound.space, settings.direction, settings.seed, settings.draws, tried)


def outcome_of(search: Search, trial: Trial) -> Outcome | None:
    """Return how a trial of the ledger ended; None if it did not."""
    if trial.ended is None:
        return None
    failed = search.error(trial) is not None
    return Outcome("failed" if failed else trial.ended.status, search.value(trial), len(trial.rungs) - 1)
