"""``tune``: a search over loss and optimizer, at the cost of one scoring."""

import random
from pathlib import Path

from orchestrator.cluster.ray_session import ray_for
from orchestrator.config.run import RunConfig
from orchestrator.config.tune import rung_steps
from orchestrator.run.run_dir import RunDir
from orchestrator.search.bound_space import BoundSpace, search_of
from orchestrator.search.controller import ControllerHandle, Outcome
from orchestrator.search.driver import (
    SharedInputs,
    TrialQueue,
    assignments_to_repeat,
    begin_ledger,
    note_cost,
    prepare_inputs,
    run_search,
)
from orchestrator.search.ledger import Search, Trial
from orchestrator.search.ledger_records import SearchSpec
from orchestrator.search.results import write_results
from orchestrator.search.samplers import ListSampler, OptunaSampler, Sampler
from orchestrator.search.schedulers import scheduler_of


def tune(config: RunConfig) -> Path:
    """Search the space of the section ``tune``, resuming where an earlier search stopped; return the search's folder.

    Raises:
        ValueError: if the space, the budget or the devices will not do, or another search's ledger stands there.
    """
    bound = search_of(config)
    folder = config.run_dir / config.tune.name
    with RunDir.open(config) as run_dir, ray_for(config):
        inputs = prepare_inputs(config, run_dir, some_learn_from_data(bound))
        spec = spec_of(config, inputs)
        found = begin_ledger(folder, spec)
        note_cost(config, run_dir, folder)

        def queue_of(controller: ControllerHandle, trials: Path) -> TrialQueue:
            return TrialQueue(
                controller, trials, source_of(bound, found), assignments_to_repeat(found), len(found.trials), config.seed
            )

        settings = config.tune
        search = run_search(
            bound, inputs, folder, spec, scheduler_of(settings), queue_of,
            in_process=settings.trials_in == "reused_process",
            concurrent=None if settings.concurrent == "auto" else settings.concurrent,
            answers=settings.answers,
        )  # fmt: skip
        note_cost(config, run_dir, folder)
    write_results(search, bound, folder)
    return folder


def some_learn_from_data(bound: BoundSpace) -> bool:
    """Return whether a trial may learn from rows as the data has them: its point says so, or the configuration does."""
    varied = {path for dimensions in bound.space.alternatives().values() for path in dimensions}
    return bound.config.learns_from_data or bool(varied & {"rollouts", "rollouts.student_share"})


def spec_of(config: RunConfig, inputs: SharedInputs) -> SearchSpec:
    """Return what the ledger says of the search.

    Raises:
        ValueError: if a trial has fewer steps than rungs.
    """
    settings, size = config.tune, config.tune.searched.size()
    return SearchSpec(
        kind="tune",
        name=config.name,
        metric=settings.metric,
        mode=settings.direction,
        space=settings.searched.as_written(),
        total_steps=inputs.total_steps,
        rungs=rung_steps(inputs.total_steps, settings.rungs),
        trials=(size or 0) if settings.search == "grid" else settings.draws,
        scheduler=settings.model_dump(include={"scheduler"})["scheduler"],
    )


def source_of(bound: BoundSpace, found: Search) -> Sampler:
    """Return where the points come from that were not tried yet."""
    settings = bound.config.tune
    tried = [(dict(trial.begun.point), outcome_of(found, trial)) for trial in found.trials]
    if settings.search == "grid":
        return ListSampler(bound.grid(), [point for point, _ in tried])
    if settings.search == "random":
        draws = bound.space.sample(settings.draws, random.Random(settings.seed))
        return ListSampler(draws, [point for point, _ in tried])
    return OptunaSampler(bound.space, settings.direction, settings.seed, settings.draws, tried)


def outcome_of(search: Search, trial: Trial) -> Outcome | None:
    """Return how a trial of the ledger ended; None if it did not."""
    if trial.ended is None:
        return None
    failed = search.error(trial) is not None
    return Outcome("failed" if failed else trial.ended.status, search.value(trial), len(trial.rungs) - 1)
