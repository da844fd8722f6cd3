"""Many trainings on one scoring: what ``tune`` and ``compare`` have in common, from the complete stores to the ledger."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.config.models import needs_teacher
from actors.examples import ExampleFile
from actors.files import write_atomically
from actors.monitors.metrics_log import read_metrics
from actors.score_store.store import ScoreStore
from actors.storage.mirror import kept_alike
from actors.teacher.service import ScoreService
from losses.config import AtkdLoss
from orchestrator.cluster.logs import ProgressSnapshot
from orchestrator.cluster.progress import logged_progress
from orchestrator.config.run import RunConfig
from orchestrator.models.models import Models
from orchestrator.run.pipeline import run_stages
from orchestrator.run.responses import training_rows
from orchestrator.run.rollouts import optimizer_steps, samplers_of, served_teacher
from orchestrator.run.run_dir import RunDir, result_path
from orchestrator.run.stages import fetch_models
from orchestrator.search.bound_space import BoundSpace
from orchestrator.search.controller import Assignment, ControllerHandle, Outcome, SearchController
from orchestrator.search.ledger import Ledger, Search, read_ledger
from orchestrator.search.ledger_records import SearchSpec
from orchestrator.search.ray_tune import most_at_once, run_trials
from orchestrator.search.samplers import Sampler
from orchestrator.search.schedulers import Scheduler
from orchestrator.search.trial import TrialContext, spent

logger = logging.getLogger("atkd")

PROGRESS_SECONDS = 5.0
DIED = "the process of the trial ended before it could say why; a lack of memory does that"


@dataclass(frozen=True, slots=True)
class SharedInputs:
    """What all trials stand on."""

    run_folder: Path
    training_store: str | None
    """None where the student writes all rows of all trials."""
    heldout_store: str
    total_steps: int
    """Optimizer steps of a trial by the configuration itself."""
    serve_teacher: Callable[[], AbstractContextManager[ScoreService | None]] = nullcontext
    """Starts who scores what the students of trials write; none where they write nothing."""


def prepare_inputs(config: RunConfig, run_dir: RunDir, from_data: bool = True) -> SharedInputs:
    """Run the stages up to the complete score stores: whoever comes first scores, and the teacher's devices are free after.

    Args:
        config: of the search.
        run_dir: the run's.
        from_data: whether some trial learns from rows as the data has them.

    Raises:
        ValueError: if the run was scored before for a loss that needs no teacher.
    """
    taught = config if needs_teacher(config.loss) else config.model_copy(update={"loss": AtkdLoss(kind="atkd")})
    taught = taught.model_copy(update={"rollouts": None}) if from_data else taught
    for finished in run_stages(taught, run_dir, overlap=False):
        if finished == "score":
            break
    models = Models(config, run_dir.path)
    fetch_models(config, run_dir, models, ["train"])
    stores = json.loads((run_dir.path / "scores.json").read_text())
    for split, path in stores.items():
        if missing := ScoreStore(path).missing_shards():
            raise ValueError(
                f"the scores of {split} at {path} lack {len(missing)} shards, though this run says that it is scored; "
                f"delete {result_path(run_dir.path, 'score')} and run again"
            )
    rows = len(ExampleFile(training_rows(config, run_dir.path)))
    total_steps = optimizer_steps(config, rows)
    inputs = SharedInputs(run_dir.path, stores.get("train"), stores["heldout"], total_steps)
    return inputs if config.rollouts is None else replace(inputs, serve_teacher=partial(served_teacher, config, run_dir, models))


def note_cost(config: RunConfig, run_dir: RunDir, folder: Path) -> None:
    """Write down what the scoring cost, beside the ledger: the teacher's tokens once, however many trials follow, and those of
    what the students of trials wrote."""
    scored = run_dir.result("score") or {}
    splits = [facts for facts in scored.values() if isinstance(facts, dict)]
    files = {"train": training_rows(config, run_dir.path), "heldout": run_dir.path / "data" / "heldout.arrow"}
    tokens = {split: ExampleFile(path).tokens for split, path in files.items()}
    cost = {
        "teacher_tokens_scored": sum(facts["tokens"] for facts in splits),
        "dataset_tokens": sum(tokens.values()),
        "scoring_seconds": sum(facts["seconds"] for facts in splits),
    }
    if config.rollouts is not None:
        written = [read_metrics(path) for path in (folder / "trials").glob("*/rollouts.jsonl")]
        cost["written_tokens_scored"] = int(sum(step["tokens"] for steps in written for step in steps))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "cost.json", json.dumps(cost).encode())


class TrialQueue:
    """Which trial begins next.

    Args:
        controller: handle of the controller.
        folder: where trials leave their metrics.
        source: gives the points of new trials.
        waiting: trials that are known already, and begin before new ones.
        first: number of the first new trial.
        seed: of new trials whose points set none.
    """

    def __init__(
        self,
        controller: ControllerHandle,
        folder: Path,
        source: Sampler,
        waiting: Sequence[Assignment],
        first: int = 0,
        seed: int = 0,
    ) -> None:
        self._controller, self._folder, self._source = controller, folder, source
        self._waiting, self._next, self._seed = list(waiting), first, seed
        self._under_way: dict[int, Assignment] = {}

    def begin_next(self) -> int | None:
        """Record the next trial as begun and return its number; None if there is none left."""
        assignment = self._waiting.pop(0) if self._waiting else self._new()
        if assignment is None:
            return None
        ray.get(self._controller.begin.remote(assignment))
        self._under_way[assignment.trial] = assignment
        return assignment.trial

    def over(self, trial: int, died: bool) -> None:
        """Record that a trial is over; ``died`` if its process ended before it could say how."""
        steps, tokens = spent(self._folder, trial) if died else (0, 0)  # else it said so itself, and that stands
        outcome: Outcome = ray.get(self._controller.ended.remote(trial, steps, tokens, DIED, None))
        self._source.tell(self._under_way.pop(trial).point, outcome)

    def _new(self) -> Assignment | None:
        point = self._source.next()
        if point is None:
            return None
        self._next += 1
        return Assignment(self._next - 1, point, point.get("seed", self._seed))


def begin_ledger(folder: Path, spec: SearchSpec) -> Search:
    """Begin the ledger or resume it, and say which.

    Raises:
        ValueError: if it is another search's, or damaged.
    """
    search = Ledger(folder / "ledger.jsonl").begin_search(spec)
    if search.trials:
        over = len(search.with_status("completed", "stopped", "failed"))
        logger.info(f"{spec.kind}: resumes with {over} trials done and {len(search.trials) - over} to start again")
    return search


def run_search(
    bound: BoundSpace, inputs: SharedInputs, folder: Path, spec: SearchSpec, scheduler: Scheduler,
    queue_of: Callable[[ControllerHandle, Path], TrialQueue], *, in_process: bool, concurrent: int | None,
    answers: bool = False,
) -> Search:  # fmt: skip
    """Run the trials to their end under a controller, saying how far they are; return what the ledger then holds.

    ``queue_of`` makes their queue, given the controller and the folder in which trials leave their metrics.
    """
    workers = bound.config.workers
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # the ledger is on this node
    samplers = samplers_of(bound.config)
    actor = ray.remote(SearchController).options(num_cpus=0, scheduling_strategy=here)
    controller: ControllerHandle = actor.remote(folder / "ledger.jsonl", spec, scheduler)
    stores = (inputs.training_store, inputs.heldout_store)
    with inputs.serve_teacher() as teacher:
        trial_context = TrialContext(
            bound, inputs.run_folder, folder / "trials", *stores, len(spec.rungs), in_process, controller, answers, teacher
        )
        at_once = min(most_at_once(workers, samplers), concurrent or spec.trials)
        logger.info(f"{spec.kind}: {spec.trials} trials of {spec.total_steps} steps, {at_once} at a time")
        try:
            with (
                kept_alike(bound.config.mirror, seconds=None),
                logged_progress(spec.kind, lambda: _progress(folder / "ledger.jsonl", at_once), PROGRESS_SECONDS),
            ):
                run_trials(queue_of(controller, trial_context.folder), trial_context, workers, samplers, at_once)
        finally:
            ray.kill(controller)  # before the teacher goes: trials that miss it have not failed, they were interrupted
    return read_ledger(folder / "ledger.jsonl")


def assignments_to_repeat(search: Search) -> list[Assignment]:
    """Return the trials that began and did not end."""
    begun = [trial.begun for trial in search.with_status("unfinished")]
    return [Assignment(one.trial, one.point, one.seed, one.arm) for one in begun]


def progress_line(search: Search, at_once: int) -> str:
    """Return a line such as ``5/12 trials done (2 stopped, 1 failed), 2 running, best kl_to_teacher 0.0412, 3:20 left``."""
    over, running = search.with_status("completed", "stopped", "failed"), search.with_status("unfinished")
    counts = {status: len(search.with_status(status)) for status in ("stopped", "failed")}
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    parts = [f"{len(over)}/{search.spec.trials} trials done" + (f" ({said})" if said else ""), f"{len(running)} running"]
    values = [value for trial in search.with_status("completed") if (value := search.value(trial)) is not None]
    if values:
        best = min(values) if search.spec.mode == "min" else max(values)
        parts.append(f"best {search.spec.metric} {best:.4f}")
    if over:
        pace = sum(trial.seconds for trial in over) / len(over) / at_once
        parts.append(f"{time.strftime('%H:%M:%S', time.gmtime(pace * (search.spec.trials - len(over))))} left")
    return ", ".join(parts)


def _progress(path: Path, at_once: int) -> ProgressSnapshot:
    search = read_ledger(path)
    line, over = progress_line(search, at_once), search.with_status("completed", "stopped", "failed")
    return ProgressSnapshot(line.rsplit(",", 1)[0], line, len(over), search.spec.trials)  # the time left alone is no news
