"""The scoring stage of a run: it opens the stores, and fills them before or while the student trains."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from actors.config.models import needs_teacher
from actors.engines.base import EngineFactory, TeacherSpec
from actors.engines.build import build_engine
from actors.examples import ExampleFile
from actors.files import write_atomically
from actors.monitors.prometheus import TeacherMetrics
from actors.placement import Cluster, read_cluster
from actors.score_store.store import ScoreStore
from actors.teacher.pool import TeacherPool
from losses.config import HardLabelLoss
from orchestrator.classification.calibration import calibration_of
from orchestrator.classification.label_words import read_asked, words_identity
from orchestrator.cluster.background import in_background
from orchestrator.cluster.logs import ProgressSnapshot, log_progress
from orchestrator.cluster.ray_session import settle_replicas
from orchestrator.config.run import RunConfig
from orchestrator.config.task import ClassificationTask
from orchestrator.data.tokenizers import tokenizer_hash
from orchestrator.models.models import Models, ids_below, named_below, vocab_size_of
from orchestrator.run.responses import training_rows
from orchestrator.run.run_dir import Facts, RunDir, result_path
from orchestrator.run.score_identity import (
    VERIFIED_BYTES,
    ScoringProgress,
    describe_failure,
    nearest_store,
    open_store,
    pin_revision,
    score_split,
    store_identity,
)
from orchestrator.run.score_parity import probe_of, require_right
from orchestrator.run.stages import rows_of

logger = logging.getLogger("atkd")

Split = Literal["train", "heldout"]
PROGRESS_SECONDS = 5.0
DIFFERENCES_SHOWN = 3


class ScoringStage:
    """The score stores of one run, and the teacher that fills them. Made once the teacher is ready."""

    def __init__(
        self, config: RunConfig, run_dir: RunDir, models: Models, engine_factory: EngineFactory = build_engine
    ) -> None:
        self.config, self.run_dir = config, run_dir
        self._engine_factory = engine_factory
        self._teacher = pin_revision(models.ready("teacher"))
        classes = config.classes
        self._vocab_size = classes or vocab_size_of(self._teacher)
        self._tokenizer_hash = None if classes else tokenizer_hash(models.tokenizer())
        self._ids_below = classes or ids_below(models)
        self._temperature = temperature_of(config, run_dir.path)
        self._asked = read_asked(run_dir.path / "data") if config.teacher.label_words is not None else None
        self.heldout_store = self._open("heldout")
        self.training_store = self._open("train") if needs_teacher(config.loss) and config.learns_from_data else None
        self._pool: TeacherPool | None = None
        self._beside_students = False
        pointers = {"heldout": self.heldout_store.place}
        if self.training_store is not None:
            pointers["train"] = self.training_store.place
        write_atomically(run_dir.path / "scores.json", json.dumps(pointers, indent=1).encode())

    @property
    def complete(self) -> bool:
        """Whether nothing is left to score, so that no teacher is started."""
        return self.heldout_store.complete and (self.training_store is None or self.training_store.complete)

    def run(self) -> None:
        """Score what is missing; nothing, and no teacher is started, where both stores are complete."""
        self.run_dir.stage("score", self.fill)

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Score while the body runs; leave when both are done. The teacher's error goes before the body's."""
        self._beside_students = True
        if self.training_store is not None:
            self.training_store.clear_failure()  # of an earlier run, before a student of this one can read it

        def stop() -> None:
            if self._pool is not None:
                self._pool.close()

        with in_background("scoring", self.run, stop):
            yield

    def fill(self) -> Facts:
        """Score what is missing, as ``run`` does, and return what is known of it."""
        facts: Facts = {}
        auto = self.config.teacher.engine.replicas == "auto"
        cluster = read_cluster() if auto else None  # at once: students that stand already would be counted twice
        stores: list[tuple[Split, ScoreStore]] = [("heldout", self.heldout_store)]
        if self.training_store is not None:
            stores.insert(0, ("train", self.training_store))  # students wait for these
        if all(store.complete for _, store in stores):
            for split, store in stores:
                store.verify(VERIFIED_BYTES)
                logger.info(f"score: {split} found complete in {store.place}")
            return facts
        # named before it is entered, so that it can be closed while engines start
        live = TeacherMetrics(self.config.name)
        self._pool = TeacherPool(
            self._spec(stores, cluster), engine_factory=self._engine_factory, live=live,
            probe=probe_of(self.config, self.run_dir),
            on_death=lambda number, error: self.run_dir.event("replica_died", replica=number, error=error),
            logs=self.run_dir.path / "logs",
        )  # fmt: skip
        with _telling_followers([store for _, store in stores]), self._pool as pool:
            require_right(pool, self.config, self.run_dir)
            for split, store in stores:
                self._explain_new(split, store)
                live.begin(split)
                progress = ProgressLine(split, self.run_dir, live)
                summary = score_split(pool, self._examples_path(split), store, progress, progress.waits)
                facts[split] = asdict(summary)
                logger.info(
                    f"score: {split} complete, {summary.tokens_per_second:,.0f} tokens/s; {summary.mean_kept:.1f} tokens and "
                    f"{summary.bytes_per_target:.0f} bytes a target hold {100 * (1 - summary.mean_tail_mass):.3f} % of the "
                    "teacher's mass"
                )
        return facts

    def _explain_new(self, split: Split, store: ScoreStore) -> None:
        """Where the same rows were scored before, say why those scores do not serve."""
        if len(store.missing_shards()) < store.shard_count or (nearest := nearest_store(self.config.score_root, store)) is None:
            return
        path, lines = nearest
        more = f"; and {len(lines) - DIFFERENCES_SHOWN} more" if len(lines) > DIFFERENCES_SHOWN else ""
        logger.info(
            f"score: these rows of {split} were scored before, into {path}, but not as they are wanted now: "
            + "; ".join(lines[:DIFFERENCES_SHOWN]) + more
        )  # fmt: skip

    def _open(self, split: Split) -> ScoreStore:
        examples = ExampleFile(self._examples_path(split))
        tokens = self._tokenizer_hash or examples.tokens_hash  # rows of classifiers are named by their content
        identity = store_identity(self.config, self._teacher, tokens, examples, self._vocab_size, self._ids_below)
        words, task = self.config.teacher.label_words, self.config.task
        if words is not None and self._asked is not None and isinstance(task, ClassificationTask):
            identity["label_words"] = words_identity(words, task.labels, self._asked, split)
        if self._temperature != 1.0:
            identity["temperature"] = self._temperature
        if (similar := self.config.teacher.similar_tokens) is not None:
            identity["similar_tokens"] = similar.model_dump()
        return open_store(self.config, identity, split)

    def _spec(self, stores: list[tuple[Split, ScoreStore]], cluster: Cluster | None) -> TeacherSpec:
        engine = self.config.teacher.engine
        if cluster is not None:
            shards = max(len(store.missing_shards()) for _, store in stores)
            settled = settle_replicas(engine, self.config.workers if self._beside_students else None, shards, cluster)
            logger.info(f"teacher: {settled.reason}")
            engine = engine.model_copy(update={"replicas": settled.count})
        return TeacherSpec(
            engine=engine,
            model=self._teacher,
            top_k=self.config.scores.top_k,
            longest_row=max(int(ExampleFile(self._examples_path(split)).lengths.max()) for split, _ in stores),
            ids_below=named_below(self._ids_below, self._vocab_size),
            label_words=self._asked.token_ids if self._asked is not None else (),
            similar_tokens=self.config.teacher.similar_tokens,
            temperature=self._temperature,
        )

    def _examples_path(self, split: Split) -> Path:
        if self.config.classes:
            return rows_of("teacher", split, self.run_dir.path)
        return training_rows(self.config, self.run_dir.path) if split == "train" else self.run_dir.path / "data" / "heldout.arrow"


