"""Ray Tune: it starts trials where there is room, and begins the next when one is over.

Which point is tried next and how a trial is stopped is not left to it: trials end by their own return, told by the controller,
so that Ray Train frees what it holds; Ray Tune would kill them, and their placement groups would outlive them. A scheduler of
Ray Tune is asked by the controller.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune.search import Searcher

from actors.config.workers import WorkersConfig
from actors.placement import ResourceRequest, read_nodes, settled_places, worker_request
from actors.room import fit_together
from actors.storage.folder import open_folder
from orchestrator.search.ledger import Search
from orchestrator.search.trial import TrialContext, drop_folder, run_trial


class Trials(Protocol):
    """The trials of a search, in the order in which they are to begin."""

    def begin_next(self) -> int | None:
        """Record the next trial as begun and return its number; None if there is none left."""
        ...

    def over(self, trial: int, died: bool) -> None:
        """Record that a trial is over; ``died`` if its process ended before it could say how."""
        ...


def run_trials(
    trials: Trials, context: TrialContext, workers: WorkersConfig, samplers: Sequence[tuple[ResourceRequest, int]], at_once: int
) -> None:
    """Run trial after trial, up to ``at_once`` at a time, until there is none left."""
    _keep_silent()
    storage = context.tune_folder()
    drop_folder(storage)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(run_trial, context=context), trial_resources(workers, context.in_process, samplers)
        ),
        tune_config=tune.TuneConfig(
            search_alg=_InOrder(trials), num_samples=-1, max_concurrent_trials=at_once, reuse_actors=context.in_process
        ),
        run_config=_run_config(storage),
    )
    tuner.fit()
    drop_folder(storage)


def result_grid(search: Search, folder: Path) -> tune.ResultGrid:
    """Return the trials of a ledger as Ray Tune's own results, for whoever has tools for those; needs a Ray.

    Each trial that is over is played to Ray Tune once more: its point as ``config["point"]``, its measures rung by rung, its
    error. That takes seconds a trial; what Ray Tune writes stays in ``folder``.

    Args:
        search: what the ledger tells.
        folder: where Ray Tune keeps the results; one that every node sees.
    """
    _keep_silent()
    over = {trial.number: trial for trial in search.with_status("completed", "stopped", "failed")}
    errors = {number: search.error(trial) for number, trial in over.items()}
    points = {number: dict(trial.begun.point) for number, trial in over.items()}
    measured = {number: [dict(rung.metrics) | {"step": rung.step} for rung in trial.rungs] for number, trial in over.items()}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_play, measured=measured, errors=errors), {"CPU": 0.01}),
        param_space={
            "trial": tune.grid_search(list(over)), "point": tune.sample_from(lambda config: points[config["trial"]])
        },
        tune_config=tune.TuneConfig(metric=search.spec.metric, mode=search.spec.mode),
        run_config=_run_config(str(folder)),
    )  # fmt: skip
    return tuner.fit()


def _play(
    config: Mapping[str, Any], measured: Mapping[int, list[dict[str, float | None]]], errors: Mapping[int, str | None]
) -> None:
    for metrics in measured[config["trial"]]:
        tune.report(metrics)
    if error := errors[config["trial"]]:
        raise RuntimeError(error)


def _run_config(storage: str) -> tune.RunConfig:
    path, filesystem = open_folder(storage).opened()
    return tune.RunConfig(
        name="trials", storage_path=path, storage_filesystem=filesystem, verbose=0,
        failure_config=tune.FailureConfig(max_failures=0),
    )  # fmt: skip


def _keep_silent() -> None:
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C is a KeyboardInterrupt here as everywhere
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the other output speaks even when it is told to be silent
    for name in ("ray.tune", "ray.tune.execution.tune_controller", "ray.tune.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a trial's error stands in the ledger


def trial_resources(
    workers: WorkersConfig, in_process: bool, samplers: Sequence[tuple[ResourceRequest, int]] = ()
) -> tune.PlacementGroupFactory:
    """Return what Ray Tune holds for a trial: all it needs, samplers included, but for workers that Ray Train holds itself."""
    held = worker_request(workers)
    amounts, labels = dict(held.amounts), dict(held.labels)
    if not in_process:
        amounts, labels = {"memory": 1 << 20}, {}  # no part of a CPU, of which the workers may need all
    bundles, selectors = [amounts], [labels]
    for sampler, count in samplers:
        bundles += [dict(sampler.amounts)] * count
        selectors += [dict(sampler.labels)] * count
    return tune.PlacementGroupFactory(bundles, **({"bundle_label_selector": selectors} if any(selectors) else {}))


def most_at_once(workers: WorkersConfig, samplers: Sequence[tuple[ResourceRequest, int]] = ()) -> int:
    """Return how many trials find room in what is free now, node by node.

    Raises:
        ValueError: naming what a trial needs and what there is room for, if there is room for none.
    """
    need = worker_request(workers)
    free = settled_places(need, enough=sum(need.times_on(node) for node in read_nodes()))
    if free < workers.count:
        raise ValueError(
            f"a trial needs {need.many(workers.count)}, and there is room for {free} now: lower workers.cpus, workers.gpus or "
            "workers.count, or wait until other work is done"
        )
    if not samplers:
        return free // workers.count
    now = [replace(node, total=node.free) for node in read_nodes()]
    fitting = [
        trials for trials in range(1, free // workers.count + 1)
        if fit_together(now, [(need, trials * workers.count), *((sampler, trials * count) for sampler, count in samplers)])
    ]  # fmt: skip
    if not fitting:
        wanted = " and ".join(one.many(count) for one, count in [(need, workers.count), *samplers])
        raise ValueError(
            f"a trial needs {wanted}, for which there is no room now beside the teacher: lower workers.cpus, "
            "rollouts.engine.cpus or teacher.engine.replicas, or wait until other work is done"
        )
    return max(fitting)


class _InOrder(Searcher):
    """Gives Ray Tune the numbers of the trials, one by one."""

    def __init__(self, trials: Trials) -> None:
        super().__init__()
        self._trials = trials
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, int] | str:
        number = self._trials.begin_next()
        if number is None:
            return Searcher.FINISHED
        self._numbers[trial_id] = number
        return {"trial": number}

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        self._trials.over(self._numbers[trial_id], died=error)
