"""The scoring stage of a run: it opens the stores, and fills them before or while the student trains."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from transformers import AutoConfig

from actors.config import needs_teacher
from actors.examples import ExampleFile, write_atomically
from actors.score_store import ScoreStore
from actors.teacher import TeacherSpec
from actors.teacher_pool import TeacherPool
from orchestrator.config import RunConfig
from orchestrator.models import Models
from orchestrator.run_dir import Facts, RunDir
from orchestrator.scoring import ScoringProgress, open_store, pin_revision, score_split, store_identity
from orchestrator.tokenizers import tokenizer_hash

Split = Literal["train", "heldout"]
PROGRESS_SECONDS = 5.0
GRACE_SECONDS = 3.0


class ScoringStage:
    """The score stores of one run, and the teacher that fills them. Made once the teacher is ready."""

    def __init__(self, config: RunConfig, books: RunDir, models: Models) -> None:
        self.config, self.books = config, books
        self._teacher = pin_revision(models.ready("teacher"))
        self._vocab_size = _vocab_size(self._teacher.name, self._teacher.revision, self._teacher.trust_remote_code)
        self._tokenizer_hash = tokenizer_hash(models.tokenizer())
        self.heldout_store = self._open("heldout")
        self.training_store = self._open("train") if needs_teacher(config.loss) else None
        self._pool: TeacherPool | None = None
        pointers = {"heldout": str(self.heldout_store.path)}
        if self.training_store is not None:
            pointers["train"] = str(self.training_store.path)
        write_atomically(books.path / "scores.json", json.dumps(pointers, indent=1).encode())

    def run(self) -> None:
        """Score what is missing; nothing, and no teacher is started, where both stores are complete."""
        self.books.stage("score", self._score)

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Score while the body runs; leave when both are done. The teacher's error goes before the body's."""
        failure: list[BaseException] = []

        def work() -> None:
            try:
                self.run()
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=work, name="scoring", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            # A student whose teacher failed fails with it; the teacher is then about to say why.
            thread.join(GRACE_SECONDS)
            if failure:
                raise failure[0] from None
            if self._pool is not None:
                self._pool.close()
            thread.join()
            raise
        thread.join()
        if failure:
            raise failure[0]

    def _score(self) -> Facts:
        facts: Facts = {}
        stores: list[tuple[Split, ScoreStore]] = [("heldout", self.heldout_store)]
        if self.training_store is not None:
            stores.insert(0, ("train", self.training_store))  # students wait for these
        if all(store.complete for _, store in stores):
            for split, store in stores:
                store.verify()
                self.books.say(f"score: {split} found complete in {store.path}")
            return facts
        self._pool = TeacherPool(self._spec(stores))  # named before it is entered, so that it can be closed while engines start
        with self._pool as pool:
            for split, store in stores:
                summary = score_split(pool, self._examples_path(split), store, self._progress_of(split))
                facts[split] = asdict(summary)
                self.books.say(
                    f"score: {split} complete, {summary.tokens_per_second:,.0f} tokens/s, {summary.bytes_per_target:.0f} bytes a "
                    f"target, {100 * (1 - summary.mean_tail_mass):.3f} % of the teacher's mass held"
                )
        return facts

    def _open(self, split: Split) -> ScoreStore:
        examples = ExampleFile(self._examples_path(split))
        identity = store_identity(self.config, self._teacher, self._tokenizer_hash, examples, self._vocab_size)
        return open_store(self.config, identity, split)

    def _spec(self, stores: list[tuple[Split, ScoreStore]]) -> TeacherSpec:
        return TeacherSpec(
            engine=self.config.teacher.engine,
            model=self._teacher,
            top_k=self.config.scores.top_k,
            longest_row=max(int(ExampleFile(self._examples_path(split)).lengths.max()) for split, _ in stores),
        )

    def _examples_path(self, split: Split) -> Path:
        return self.books.path / "data" / f"{split}.arrow"

    def _progress_of(self, split: Split) -> "ProgressLine":
        return ProgressLine(split, self.books)


class ProgressLine:
    """Says how far the scoring of a split has come, once in a while."""

    def __init__(self, split: Split, books: RunDir) -> None:
        self._split, self._books, self._said = split, books, 0.0

    def __call__(self, progress: ScoringProgress) -> None:
        """Take note of one more shard."""
        self._books.event("shard_scored", split=self._split, **asdict(progress))
        if time.monotonic() - self._said > PROGRESS_SECONDS:
            self._said = time.monotonic()
            self._books.say(
                f"score: {self._split} shard {progress.shards_done}/{progress.shards_total}, "
                f"{progress.tokens_per_second:,.0f} tokens/s, {progress.seconds_left:.0f} s left"
            )


def _vocab_size(name: str, revision: str | None, trust_remote_code: bool) -> int:
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    return int(config.get_text_config().vocab_size)