def calibrate(config: RunConfig, run_dir: RunDir, models: Models) -> Facts:
    """Score the held-out rows by a teacher as it is, into a store of their own, and fit its temperature to their labels."""
    teacher = config.teacher.model_copy(update={"calibrate": False})
    as_it_is = config.model_copy(update={"teacher": teacher, "loss": HardLabelLoss(kind="hard_label")})  # no row to train on
    scoring = ScoringStage(as_it_is, run_dir, models)
    scoring.fill()
    return calibration_of(ExampleFile(rows_of("teacher", "heldout", run_dir.path)), scoring.heldout_store)


def temperature_of(config: RunConfig, folder: Path) -> float:
    """Return by what the logits of a teacher that classifies are divided in the run of a folder: what was fitted, or 1."""
    if not config.teacher.calibrate:
        return 1.0
    return float(json.loads(result_path(folder, "calibrate").read_text())["temperature"])


@contextmanager
def _telling_followers(stores: list[ScoreStore]) -> Iterator[None]:
    """Should the teacher fail before it scores anything, tell the students that already wait for it."""
    try:
        yield
    except Exception as error:
        for store in stores:
            if not store.complete:
                with suppress(OSError):  # on a full disk the first error matters, not that it could not be written down
                    store.declare_failed(describe_failure(error))
        raise


class ProgressLine:
    """Logs how far the scoring of a split has come, once in a while."""

    def __init__(self, split: Split, run_dir: RunDir, live: TeacherMetrics) -> None:
        self._split, self._run_dir, self._live, self._logged_at = split, run_dir, live, 0.0

    def __call__(self, progress: ScoringProgress) -> None:
        """Take note of one more shard."""
        self._live.progress(progress.shards_done, progress.shards_total, progress.tokens_per_second)
        self._run_dir.event("shard_scored", split=self._split, **asdict(progress))
        done, total = progress.shards_done, progress.shards_total
        line = (
            f"score: {self._split} shard {done}/{total}, {progress.tokens_per_second:,.0f} tokens/s, "
            f"{progress.seconds_left:.0f} s left"
        )
        if done == total or self._is_time():
            log_progress(ProgressSnapshot(done, line, done, total), f"score {self._split}", over=done == total)

    def waits(self, shards: int) -> None:
        """Log that nothing is left here but shards that other jobs score."""
        if self._is_time():
            logger.info(f"score: {self._split} waits for {shards} shards that another job scores")

    def _is_time(self) -> bool:
        """Return whether the last line is long enough ago."""
        if time.monotonic() - self._logged_at <= PROGRESS_SECONDS:
            return False
        self._logged_at = time.monotonic()
        return True
