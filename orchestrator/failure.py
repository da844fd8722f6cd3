"""What a failure means to the user: an exit code, a short message, and where the whole story stands."""

import errno
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config import RunConfig

AGAIN = "the same command goes on from where it stopped"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a run that failed ends."""

    exit_code: int
    """1 failed, 2 asked for something that cannot be, 130 interrupted."""
    message: str
    """A few words for the terminal."""


def judge(error: BaseException) -> Verdict:
    """Say what an exception means to the user. Ray hands on a worker's exception under its own type and another at once."""
    cause = getattr(error, "cause", None) or error
    if isinstance(error, KeyboardInterrupt):
        return Verdict(130, f"interrupted; {AGAIN}")
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return Verdict(1, f"the disk is full ({cause.filename or 'no file named'}): make room; {AGAIN}, nothing written is lost")
    if isinstance(cause, ValueError):
        return Verdict(2, str(cause))
    return Verdict(1, f"{type(cause).__name__}: {cause}")


def guarded(config: RunConfig, until: str) -> int:
    """Run the pipeline as far as ``until``; return the exit code. A failure's traceback goes into the run's folder."""
    from orchestrator.pipeline import run

    started = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {line}", flush=True)

    try:
        run(config, until, say)
    except (Exception, KeyboardInterrupt) as error:
        verdict = judge(error)
        print(f"error: {verdict.message}", file=sys.stderr)
        if (log := write_traceback(config.run_dir, error)) is not None and verdict.exit_code == 1:
            print(f"the whole story stands in {log}", file=sys.stderr)
        return verdict.exit_code
    return 0


def write_traceback(folder: Path, error: BaseException) -> Path | None:
    """Keep the traceback in the run's folder; None if even that cannot be written."""
    path = folder / "error.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)))
    except OSError:
        return None
    return path
