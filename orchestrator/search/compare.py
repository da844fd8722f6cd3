"""``compare``: the same student on the same scores, taught in several ways; whether adaptive teaching helps this pair."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.cluster.ray_session import ray_for
from orchestrator.config.compare import ARMS
from orchestrator.config.load import ConfigError
from orchestrator.config.run import RunConfig
from orchestrator.config.tune import OF_ANSWERS, rung_steps
from orchestrator.run.run_dir import RunDir
from orchestrator.search.bound_space import BoundSpace, require_searchable, require_trials
from orchestrator.search.controller import Assignment, ControllerHandle
from orchestrator.search.driver import SharedInputs, TrialQueue, begin_ledger, note_cost, prepare_inputs, run_search
from orchestrator.search.ledger import Ledger, Search, Trial, read_ledger
from orchestrator.search.ledger_records import SearchSpec
from orchestrator.search.results import completed_trials, write_results
from orchestrator.search.samplers import ListSampler
from orchestrator.search.schedulers import RuleScheduler, StoppingRule
from tune_spaces.ranges import Choice
from tune_spaces.space import Point, Space

logger = logging.getLogger("atkd")

RATE = "train.optimizer.learning_rate"


def compare(config: RunConfig) -> Path:
    """Train every arm with every seed, resuming where an earlier comparison stopped; return the comparison's folder.

    Raises:
        ValueError: if the budget or the devices will not do, or another comparison's ledger stands there.
    """
    require_trials(config, "compare")
    points = {arm: point_of(arm, config) for arm in config.compare.arms}
    bound = bind_arms(config, points)
    folder = config.run_dir / config.compare.name
    with RunDir.open(config) as run_dir, ray_for(config):
        inputs = prepare_inputs(config, run_dir, any(bound.config_of(point).learns_from_data for point in points.values()))
        note_cost(config, run_dir, folder)
        tried: Sequence[Trial] = ()
        if config.compare.learning_rates:
            tried = try_rates(bound, inputs, folder / "learning_rates", points)
            points = with_best_rates(points, tried, folder / "learning_rates", config.compare.learning_rates)
        trials = [(arm, config.seed + seed, points[arm]) for seed in range(config.compare.seeds) for arm in points]
        search = run_all(bound, inputs, folder, trials, config.compare.baseline, tried)
        note_cost(config, run_dir, folder)
    write_results(search, bound, folder)
    return folder


def point_of(arm: str, config: RunConfig) -> Point:
    """Return what an arm sets in the configuration."""
    return config.compare.own_arms[arm] if arm in config.compare.own_arms else {"loss": loss_of(arm, config)}


def loss_of(arm: str, config: RunConfig) -> dict[str, Any]:
    """Return the section ``loss`` of an arm; those of ATKD take their knobs from the configuration, if its loss is ATKD."""
    loss = dict(ARMS[arm])
    if loss["kind"] == "atkd" and config.loss.kind == "atkd":
        return {**config.loss.model_dump(mode="json"), "scope": _scope(loss, config), **loss}
    return loss


def _scope(loss: dict[str, Any], config: RunConfig) -> str:
    """Return the configuration's scope, or the one in which a control's other split can be drawn."""
    assert config.loss.kind == "atkd"
    return "batch" if loss["split"] != "uncertainty" and config.loss.scope == "microbatch" else config.loss.scope


def bind_arms(config: RunConfig, points: Mapping[str, Point]) -> BoundSpace:
    """Return the configurations of the arms, each checked.

    Raises:
        ConfigError: if an arm sets what may not differ between trials, or the configuration refuses its values.
    """
    bound = BoundSpace(config, Space(ranges={"arm": Choice(values=tuple(points))}), origin="compare.arms")
    for arm, point in points.items():
        for path in point:
            require_searchable(config, path, f"compare.own_arms.{arm}")
        if (top_k := bound.config_of(point).scores.top_k) > config.scores.top_k:
            raise ConfigError(
                f"compare.own_arms.{arm}: scores.top_k is {top_k}, and the store that all arms share holds "
                f"{config.scores.top_k}; that, or less, would do"
            )
    return bound


def try_rates(bound: BoundSpace, inputs: SharedInputs, folder: Path, points: Mapping[str, Point]) -> list[Trial]:
    """Try each learning rate on each arm with the first seed, and return the completed trials, best first."""
    config = bound.config
    trials = [
        (arm, config.seed, {**point, RATE: rate}) for arm, point in points.items() for rate in config.compare.learning_rates
    ]
    return completed_trials(run_all(bound, inputs, folder, trials, None))


def with_best_rates(
    points: Mapping[str, Point], tried: Sequence[Trial], folder: Path, rates: Sequence[float]
) -> dict[str, Point]:
    """Return the arms' points with the best learning rate of each.

    Args:
        points: of the arms.
        tried: completed trials of the rates, best first.
        folder: where they are written down.
        rates: that were tried.

    Raises:
        ValueError: if an arm was completed with no rate.
    """
    best: dict[str, Point] = {}
    for trial in tried:
        arm = trial.begun.arm
        assert arm is not None
        best.setdefault(arm, dict(trial.begun.point))
    for arm in points:
        if arm not in best:
            raise ValueError(
                f"compare.learning_rates: {arm} was completed with none of {list(rates)}; {folder} has the errors. Lower rates "
                "would do, under another compare.name"
            )
        logger.info(f"compare: {arm} learns with {best[arm][RATE]:g}")
    return {arm: best[arm] for arm in points}


def run_all(
    bound: BoundSpace, inputs: SharedInputs, folder: Path, trials: list[tuple[str, int, Point]], baseline: str | None,
    tried: Sequence[Trial] = (),
) -> Search:  # fmt: skip
    """Run the trials, each given by arm, seed and point, that are not over yet and were not ``tried`` before."""
    settings = bound.config.compare
    # A rate is chosen by the metric alone.
    answers = settings.answers and (baseline is not None or settings.metric in OF_ANSWERS)
    assignments = [Assignment(number, point, seed, arm) for number, (arm, seed, point) in enumerate(trials)]
    spec = SearchSpec(
        kind="compare",
        name=bound.config.name,
        metric=settings.metric,
        mode=settings.direction,
        space={arm: point for arm, _, point in trials} if baseline else _tried(trials),
        total_steps=inputs.total_steps,
        rungs=rung_steps(inputs.total_steps, settings.rungs, "compare"),
        trials=len(trials),
        baseline=baseline,
    )
    found = begin_ledger(folder, spec)
    if answers == (settings.answers and settings.metric in OF_ANSWERS) and bound.config.rollouts is None:
        found = note_tried(Ledger(folder / "ledger.jsonl"), found, trials, tried)
    over = {trial.number for trial in found.with_status("completed", "stopped", "failed")}
    left = [assignment for assignment in assignments if assignment.trial not in over]
    if not left:
        return found

    def queue_of(controller: ControllerHandle, trials: Path) -> TrialQueue:
        return TrialQueue(controller, trials, ListSampler([]), left)

    return run_search(
        bound, inputs, folder, spec, RuleScheduler(StoppingRule("none", settings.direction)), queue_of,
        in_process=settings.trials_in == "reused_process",
        concurrent=None if settings.concurrent == "auto" else settings.concurrent,
        answers=answers,
    )  # fmt: skip


def note_tried(ledger: Ledger, found: Search, trials: list[tuple[str, int, Point]], tried: Sequence[Trial]) -> Search:
    """Write down, as trials of this ledger, those that were tried before with the same arm, seed and point: trained again, they
    would come out the same."""
    known = {(trial.begun.arm, trial.begun.seed, json.dumps(trial.begun.point, sort_keys=True)): trial for trial in tried}
    begun = {trial.number for trial in found.trials}
    for number, (arm, seed, point) in enumerate(trials):
        trial = known.get((arm, seed, json.dumps(point, sort_keys=True)))
        if trial is None or trial.ended is None or number in begun:
            continue
        ledger.begun(number, point, seed, arm)
        for rung in trial.rungs:
            ledger.rung(number, rung.rung, rung.step, rung.metrics, rung.decision, rung.seconds)
        end = trial.ended
        ledger.ended(number, "completed", end.step, end.metrics, end.seconds, end.student_tokens, parameters=end.parameters)
        logger.info(f"compare: {arm} with seed {seed} was trained when its rate was looked for, and is not trained again")
    return read_ledger(ledger.path)


def _tried(trials: list[tuple[str, int, Point]]) -> dict[str, Any]:
    """Return, for each arm, its loss and the learning rates that are tried on it."""
    tried: dict[str, Any] = {}
    for arm, _, point in trials:
        tried.setdefault(arm, {**point, RATE: []})[RATE].append(point[RATE])
    return tried
