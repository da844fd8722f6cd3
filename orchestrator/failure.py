"""What a failure means to the user: an exit code, a short message, and where the traceback is."""

import errno
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import transformers
from ray.exceptions import RayTaskError

from actors.rollouts.sampling_actors import WritingFailed
from actors.teacher.replica_set import TeacherFailed
from orchestrator.cluster import signals as sigterm
from orchestrator.cluster.logs import console_logging
from orchestrator.cluster.ray_session import RayFailed
from orchestrator.cluster.redaction import without_private_values
from orchestrator.config.run import RunConfig
from orchestrator.error_log import is_run, write_traceback, write_traceback_elsewhere
from orchestrator.judging.asking import JudgeFailed
from orchestrator.run.run_dir import RunDirError
from orchestrator.run.training import TrainingFailed

PLANNED = (TeacherFailed, WritingFailed, TrainingFailed, RayFailed, JudgeFailed)
"""Failures whose message says all that a user needs."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AGAIN = "the same command resumes where it stopped"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a run that failed ends."""

    exit_code: int
    """1 failed, 2 asked for something that cannot be, 130 interrupted, 143 terminated."""
    message: str
    """A few words for the terminal."""
    says_all: bool = True
    """Whether nobody needs the traceback to know what to do."""


TERMINATED = Verdict(128 + signal.SIGTERM, f"terminated; {AGAIN}")


def classify(error: BaseException) -> Verdict:
    """Return what an exception means to the user; what lies at its root decides."""
    if isinstance(error, KeyboardInterrupt):
        return Verdict(130, f"interrupted; {AGAIN}")
    full = [one for one in roots(error) if isinstance(one, OSError) and one.errno in DISK_FULL]
    if full:
        return Verdict(1, f"the disk is full ({full[0]}): make room; {AGAIN}, nothing written is lost")
    if isinstance(error, RayTaskError):
        return classify(error.cause)
    if isinstance(error, ValueError):
        return Verdict(2, str(error))
    if isinstance(error, PLANNED):
        return Verdict(1, str(error))
    return Verdict(1, f"{type(error).__name__}: {error}", says_all=False)


def roots(error: BaseException) -> list[BaseException]:
    """Return an exception and all that it was raised from, through Ray's wrapping of a worker's exceptions too."""
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        following = following.cause if isinstance(following, RayTaskError) else following.__cause__
    return found


def guarded(config: RunConfig, work: Callable[[], int], level: int = logging.INFO, of_the_run: bool = True) -> int:
    """Do ``work`` with its log on the terminal; return its exit code, or that of the failure that ended it.

    A failure's traceback goes into the run's folder, where the run has begun and the work is ``of_the_run``.
    """
    transformers.utils.logging.disable_progress_bar()
    sigterm.listen()
    try:
        with console_logging(level):
            return work()
    except (Exception, KeyboardInterrupt) as error:
        verdict = TERMINATED if sigterm.received() else classify(error)
        print(f"error: {without_private_values(verdict.message)}", file=sys.stderr)
        if (log := _log(error, verdict, config.run_dir if of_the_run else None)) is not None:
            print(f"the traceback is in {log}", file=sys.stderr)
            if config.mirror is not None:
                with suppress(OSError, ValueError):  # what failed may be the storage
                    config.mirror.sync()
        return verdict.exit_code


def _log(error: BaseException, verdict: Verdict, run_dir: Path | None) -> Path | None:
    """Keep the traceback where the run is, or elsewhere if it is needed; a run that another command holds is not written to."""
    if run_dir is not None and is_run(run_dir) and not isinstance(error, RunDirError):
        return write_traceback(run_dir, error)
    return None if verdict.says_all else write_traceback_elsewhere(error)
