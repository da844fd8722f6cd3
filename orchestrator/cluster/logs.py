"""Logging: one logger, ``atkd``, whose lines go to the terminal and into the run's folder. Imports neither torch nor Ray.

INFO says how far the work is, WARNING what a user should look into, DEBUG every event of the run. A record with an attribute
``progress`` is one of many about the same work: a terminal draws a bar of it.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from orchestrator.cluster.redaction import without_private_values

logger = logging.getLogger("atkd")
FILE_NAME = "run.log"


class ProgressSnapshot(NamedTuple):
    """How far some work is."""

    news: object
    """What must differ from last time for the line to be worth logging."""
    line: str
    """For the user."""
    done: float
    """Steps, shards or trials that are done."""
    total: float
    """And how many there are."""


def log_progress(snapshot: ProgressSnapshot, work: str, over: bool = False) -> None:
    """Log how far ``work`` is; ``over`` takes its bar from the terminal and logs no line."""
    logger.info(snapshot.line, extra={"progress": snapshot, "work": work, "over": over})


@contextmanager
def console_logging(level: int = logging.INFO) -> Iterator[None]:
    """Show the lines of ``atkd`` from ``level`` on while the body runs: as a bar and lines on a terminal, else as lines."""
    handlers: list[logging.Handler] = [BarHandler(sys.stdout) if sys.stdout.isatty() else LineHandler(sys.stdout)]
    handlers[0].setLevel(level)
    handlers[0].addFilter(lambda record: record.levelno < logging.WARNING)
    handlers.append(LineHandler(sys.stderr))
    handlers[1].setLevel(logging.WARNING)
    formatter = _SecondsFormatter()
    before = logger.level, logger.propagate
    logger.setLevel(min(level, logging.INFO))  # the run's own file holds INFO whatever the terminal shows
    logger.propagate = False
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.level, logger.propagate = before
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


@contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """Put ``prefix:`` before every line that is logged while the body runs."""

    def put(record: logging.LogRecord) -> bool:
        record.msg = f"{prefix}: {record.msg}"
        return True

    logger.addFilter(put)
    try:
        yield
    finally:
        logger.removeFilter(put)


def open_log_file(folder: Path) -> logging.Handler:
    """Append the lines of ``atkd`` to ``run.log`` in a folder until the handler is closed by ``close_log_file``."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    handler = _RunLog(folder / FILE_NAME, encoding="utf-8", delay=True)
    handler.setFormatter(_TimesFormatter())
    handler.addFilter(_is_line)
    logger.addHandler(handler)
    return handler


def close_log_file(handler: logging.Handler) -> None:
    """End what ``open_log_file`` began."""
    logger.removeHandler(handler)
    with suppress(OSError):  # of a full disk the run itself tells
        handler.close()


class LineHandler(logging.StreamHandler[TextIO]):
    """A line for each record."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.addFilter(_is_line)


class BarHandler(logging.Handler):
    """Lines above, and below them a bar for each work under way."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._console = Console(file=stream)
        columns = (BarColumn(24), TextColumn("{task.percentage:3.0f} %"), TextColumn("{task.description}"), TimeElapsedColumn())
        self._bars = Progress(*columns, console=self._console, transient=True)
        self._tasks: dict[str, TaskID] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Draw a record."""
        snapshot: ProgressSnapshot | None = getattr(record, "progress", None)
        if snapshot is None:
            self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)
        elif record.over:  # type: ignore[attr-defined]
            self._remove(record.work)  # type: ignore[attr-defined]
        else:
            self._draw(record.work, snapshot, record.getMessage())  # type: ignore[attr-defined]

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bars.stop()
        super().close()

    def _draw(self, work: str, snapshot: ProgressSnapshot, line: str) -> None:
        if work not in self._tasks:
            self._bars.start()
            self._tasks[work] = self._bars.add_task("")
        text = line.replace("[", r"\[")
        self._bars.update(self._tasks[work], completed=snapshot.done, total=snapshot.total, description=text)

    def _remove(self, work: str) -> None:
        if (task := self._tasks.pop(work, None)) is not None:
            self._bars.remove_task(task)
        if not self._tasks:
            self._bars.stop()


class _RunLog(logging.FileHandler):
    """A file whose disk may be full or gone: what the run itself meets there is told, not this."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's own name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _SecondsFormatter(logging.Formatter):
    """``[  12.3 s] line``, in seconds since the formatter was made."""

    def __init__(self) -> None:
        super().__init__()
        self._started = time.time()

    def format(self, record: logging.LogRecord) -> str:
        word = f"{record.levelname.lower()}: " if record.levelno != logging.INFO else ""
        return f"[{record.created - self._started:6.1f} s] {word}{record.getMessage()}"


class _TimesFormatter(logging.Formatter):
    """``2026-01-31T12:00:00Z INFO line``, without the values of secrets."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        return f"{moment} {record.levelname} {without_private_values(record.getMessage())}"


def _is_line(record: logging.LogRecord) -> bool:
    return not getattr(record, "over", False)
