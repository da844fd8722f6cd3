"""Text that student and teacher write together: each token is drawn from the mixture of the two (MiniLLM, arXiv 2306.08543).

A token is drawn from a p + (1 - a) s by a toss for who draws it: the teacher, from p, with probability a, or else the student,
from s. Tosses are known before anything is written, so that the tokens up to the next change of hands are written at once, in
rounds in which both engines go on with each other's texts, all rows beside each other. N tokens of a response.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType

import numpy as np

from actors.rollouts.base import Prompt, Response, Sampling
from actors.rollouts.workers import HandOver, RolloutWorkers, Weights, Written, worst_of

TOSS = 1
"""Ends the seed of tosses for tokens, which would else be that of those for rows."""


def tossed_to_teacher(sampling: Sampling, prompt: Prompt, share: float) -> np.ndarray:
    """Return bool [N], N the most tokens of a response, which of them the teacher draws; each by a toss of its own."""
    entropy = [sampling.seed, prompt.step, prompt.row, prompt.sample, TOSS]
    return np.random.default_rng(entropy).random(sampling.max_new_tokens) < share


def mixture_logprobs(student: np.ndarray, teacher: np.ndarray, share: float) -> np.ndarray:
    """Return the log-probabilities by which tokens were drawn, float32 [N], from those of student and teacher, both [N]."""
    teacher_part = teacher.astype(np.float64) + np.log(share)
    return np.logaddexp(teacher_part, student.astype(np.float64) + np.log1p(-share)).astype(np.float32)


@dataclass
class Draft:
    """A response while it is written."""

    prompt: Prompt
    tossed: np.ndarray
    """bool [N], which tokens the teacher draws."""
    ends: tuple[int, ...]
    """Tokens at which it ends."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """The student's of its own tokens, and of the teacher's once it has read them; till then the teacher's."""

    @property
    def ended(self) -> bool:
        """Whether it has come to an end of its own."""
        return bool(self.token_ids) and self.token_ids[-1] in self.ends

    @property
    def over(self) -> bool:
        """Whether nothing is added to it any more."""
        return self.ended or len(self.token_ids) == len(self.tossed)

    @property
    def waits_for_teacher(self) -> bool:
        """Whether the teacher draws the next token."""
        return bool(self.tossed[len(self.token_ids)])

    @property
    def text(self) -> np.ndarray:
        """int32, prompt and what is there of the response."""
        return np.concatenate([self.prompt.token_ids, np.array(self.token_ids, np.int32)])

    def continued(self) -> Prompt:
        """Return what is to be continued, and by how many tokens: up to the next that the other model draws."""
        done = len(self.token_ids)
        changes = np.flatnonzero(self.tossed[done:] != self.tossed[done])
        most = int(changes[0]) if len(changes) else len(self.tossed) - done
        return replace(self.prompt, token_ids=self.text, written=done, most=most)

    def add(self, response: Response) -> None:
        """Take what was written."""
        self.token_ids += response.token_ids.tolist()
        self.logprobs += response.logprobs.tolist()

    @property
    def has_teachers(self) -> bool:
        """Whether the teacher drew any of its tokens."""
        return bool(self.tossed[: len(self.token_ids)].any())

    def read(self, student_logprobs: np.ndarray) -> None:
        """Take the student's log-probabilities of the teacher's tokens from those of the whole text but its first token."""
        of_response = student_logprobs[-len(self.token_ids) :].tolist()
        by_teacher = self.tossed[: len(self.token_ids)].tolist()
        pairs = zip(self.logprobs, of_response, by_teacher, strict=True)
        self.logprobs = [read if teachers else own for own, read, teachers in pairs]

    def response(self) -> Response:
        """Return it whole."""
        return Response(np.array(self.token_ids, np.int32), np.array(self.logprobs, np.float32), self.ended)


class MixedWriters:
    """Samplers of the student and of the teacher as one. A context manager; it ends both. Stands where ``RolloutWorkers`` do.

    Args:
        student: who writes by the weights of each call.
        teacher: who writes by its own.
        teacher_share: probability by which the teacher draws a token.
    """

    def __init__(self, student: RolloutWorkers, teacher: RolloutWorkers, teacher_share: float) -> None:
        self._student, self._teacher, self._share = student, teacher, teacher_share
        self._teachers_own = Weights(0, teacher.spec.model)
        self._both = ExitStack()

    def __enter__(self) -> "MixedWriters":
        with ExitStack() as entered:
            entered.enter_context(self._student)
            entered.enter_context(self._teacher)
            self._both = entered.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._both.__exit__(kind, error, trace)

    def write(self, weights: Weights, prompts: Sequence[Prompt]) -> Written:
        """Respond to prompts; the log-probabilities of the responses are the student's, of the teacher's tokens too.

        Raises:
            WritingFailed: if a sampler died too often, or raised.
        """
        started = time.perf_counter()
        spec = self._student.spec
        drafts = [Draft(prompt, tossed_to_teacher(spec.sampling, prompt, self._share), spec.ends) for prompt in prompts]
        hand_overs: list[HandOver | None] = []
        with ThreadPoolExecutor(1, thread_name_prefix="teacher-writes") as beside:
            while unfinished := [draft for draft in drafts if not draft.over]:
                hand_overs.append(self._round(weights, unfinished, beside))
        shared = [draft for draft in drafts if draft.has_teachers]
        read = self._student.logprobs(weights, [draft.text for draft in shared])
        for draft, logprobs in zip(shared, read.logprobs, strict=True):
            draft.read(logprobs)
        seconds = time.perf_counter() - started
        return Written([draft.response() for draft in drafts], seconds, worst_of([*hand_overs, read.hand_over]))

    def _round(self, weights: Weights, drafts: Sequence[Draft], beside: ThreadPoolExecutor) -> HandOver | None:
        """Have each draft continued by whose turn it is, both models at one time."""
        teachers = [draft for draft in drafts if draft.waits_for_teacher]
        students = [draft for draft in drafts if not draft.waits_for_teacher]
        by_teacher = beside.submit(continue_drafts, self._teacher, self._teachers_own, teachers)
        by_student = continue_drafts(self._student, weights, students)
        by_teacher.result()
        return by_student


def continue_drafts(workers: RolloutWorkers, weights: Weights, drafts: Sequence[Draft]) -> HandOver | None:
    """Have each draft continued until the other model's turn."""
    if not drafts:
        return None
    written = workers.write(weights, [draft.continued() for draft in drafts])
    for draft, response in zip(drafts, written.responses, strict=True):
        draft.add(response)
    return written.hand_over
