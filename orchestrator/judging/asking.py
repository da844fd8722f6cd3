"""Asks a judge what is not known yet, several questions at one time, and counts what fails."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Protocol

from actors.config.judge import JudgeConfig
from actors.format import duration
from orchestrator.cluster.logs import ProgressSnapshot
from orchestrator.cluster.progress import logged_progress
from orchestrator.judging.questions import Question
from orchestrator.judging.replies import FailureKind, Reply, Verdict, read_reply
from orchestrator.judging.verdicts import VerdictBook

logger = logging.getLogger("atkd")

PROGRESS_SECONDS = 10.0
EXAMPLE_CHARACTERS = 120


class JudgeFailed(RuntimeError):
    """Too many questions have no verdict."""


class Judge(Protocol):
    """Whoever answers questions; see ``JudgeClient``."""

    def ask(self, text: str) -> Reply:
        """Return the reply to one question."""


@dataclass
class Failures:
    """Questions without a verdict, by kind."""

    counts: dict[FailureKind, int] = field(default_factory=dict)
    examples: dict[FailureKind, str] = field(default_factory=dict)
    """The first of each kind: which question, and the beginning of what came."""
    tokens_in: int = 0
    """Tokens that the judge read for nothing."""
    tokens_out: int = 0
    """Tokens that it wrote for nothing."""

    @property
    def total(self) -> int:
        """How many there are."""
        return sum(self.counts.values())

    def add(self, kind: FailureKind, question: Question, reply: Reply) -> None:
        """Count one."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        text = " ".join(reply.text.split())
        short = text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + "…"
        self.examples.setdefault(kind, f"row {question.row}, {question.model.replace('_', ' ')}: {short or '(nothing)'}")
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out

    def lines(self) -> list[str]:
        """Return a line a kind, with its example."""
        return [f"{count} × {kind}, such as {self.examples[kind]}" for kind, count in self.counts.items()]


@dataclass(frozen=True, slots=True)
class Asked:
    """What asking came to."""

    asked: int
    """Questions that were asked now; the others were known."""
    failures: Failures
    seconds: float


def ask_missing(questions: Sequence[Question], book: VerdictBook, judge: Judge, settings: JudgeConfig) -> Asked:
    """Ask the judge what the book does not know, and write each verdict into it as it comes; equal questions are asked once.

    Raises:
        JudgeFailed: as soon as more questions have failed than ``most_failures`` allows.
        ValueError: if the judge cannot be asked at all.
    """
    missing = {question.key: question for question in questions if book.get(question) is None}
    total, started, failures = len({question.key for question in questions}), time.monotonic(), Failures()
    done = 0

    def look() -> ProgressSnapshot:
        failed = f", {failures.total} without a verdict" if failures.total else ""
        line = f"judge: {done} of {len(missing)} questions{failed}, {duration(time.monotonic() - started)}"
        return ProgressSnapshot(done, line, done, max(len(missing), 1))

    pool = ThreadPoolExecutor(settings.concurrent)
    running: dict[Future[Reply], Question] = {pool.submit(judge.ask, one.text): one for one in missing.values()}
    try:
        with logged_progress("judge", look, PROGRESS_SECONDS):
            for future in as_completed(running):
                question, reply = running[future], future.result()
                verdict = read_reply(reply, settings.protocol)
                if isinstance(verdict, Verdict):
                    book.add(question, verdict, reply)
                else:
                    failures.add(verdict, question, reply)
                    require_few(failures, total, settings)
                done += 1
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # whoever interrupts is not made to wait for replies that are under way
    return Asked(len(missing), failures, time.monotonic() - started)


def require_few(failures: Failures, questions: int, settings: JudgeConfig) -> None:
    """Raise if more questions have failed than may.

    Raises:
        JudgeFailed: with the kinds, an example of each, and what would do.
    """
    if failures.total > settings.most_failures * questions:
        kinds = "\n  ".join(failures.lines())
        raise JudgeFailed(
            f"judge: {failures.total} of {questions} questions are without a verdict, more than evaluate.judge.most_failures "
            f"{settings.most_failures:g} allows:\n  {kinds}\nAnother evaluate.judge.model, a larger max_tokens, timeout_seconds "
            "or retries, fewer concurrent questions, or a larger most_failures would do. Verdicts are kept; the same command "
            "asks the rest."
        )
