"""Rollouts beside the training: samplers that write by the student's weights, and the teacher that scores what they write."""

import logging
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from actors.dataloader.sampler import StepSampler, steps_in
from actors.engines.base import EngineFactory, TeacherSpec
from actors.engines.build import build_engine
from actors.evaluation.answer_ends import read_answer_ends
from actors.examples import ExampleFile
from actors.monitors.metrics_log import JsonLines
from actors.monitors.prometheus import TeacherMetrics
from actors.placement import read_nodes, replica_request, sampler_request, teacher_sampler_request, worker_request
from actors.rollouts.base import SamplerFactory, SamplerSpec, Sampling
from actors.rollouts.build import build_sampler
from actors.rollouts.mixed_writing import MixedWriters
from actors.rollouts.step_writer import RolloutPlan, StepFacts, StepWriter
from actors.rollouts.weights import WeightFolders
from actors.rollouts.workers import RolloutWorkers
from actors.room import fit_together
from actors.score_store.rollout_log import RolloutLog
from actors.student.task import RolloutTask
from actors.teacher.pool import TeacherPool
from orchestrator.cluster.background import in_background
from orchestrator.config.run import RunConfig
from orchestrator.models.models import Models, ids_below, named_below, vocab_size_of
from orchestrator.run.responses import longest_prompt, training_rows
from orchestrator.run.run_dir import RunDir
from orchestrator.run.score_identity import describe_failure, pin_revision
from orchestrator.run.score_parity import probe_of, require_right

logger = logging.getLogger("atkd")

MOST_REPLICAS = 64
"""Teachers that ``auto`` takes at most to score rollouts."""


def log_folder(folder: Path) -> Path:
    """Return where a run keeps the rows that the student writes, with their scores."""
    return folder / "rollouts" / "log"


def weights_folder(folder: Path) -> Path:
    """Return where a run leaves the student's weights for its samplers."""
    return folder / "rollouts" / "weights"


def rollout_task(config: RunConfig, folder: Path) -> RolloutTask | None:
    """Return what the training of a run is told of its rollouts; None where there are none."""
    if config.rollouts is None:
        return None
    return RolloutTask(
        log=str(log_folder(folder)),
        weights=str(weights_folder(folder)),
        student_share=config.rollouts.student_share,
        refresh_steps=config.rollouts.refresh_steps,
        lag=config.rollouts.lag,
        dtype=config.sampler_engine.dtype,
        inner_epochs=config.rollouts.inner_epochs,
    )


