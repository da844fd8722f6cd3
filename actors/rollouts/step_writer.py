"""Writes the rows of training steps: prompts to the samplers, what they write to the teacher, both into the rollout log."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import numpy as np

from actors.dataloader.row_sources import RowSources
from actors.dataloader.sampler import StepSampler, Visits
from actors.examples import ExampleFile
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores
from actors.rollouts.base import Prompt, Response, written_row
from actors.rollouts.mixed_writing import MixedWriters, mixture_logprobs
from actors.rollouts.weights import WeightFolders
from actors.rollouts.workers import RolloutWorkers, Weights, Written
from actors.rollouts.writing import repeated_share
from actors.score_store.rollout_log import RolloutLog, Sampled, poll_seconds

LOOK_SECONDS = 0.5
MOST_UNSCORED = 2
"""Steps that are written and wait for the teacher, before more are written."""


class Teacher(Protocol):
    """Whoever scores rows on demand."""

    def score(self, examples: Sequence[Example]) -> dict[str, TeacherScores]:
        """Return the scores of rows by their keys."""
        ...


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """Which rows the student writes, in which steps, by which weights."""

    examples: ExampleFile
    """The training rows, whose last prompts are answered."""
    sampler: StepSampler
    """Deals them into steps."""
    total_steps: int
    """Optimizer steps of the training; where rows are learned from several times, those of the first time, by which all steps
    here count."""
    sources: RowSources
    """Say which of them the student writes, and by which weights."""
    keep_steps: int | None
    """How many steps' rows stay on disk; None for all."""
    first_model: ModelSource
    """The weights that the student begins with."""
    trust_remote_code: bool = False
    """Whether the model's own code may be run."""
    teacher_share: float = 0.0
    """Probability by which the teacher draws a token of what the student writes."""

    def prompts(self, step: int) -> list[Prompt]:
        """Return what the student is to answer for a step, in the order in which the log has it."""
        chosen = [int(position) for position in self.sampler.positions(step)[self.mask(step)]]
        return [Prompt(self.examples[one].last_prompt, self.examples.row(one), step=step) for one in chosen]

    def mask(self, step: int) -> np.ndarray:
        """Return bool [R], which rows of a step the student writes; once that is decided."""
        return self.sources.of_step(step).written

    def weights_step(self, step: int) -> int:
        """Return after which optimizer step the weights are taken that write the rows of a step."""
        return self.sources.policy.weights_step(step)

    @property
    def visits(self) -> Visits:
        """In which optimizer steps the rows are learned from."""
        return self.sources.policy.visits(self.total_steps)


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What is known of the rows of a step, once they are in the log."""

    step: int
    numbers: dict[str, float]
    """By the names under which they are recorded."""


class StepWriter:
    """Writes the rows of one step after another, as soon as their weights are there.

    While the teacher scores a step the samplers write the next, if its weights are there.
    """

    def __init__(
        self, plan: RolloutPlan, log: RolloutLog, folders: WeightFolders, workers: RolloutWorkers | MixedWriters,
        teacher: Teacher, on_step: Callable[[StepFacts], None],
    ) -> None:  # fmt: skip
        self._plan, self._log, self._folders = plan, log, folders
        self._workers, self._teacher, self._on_step = workers, teacher, on_step
        self._unscored: deque[Future[None]] = deque()

    def run(self, over: threading.Event) -> None:
        """Write all steps that are not in the log yet; return early once ``over`` is set."""
        before: Future[None] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="rollout-scores") as scorer:
            for step in self.missing_steps(self._log, self._plan):
                if not self._await_share(step, over):
                    return
                if not (prompts := self._plan.prompts(step)):
                    continue
                started = time.perf_counter()
                if (weights := self._await_weights(step, over)) is None:
                    if over.is_set():
                        return
                    continue
                waited = time.perf_counter() - started
                written = self._workers.write(weights, prompts)
                before = scorer.submit(self._score, before, step, weights, prompts, written, waited)
                self._unscored.append(before)
                while len(self._unscored) > MOST_UNSCORED:
                    self._unscored.popleft().result()
            while self._unscored:
                self._unscored.popleft().result()
        self._folders.discard_before(self._plan.visits.total_steps)

    @staticmethod
    def missing_steps(log: RolloutLog, plan: RolloutPlan) -> list[int]:
        """Return the steps whose rows are still to be written, or may have to be, ascending."""
        steps = sorted({*range(log.first_kept, plan.total_steps + 1)} - log.steps_there())
        decided = list(takewhile(plan.sources.are_known, steps))
        return [step for step in decided if plan.mask(step).any()] + steps[len(decided) :]

    def _await_share(self, step: int, over: threading.Event) -> bool:
        """Wait until it is decided which rows of a step are to be written; return False if all is over before."""
        while not self._plan.sources.are_known(step):
            if over.wait(poll_seconds(self._plan.sources.policy.shares or "")):
                return False
            self._raise_failures()
        return True

    def _raise_failures(self) -> None:
        """Raise an error of the teacher: it is why the student does not go on."""
        for scored in [one for one in self._unscored if one.done()]:
            scored.result()

    def _await_weights(self, step: int, over: threading.Event) -> Weights | None:
        """Return the weights that write the rows of a step; None where nobody needs them: all is over, or later ones are there.

        A student that resumes beyond a step whose rows were deleted needs these no more, and hands over later weights only.
        """
        wanted = self._plan.weights_step(step)
        if wanted == 0:
            return Weights(0, self._plan.first_model)
        while not self._folders.wait_for(wanted, LOOK_SECONDS):
            if over.is_set() or self._folders.newest() > wanted:
                return None
            self._raise_failures()
        source = ModelSource(self._folders.place(wanted), None, self._plan.trust_remote_code)
        return Weights(wanted, source, self._folders.proof(wanted))

    def _score(
        self, before: Future[None] | None, step: int, weights: Weights, prompts: Sequence[Prompt], written: Written,
        waited_seconds: float,
    ) -> None:  # fmt: skip
        if before is not None:
            before.result()  # after a step that failed none is scored: a gap in the log would pass for steps that were discarded
        started = time.perf_counter()
        rows = [written_row(prompt, response) for prompt, response in zip(prompts, written.responses, strict=True)]
        by_key = self._teacher.score(rows)
        scores = [by_key[row.key] for row in rows]
        score_seconds = time.perf_counter() - started
        pairs = zip(written.responses, scores, strict=True)
        sampled = [sampled_from(response, score, weights.step, self._plan.teacher_share) for response, score in pairs]
        self._log.write(step, rows, scores, sampled)
        self._folders.discard_before(weights.step)  # not sooner: who begins again after a failure writes the step by them
        if self._plan.keep_steps is not None:
            self._log.keep_from(step - self._plan.keep_steps + 1)
        numbers = {
            **numbers_of(written.responses, scores, sampled),
            "student_share": float(self._plan.sources.share(step) or 0.0),
            "staleness_steps": float(self._plan.visits.first_step(step) - 1 - weights.step),
            "sample_seconds": written.seconds,
            "score_seconds": score_seconds,
            "weights_seconds": waited_seconds,
        }
        if (hand_over := written.hand_over) is not None:
            numbers["hand_over_seconds"] = hand_over.seconds
            numbers["hand_over_gap"] = hand_over.mean_gap
            numbers["hand_over_largest_gap"] = hand_over.largest_gap
        self._on_step(StepFacts(step, numbers))


def sampled_from(response: Response, score: TeacherScores, weights_step: int, teacher_share: float) -> Sampled:
    """Return what the log keeps of how a response was drawn."""
    mixed = mixture_logprobs(response.logprobs, score.target_logprob, teacher_share) if teacher_share else None
    return Sampled(response.logprobs, response.ended, weights_step, mixed)


def numbers_of(
    responses: Sequence[Response], scores: Sequence[TeacherScores], sampled: Sequence[Sampled] = ()
) -> dict[str, float]:
    """Return what a step's responses are like; means over tokens are in nats.

    ``reverse_kl`` and ``student_entropy`` are estimates from the tokens that were drawn: exact on average at temperature 1. Of a
    mixture with the teacher each token weighs in them as much as the student draws it more often; ``effective_share`` is how many
    tokens of equal weight would do as well, as a share of those there are.
    """
    lengths = np.array([len(response.token_ids) for response in responses])
    student = np.concatenate([response.logprobs for response in responses]).astype(np.float64)
    teacher = np.concatenate([score.target_logprob for score in scores]).astype(np.float64)
    mixed = [one.drawn_logprobs for one in sampled if one.drawn_logprobs is not None]
    weights = np.exp(student - np.concatenate(mixed)) if mixed else np.ones_like(student)
    effective = {"effective_share": float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))} if mixed else {}
    return effective | {
        "rows": float(len(responses)),
        "tokens": float(lengths.sum()),
        "mean_length": float(lengths.mean()),
        "longest": float(lengths.max()),
        "ended": float(np.mean([response.ended for response in responses])),
        "empty": float(np.mean([response.ended and len(response.token_ids) == 1 for response in responses])),
        "repeated": float(np.mean([repeated_share(response.token_ids) for response in responses])),
        "student_entropy": float(-(weights * student).mean()),
        "teacher_loss": float(-teacher.mean()),
        "reverse_kl": float((weights * (student - teacher)).mean()),
        "uncertainty": float((1 - np.exp(np.minimum(teacher, 0.0))).mean()),
    }
