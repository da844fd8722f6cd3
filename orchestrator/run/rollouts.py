"""Rollouts beside a training: samplers that write by the student's weights, and the teacher that scores what they write."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from actors.config.places import in_object_storage
from actors.dataloader.row_sources import RowPolicy, RowSources
from actors.dataloader.sampler import StepSampler, steps_in
from actors.engines.base import EngineFactory, TeacherSpec
from actors.engines.build import build_engine
from actors.engines.teacher_head import require_head_alone
from actors.evaluation.answer_ends import read_answer_ends
from actors.examples import ExampleFile
from actors.model_source import ModelSource
from actors.monitors.metrics_log import JsonLines
from actors.monitors.prometheus import TeacherMetrics
from actors.placement import (
    ResourceRequest,
    read_nodes,
    replica_request,
    sampler_request,
    teacher_sampler_request,
    worker_request,
)
from actors.rollouts.base import SamplerFactory, SamplerSpec, Sampling
from actors.rollouts.build import build_sampler
from actors.rollouts.mixed_writing import MixedWriters
from actors.rollouts.step_writer import RolloutPlan, StepFacts, StepWriter, Teacher
from actors.rollouts.weight_copies import drop_copies
from actors.rollouts.weights import WeightFolders
from actors.rollouts.workers import RolloutWorkers
from actors.room import fit_together
from actors.score_store.rollout_log import RolloutLog
from actors.student.task import RolloutTask
from actors.teacher.pool import TeacherPool
from actors.teacher.service import ScoreService
from orchestrator.cluster.background import in_background
from orchestrator.cluster.run_copies import place_of, tidy_on_all_nodes
from orchestrator.config.run import RunConfig
from orchestrator.models.models import Models, config_of, ids_below, named_below, vocab_size_of
from orchestrator.run.responses import longest_prompt, training_rows
from orchestrator.run.run_dir import RunDir
from orchestrator.run.score_identity import describe_failure, pin_revision
from orchestrator.run.score_parity import probe_of, require_right

ROLLOUTS, LOG = "rollouts", "rollouts/log"
"""Folders within a run's, or a trial's: of all that is written beside its training, and of the rows with their scores."""
MOST_REPLICAS = 64
"""Teachers that ``auto`` takes at most to score rollouts."""

ServeTeacher = Callable[[], AbstractContextManager[Teacher]]
"""Starts whoever scores rows on demand, and ends them again."""


def rollouts_folder(folder: Path) -> Path:
    """Return where a run or a trial keeps what the student writes."""
    return folder / ROLLOUTS


def log_place(config: RunConfig, folder: Path) -> str:
    """Return where a run or a trial keeps the rows that the student writes, with their scores: a path, or an address."""
    return place_of(config.mirror, folder / LOG)


def optimizer_steps(config: RunConfig, rows: int) -> int:
    """Return how many optimizer steps the distillation of so many rows takes."""
    times = config.rollouts.inner_epochs if config.rollouts is not None else 1
    return steps_in(rows, config.train.batch_rows, config.train.epochs) * times


def samplers_of(config: RunConfig) -> list[tuple[ResourceRequest, int]]:
    """Return what each kind of sampler beside a training needs, and how many there are."""
    if config.rollouts is None:
        return []
    found = [(sampler_request(config.sampler_engine), int(config.sampler_engine.replicas))]
    if (drawing := config.teacher_sampler_engine) is not None:
        found.append((teacher_sampler_request(drawing), int(drawing.replicas)))
    return found


def rollout_task(config: RunConfig, folder: Path, run_folder: Path, models: Models) -> RolloutTask | None:
    """Return what the training of a run, or of a trial with a folder of its own, is told of its rollouts; None if it has none."""
    if config.rollouts is None:
        return None
    rollouts, adaptive, own = config.rollouts, config.rollouts.adaptive_share, rollouts_folder(folder)
    policy = RowPolicy(
        rollouts.student_share, rollouts.refresh_steps, rollouts.lag, rollouts.inner_epochs, rollouts.replay, adaptive,
        shares=place_of(config.mirror, own / "shares.json") if adaptive is not None else None,
    )  # fmt: skip
    return RolloutTask(
        log=log_place(config, folder),
        weights=place_of(config.mirror, own / "weights"),
        policy=policy,
        dtype=config.sampler_engine.dtype,
        heldout=str(run_folder / "data" / "heldout.arrow"),
        heldout_store=json.loads((run_folder / "scores.json").read_text())["heldout"] if adaptive is not None else None,
        heldout_batch_rows=config.evaluate.batch_rows,
        head_of=models.ready("teacher") if config.rollouts.wire == "hidden" else None,
        head_dtype=config.teacher.engine.dtype,
    )


def require_hidden_states_teach(teacher: ModelSource, student: ModelSource) -> None:
    """Raise if a teacher's hidden states and its output head cannot teach a student.

    Raises:
        ValueError: naming the key, what was found, and what would do.
    """
    require_head_alone(teacher)
    sizes = vocab_size_of(teacher), vocab_size_of(student)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"rollouts.wire is hidden, but the teacher has a vocabulary of {sizes[0]} tokens and the student one of {sizes[1]}, "
            "and whole distributions are compared; rollouts.wire=candidates would do"
        )


class RolloutStage:
    """The rollouts of one training: samplers, and the log that they fill. Made once the student is ready.

    Args:
        config: of the run, or of a trial.
        folder: of the run, with its rows and its tokenizer.
        models: of the run.
        task: what the training is told of its rollouts.
        seed: draws who writes which row, and the responses.
        sampler_factory: builds a sampler's engine.
    """

    def __init__(
        self, config: RunConfig, folder: Path, models: Models, task: RolloutTask, seed: int,
        sampler_factory: SamplerFactory = build_sampler,
    ) -> None:  # fmt: skip
        assert config.rollouts is not None
        self._sampler_factory, self._task = sampler_factory, task
        teacher, student = models.ready("teacher"), pin_revision(models.ready("student"))
        train, rollouts = config.train, config.rollouts
        if rollouts.wire == "hidden":
            require_hidden_states_teach(teacher, student)
        examples = ExampleFile(training_rows(config, folder))
        known, vocab_size = ids_below(models), vocab_size_of(teacher)
        self._sampler_spec = SamplerSpec(
            engine=config.sampler_engine,
            model=student,
            sampling=Sampling(rollouts.max_new_tokens, rollouts.temperature, rollouts.top_p, seed),
            ends=read_answer_ends(models.tokenizer_folder, models.tokenizer()),
            longest_prompt=longest_prompt(examples),
            ids_below=named_below(min(known, vocab_size), vocab_size_of(student)),
            candidates=config.scores.top_k if rollouts.wire == "candidates" else 0,
        )
        self._teacher_sampler_spec = None
        if (drawing := config.teacher_sampler_engine) is not None:
            self._teacher_sampler_spec = replace(
                self._sampler_spec, engine=drawing, model=pin_revision(teacher), ids_below=named_below(known, vocab_size)
            )
        sampler = StepSampler(len(examples), train.batch_rows, seed, train.first_epoch == "store_order")
        total_steps = steps_in(len(examples), train.batch_rows, train.epochs)
        self._plan = RolloutPlan(
            examples=examples,
            sampler=sampler,
            total_steps=total_steps,
            sources=RowSources(task.policy, seed, sampler.rows_of, total_steps),
            keep_steps=rollouts.keep_steps,
            first_model=student,
            trust_remote_code=student.trust_remote_code,
            teacher_share=rollouts.teacher_share,
        )
        identity = {
            "rollouts": True,
            "top_k": config.scores.top_k,
            "top_mass": None if rollouts.wire == "candidates" else config.scores.top_mass,
            "wire": rollouts.wire,
            "vocab_size": vocab_size,
            "ids_below": min(known, vocab_size),
            "hidden_size": config_of(teacher).get_text_config().hidden_size if rollouts.wire == "hidden" else 0,
        }
        self._log = RolloutLog.open_or_create(task.log, identity, self._plan.total_steps, train.batch_rows)

    @contextmanager
    def in_background(self, serve_teacher: ServeTeacher, metrics: Path, logs: Path) -> Iterator[None]:
        """Write rows while the body trains; leave when it is done.

        Args:
            serve_teacher: starts who scores them, unless all rows are there.
            metrics: folder of ``rollouts.jsonl``.
            logs: folder in which samplers leave what they print.
        """
        self._log.clear_failure()  # of an earlier start, before a student of this one can read it
        over = threading.Event()
        try:
            with in_background("rollouts", lambda: self._write(over, serve_teacher, metrics, logs), over.set):
                try:
                    yield
                finally:
                    over.set()
        finally:
            if in_object_storage(self._task.weights):
                tidy_on_all_nodes(drop_copies, self._task.weights)

    def _write(self, over: threading.Event, serve_teacher: ServeTeacher, metrics: Path, logs: Path) -> None:
        """Write the rows of all steps that are missing; should it fail, tell the students that wait for them."""
        missing = StepWriter.missing_steps(self._log, self._plan)
        if not missing:
            return
        lines = JsonLines(metrics, "rollouts", first_step=missing[0])

        def note(facts: StepFacts) -> None:
            lines.write(facts.step, facts.numbers)

        samplers, weights = self._samplers(logs), WeightFolders(self._task.weights)
        try:
            with closing(lines), samplers, serve_teacher() as teacher:
                StepWriter(self._plan, self._log, weights, samplers, teacher, note).run(over)
        except Exception as error:
            with suppress(OSError):  # on a full disk the first error matters, not that it could not be written down
                self._log.declare_failed(describe_failure(error))
            raise

    def _samplers(self, logs: Path) -> RolloutWorkers | MixedWriters:
        """Return those who write: samplers of the student, and of the teacher where it draws some of the tokens."""
        spec, of_teacher = self._sampler_spec, self._teacher_sampler_spec
        student = RolloutWorkers(spec, int(spec.engine.replicas), logs, self._sampler_factory)
        if of_teacher is None:
            return student
        replicas = int(of_teacher.engine.replicas)
        teacher = RolloutWorkers(of_teacher, replicas, logs, self._sampler_factory, "teacher sampler")
        return MixedWriters(student, teacher, self._plan.teacher_share)


@contextmanager
def served_teacher(
    config: RunConfig, run_dir: RunDir, models: Models, engine_factory: EngineFactory = build_engine
) -> Iterator[ScoreService]:
    """Have the teacher score rows on demand while the body runs; it is compared with its plain forward pass before."""
    pool = TeacherPool(
        _teacher_spec(config, run_dir.path, models), engine_factory=engine_factory, probe=probe_of(config, run_dir),
        live=TeacherMetrics(config.name), logs=run_dir.path / "logs",
        on_death=lambda number, error: run_dir.event("replica_died", replica=number, error=error),
    )  # fmt: skip
    with pool, pool.serving() as service:
        require_right(pool, config, run_dir)
        yield service


def _teacher_spec(config: RunConfig, folder: Path, models: Models) -> TeacherSpec:
    assert config.rollouts is not None
    engine, teacher = config.teacher.engine, pin_revision(models.ready("teacher"))
    heldout = ExampleFile(folder / "data" / "heldout.arrow")  # of which the teacher's probe is made
    written = longest_prompt(ExampleFile(training_rows(config, folder))) + config.rollouts.max_new_tokens
    if engine.replicas == "auto":
        engine = engine.model_copy(update={"replicas": _most_replicas(config)})
    return TeacherSpec(
        engine=engine,
        model=teacher,
        top_k=config.scores.top_k,
        longest_row=max(int(heldout.lengths.max()), written),
        ids_below=named_below(ids_below(models), vocab_size_of(teacher)),
        wire=config.rollouts.wire,
    )


def _most_replicas(config: RunConfig) -> int:
    """Return how many teachers find room beside samplers and workers, at least one."""
    nodes = read_nodes()
    others = [*samplers_of(config), (worker_request(config.workers), config.workers.count)]
    replica = replica_request(config.teacher.engine)
    fitting = [count for count in range(2, MOST_REPLICAS + 1) if fit_together(nodes, [(replica, count), *others])]
    return max(fitting, default=1)
