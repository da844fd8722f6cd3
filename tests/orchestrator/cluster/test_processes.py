import os
import signal
from collections.abc import Iterator
from functools import partial

import pytest

from orchestrator.cluster.processes import AHEAD, map_in_order


def square(number: int, killed_at: int = -1, fails_at: int = -1) -> tuple[int, int]:
    if number == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == fails_at:
        raise ValueError(f"{number} cannot be squared")
    return number**2, os.getpid()


def test_one_process_is_this_one_and_takes_items_one_by_one() -> None:
    items = iter(range(3))
    results = map_in_order(square, items, 1, "data.processes")
    assert next(results) == (0, (0, os.getpid()))
    assert next(items) == 1


def test_several_work_in_order_and_only_so_far_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    results = map_in_order(square, items(), 2, "data.processes")
    first = next(results)
    assert first[0] == 0 and len(taken) == 2 * AHEAD
    rest = list(results)
    assert [(item, squared) for item, (squared, _) in [first, *rest]] == [(number, number**2) for number in range(20)]
    assert os.getpid() not in {process for _, (_, process) in rest}


def test_what_the_work_raises_is_raised_and_the_processes_end() -> None:
    results = map_in_order(partial(square, fails_at=3), range(100), 2, "data.processes")
    with pytest.raises(ValueError, match="3 cannot be squared"):
        list(results)


def test_a_process_that_is_killed_is_told_with_what_would_do() -> None:
    results = map_in_order(partial(square, killed_at=3), range(100), 2, "data.processes")
    with pytest.raises(ChildProcessError, match=r"killed for memory; data\.processes is 2, fewer would do"):
        list(results)


def test_work_that_cannot_be_sent_is_refused() -> None:
    results = map_in_order(lambda number: number, range(3), 2, "data.processes")
    with pytest.raises(ValueError, match=r"data\.processes is 2, but the work cannot be sent .*; data\.processes=1 would do"):
        list(results)
