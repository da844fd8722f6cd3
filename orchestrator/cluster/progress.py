"""Logs how far some work is while it runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.cluster.logs import ProgressSnapshot, log_progress


@contextmanager
def logged_progress(work: str, look: Callable[[], ProgressSnapshot | None], every_seconds: float) -> Iterator[None]:
    """Look every few seconds while the body runs, and log what is new under the name ``work``."""
    over = threading.Event()
    last: ProgressSnapshot | None = None

    def watch() -> None:
        nonlocal last
        while not over.wait(every_seconds):
            if (snapshot := look()) and (last is None or snapshot.news != last.news):
                last = snapshot
                log_progress(snapshot, work)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if last is not None:
            log_progress(last, work, over=True)