class RolloutStage:
    """The rollouts of one run. Made once teacher and student are ready, before either is started."""

    def __init__(
        self, config: RunConfig, run_dir: RunDir, models: Models, sampler_factory: SamplerFactory = build_sampler,
        engine_factory: EngineFactory = build_engine,
    ) -> None:  # fmt: skip
        assert config.rollouts is not None
        self._config, self._run_dir, self._rollouts = config, run_dir, config.rollouts
        self._sampler_factory, self._engine_factory = sampler_factory, engine_factory
        self._teacher, student = pin_revision(models.ready("teacher")), pin_revision(models.ready("student"))
        examples = ExampleFile(training_rows(config, run_dir.path))
        train, seed, vocab_size = config.train, config.seed, vocab_size_of(self._teacher)
        self._ids_below, self._vocab_size = ids_below(models), vocab_size
        self._sampler_spec = SamplerSpec(
            engine=config.sampler_engine,
            model=student,
            sampling=Sampling(self._rollouts.max_new_tokens, self._rollouts.temperature, self._rollouts.top_p, seed),
            ends=read_answer_ends(models.tokenizer_folder, models.tokenizer()),
            longest_prompt=longest_prompt(examples),
            ids_below=named_below(min(self._ids_below, vocab_size), vocab_size_of(student)),
        )
        self._plan = RolloutPlan(
            examples=examples,
            sampler=StepSampler(len(examples), train.batch_rows, seed, train.first_epoch == "store_order"),
            total_steps=steps_in(len(examples), train.batch_rows, train.epochs),
            seed=seed,
            student_share=self._rollouts.student_share,
            refresh_steps=self._rollouts.refresh_steps,
            lag=self._rollouts.lag,
            keep_steps=self._rollouts.keep_steps,
            first_model=student,
            trust_remote_code=student.trust_remote_code,
            teacher_share=self._rollouts.teacher_share,
            inner_epochs=self._rollouts.inner_epochs,
        )
        identity = {
            "rollouts": True,
            "top_k": config.scores.top_k,
            "top_mass": config.scores.top_mass,
            "vocab_size": vocab_size,
            "ids_below": min(self._ids_below, vocab_size),
        }
        self._log = RolloutLog.open_or_create(log_folder(run_dir.path), identity, self._plan.total_steps, train.batch_rows)

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Write rows while the body trains; leave when it is done."""
        if self._run_dir.result("train") is not None:
            yield
            return
        self._log.clear_failure()  # of an earlier run, before a student of this one can read it
        over = threading.Event()
        with in_background("rollouts", lambda: self._write(over), over.set):
            try:
                yield
            finally:
                over.set()

    def _write(self, over: threading.Event) -> None:
        """Write the rows of all steps that are missing; should it fail, tell the students that wait for them."""
        live, missing = TeacherMetrics(self._config.name), StepWriter.missing_steps(self._log, self._plan)
        if not missing:
            return
        logs = self._run_dir.path / "logs"
        pool = TeacherPool(
            self._teacher_spec(), engine_factory=self._engine_factory, probe=probe_of(self._config, self._run_dir), live=live,
            on_death=lambda number, error: self._run_dir.event("replica_died", replica=number, error=error), logs=logs,
        )  # fmt: skip
        samplers = self._samplers(logs)
        metrics = JsonLines(self._run_dir.path / "metrics", "rollouts", first_step=missing[0])
        try:
            with closing(metrics), samplers, pool, pool.serving() as service:
                require_right(pool, self._config, self._run_dir)

                def note(facts: StepFacts) -> None:
                    metrics.write(facts.step, facts.numbers)

                weights = WeightFolders(weights_folder(self._run_dir.path))
                StepWriter(self._plan, self._log, weights, samplers, service, note).run(over)
        except Exception as error:
            with suppress(OSError):  # on a full disk the first error matters, not that it could not be written down
                self._log.declare_failed(describe_failure(error))
            raise

    def _samplers(self, logs: Path) -> RolloutWorkers | MixedWriters:
        """Return those who write: samplers of the student, and of the teacher where it draws some of the tokens."""
        spec = self._sampler_spec
        student = RolloutWorkers(spec, int(spec.engine.replicas), logs, self._sampler_factory)
        if (engine := self._config.teacher_sampler_engine) is None:
            return student
        ids_below = named_below(self._ids_below, self._vocab_size)
        of_teacher = replace(spec, engine=engine, model=self._teacher, ids_below=ids_below)
        teacher = RolloutWorkers(of_teacher, int(engine.replicas), logs, self._sampler_factory, "teacher sampler")
        return MixedWriters(student, teacher, self._rollouts.teacher_share)

    def _teacher_spec(self) -> TeacherSpec:
        engine = self._config.teacher.engine
        heldout = ExampleFile(self._run_dir.path / "data" / "heldout.arrow")  # of which the teacher's probe is made
        written = self._sampler_spec.longest_prompt + self._rollouts.max_new_tokens
        if engine.replicas == "auto":
            engine = engine.model_copy(update={"replicas": self._most_replicas()})
        return TeacherSpec(
            engine=engine,
            model=self._teacher,
            top_k=self._config.scores.top_k,
            longest_row=max(int(heldout.lengths.max()), written),
            ids_below=named_below(self._ids_below, self._vocab_size),
        )

    def _most_replicas(self) -> int:
        """Return how many teachers find room beside samplers and workers, at least one."""
        config, nodes = self._config, read_nodes()
        others = [(sampler_request(config.sampler_engine), int(config.sampler_engine.replicas)),
                  (worker_request(config.workers), config.workers.count)]  # fmt: skip
        if (drawing := config.teacher_sampler_engine) is not None:
            others.append((teacher_sampler_request(drawing), int(drawing.replicas)))
        replica = replica_request(config.teacher.engine)
        fitting = [count for count in range(2, MOST_REPLICAS + 1) if fit_together(nodes, [(replica, count), *others])]
        return max(fitting, default=1)
