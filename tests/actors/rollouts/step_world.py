"""A training whose rows a student writes, with samplers and a teacher that answer at once; log and weights are real."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from actors.dataloader.row_sources import RowPolicy, RowSources, steps_written_by, written_by_student
from actors.dataloader.sampler import StepSampler
from actors.examples import ExampleFile, write_examples
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores, example_key
from actors.rollouts.base import Prompt, Response
from actors.rollouts.step_writer import RolloutPlan, StepFacts, StepWriter
from actors.rollouts.weights import Proof, WeightFolders
from actors.rollouts.workers import HandOver, Weights, Written
from actors.score_store.rollout_log import RolloutLog
from tests.fakes import FAKE_VOCAB, expected_scores

ROWS, BATCH, STEPS, TOP_K, SEED = 10, 4, 8, 5, 2
IDENTITY = {"top_k": TOP_K, "vocab_size": FAKE_VOCAB}
FIRST = ModelSource("the-student-as-it-begins", None, False)
PATIENCE_SECONDS = 120.0
ALL_AT_ONCE = 1000
"""Steps of a window that is longer than the training, so that nobody waits for weights."""


def conversations(rows: int) -> list[Example]:
    """Rows of which every second has two answers."""
    generator, examples = np.random.default_rng(0), []
    for row in range(rows):
        token_ids = generator.integers(0, FAKE_VOCAB, 14).astype(np.int32)
        mask = np.arange(14) >= 9 + row % 3
        if row % 2:
            mask[2:5] = True
        examples.append(Example(token_ids, mask, example_key(token_ids, mask), 100 + row))
    return examples


def answer(prompt: Prompt, weights: int) -> Response:
    """What the fake samplers write, by these weights, to a prompt."""
    generator = np.random.default_rng([prompt.step, prompt.row, weights])
    count = int(generator.integers(1, 6))
    logprobs = -generator.exponential(2, count).astype(np.float32)
    return Response(generator.integers(0, FAKE_VOCAB, count).astype(np.int32), logprobs, bool(count % 2))


@dataclass
class Samplers:
    """Answers at once; stands where ``RolloutWorkers`` do."""

    on_write: Callable[[int], None] = lambda step: None
    calls: list[tuple[Weights, list[Prompt]]] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        return [prompts[0].step for _, prompts in self.calls]

    def write(self, weights: Weights, prompts: Sequence[Prompt]) -> Written:
        assert len({prompt.step for prompt in prompts}) == 1
        self.on_write(prompts[0].step)
        self.calls.append((weights, list(prompts)))
        return Written([answer(prompt, weights.step) for prompt in prompts], 0.25, HandOver(0.5, 0.001, 0.002))


@dataclass
class Teacher:
    """Scores rows as they come; fails at the call that it is told to."""

    fails_on_call: int = 0
    before: Callable[[int], None] = lambda call: None
    calls: list[list[str]] = field(default_factory=list)

    def score(self, examples: Sequence[Example]) -> dict[str, TeacherScores]:
        self.calls.append([example.key for example in examples])
        self.before(len(self.calls))
        if len(self.calls) == self.fails_on_call:
            raise RuntimeError(f"the teacher fails on call {self.fails_on_call}")
        return {example.key: expected_scores(example, TOP_K) for example in examples}


@dataclass
class World:
    """A training of some steps, its log and its weights."""

    plan: RolloutPlan
    log: RolloutLog
    folders: WeightFolders
    facts: list[StepFacts] = field(default_factory=list)

    def writer(self, samplers: Samplers, teacher: Teacher) -> StepWriter:
        return StepWriter(self.plan, self.log, self.folders, samplers, teacher, self.facts.append)  # type: ignore[arg-type]

    def run(self, samplers: Samplers, teacher: Teacher) -> None:
        with self.running(samplers, teacher):
            pass

    @contextmanager
    def running(self, samplers: Samplers, teacher: Teacher) -> Iterator[threading.Event]:
        """Run a writer beside the body; leave, with its error, once it has ended."""
        over, writer = threading.Event(), self.writer(samplers, teacher)
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(writer.run, over)
            try:
                yield over
                running.result(PATIENCE_SECONDS)
            finally:
                over.set()

    def publish(self, weights: int) -> None:
        """Leave the weights after a step, as the student does."""

        def save(folder: Path) -> None:
            folder.mkdir()
            proof_of(weights).write(folder)

        self.folders.write(weights, save)

    def train(self) -> None:
        """Follow the log as a student does, and publish the weights that somebody waits for."""
        for step in range(1, self.plan.total_steps + 1):
            if self.plan.prompts(step):
                self.log.wait_for(step, PATIENCE_SECONDS)
            policy = self.plan.sources.policy
            if steps_written_by(step, policy.refresh_steps, policy.lag, self.plan.total_steps):
                self.publish(step)

    def there(self) -> list[int]:
        return [step for step in range(1, self.plan.total_steps + 1) if self.log.is_there(step)]

    def missing(self) -> list[int]:
        return StepWriter.missing_steps(self.log, self.plan)


def proof_of(weights: int) -> Proof:
    return Proof(np.arange(3, dtype=np.int32), np.full(2, -weights, np.float32))


def world_in(
    folder: Path, refresh_steps: int = 1, lag: int = 0, share: float = 0.9, keep_steps: int | None = None, steps: int = STEPS
) -> World:
    write_examples(folder / "train.arrow", conversations(ROWS))
    sampler, policy = StepSampler(ROWS, BATCH, SEED, store_order_first=False), RowPolicy(share, refresh_steps, lag)
    plan = RolloutPlan(
        examples=ExampleFile(folder / "train.arrow"),
        sampler=sampler,
        total_steps=steps,
        sources=RowSources(policy, SEED, sampler.rows_of, steps),
        keep_steps=keep_steps,
        first_model=FIRST,
        trust_remote_code=True,
    )
    return World(plan, RolloutLog.open_or_create(folder / "log", IDENTITY, steps, BATCH), WeightFolders(folder / "weights"))


def with_rows(plan: RolloutPlan) -> list[int]:
    """Steps in which the student writes a row."""
    rows = [len(plan.sampler.positions(step)) for step in range(1, plan.total_steps + 1)]
    share = plan.sources.policy.student_share
    return [step for step, count in enumerate(rows, start=1) if written_by_student(SEED, step, count, share).any()]
