"""What is said of work while it goes on."""

import time
from collections.abc import Callable
from itertools import count

import pytest

from orchestrator.run.progress import Sight, progress_lines


def wait_for(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_only_news_is_said_and_nothing_after_the_end() -> None:
    looks, said = count(), list[str]()
    latest = [0]

    def look() -> Sight | None:
        latest[0] = next(looks)
        # Nothing to see at first; then each sight twice, the second time in other words.
        return Sight(latest[0] // 2, f"look {latest[0]}") if latest[0] > 1 else None

    with progress_lines(look, 0.001, said.append):
        wait_for(lambda: latest[0] >= 8)
    seen = len(said)
    assert said[:3] == ["look 2", "look 4", "look 6"]
    time.sleep(0.02)
    assert len(said) == seen


def test_an_error_of_the_work_is_its_own() -> None:
    with pytest.raises(KeyError), progress_lines(lambda: None, 10.0, print):
        raise KeyError("the work")
