"""What is said of work while it runs."""

import time
from collections.abc import Callable
from itertools import count

import pytest

from orchestrator.cluster.logs import ProgressSnapshot
from orchestrator.cluster.progress import logged_progress
from tests.logs import logged


def wait_for(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_only_news_is_logged_and_nothing_after_the_end() -> None:
    looks, latest = count(), [0]

    def look() -> ProgressSnapshot | None:
        latest[0] = next(looks)
        # Nothing to see at first; then each piece of news twice, the second time in other words.
        return ProgressSnapshot(latest[0] // 2, f"look {latest[0]}", latest[0], 100) if latest[0] > 1 else None

    with logged() as lines:
        with logged_progress("work", look, 0.001):
            wait_for(lambda: latest[0] >= 8)
        seen = len(lines)
        assert lines[:3] == ["look 2", "look 4", "look 6"]
        time.sleep(0.02)
        assert len(lines) == seen


def test_an_error_of_the_work_is_its_own() -> None:
    with pytest.raises(KeyError), logged_progress("work", lambda: None, 10.0):
        raise KeyError("the work")
