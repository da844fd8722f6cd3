import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

from orchestrator.cluster import processes
from orchestrator.cluster.processes import AHEAD, map_in_processes, map_on_cluster


def square(number: int, killed_at: int = -1, fails_at: int = -1) -> tuple[int, int]:
    if number == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == fails_at:
        raise ValueError(f"{number} cannot be squared")
    return number**2, os.getpid()


def test_one_process_is_this_one_and_takes_items_one_by_one() -> None:
    items = iter(range(3))
    results = map_in_processes(square, items, 1, "data.processes")
    assert next(results) == (0, os.getpid())
    assert next(items) == 1


def test_several_work_in_order_and_only_so_far_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    results = map_in_processes(square, items(), 2, "data.processes")
    first = next(results)
    assert first[0] == 0 and len(taken) == 2 * AHEAD
    rest = list(results)
    assert [squared for squared, _ in [first, *rest]] == [number**2 for number in range(20)]
    assert os.getpid() not in {process for _, process in rest}


def test_what_the_work_raises_is_raised_and_the_processes_end() -> None:
    results = map_in_processes(partial(square, fails_at=3), range(100), 2, "data.processes")
    with pytest.raises(ValueError, match="3 cannot be squared"):
        list(results)


def test_a_process_that_is_killed_is_told_with_what_would_do() -> None:
    results = map_in_processes(partial(square, killed_at=3), range(100), 2, "data.processes")
    with pytest.raises(ChildProcessError, match=r"killed for memory; data\.processes is 2, fewer would do"):
        list(results)


def test_work_that_cannot_be_sent_is_refused() -> None:
    results = map_in_processes(lambda number: number, range(3), 2, "data.processes")
    with pytest.raises(ValueError, match=r"data\.processes is 2, but the work cannot be sent .*; data\.processes=1 would do"):
        list(results)


def in_two_runs(number: int, marks: Path, killed_at: int, times: int) -> int:
    """Square a number; the process of one of them is killed so many times before."""
    tries = len(list(marks.iterdir()))
    if number == killed_at and tries < times:
        (marks / str(tries)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


@pytest.mark.ray
def test_the_cluster_works_in_order_and_only_so_far_ahead(local_ray: None) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(12):
            taken.append(number)
            yield number

    results = map_on_cluster(square, items(), 3, "data.cluster_tasks")
    first = next(results)
    assert first[0] == 0 and len(taken) == 3
    rest = list(results)
    assert [squared for squared, _ in [first, *rest]] == [number**2 for number in range(12)]
    assert os.getpid() not in {process for _, process in rest}


@pytest.mark.ray
def test_work_that_is_no_function_of_a_module_is_sent_to_the_cluster_too(local_ray: None) -> None:
    assert list(map_on_cluster(lambda number: number + 1, range(3), 2, "data.cluster_tasks")) == [1, 2, 3]


@pytest.mark.ray
def test_work_is_fetched_once_a_process_and_each_call_has_its_own(local_ray: None) -> None:
    for power in (2, 3):
        raised = map_on_cluster(partial(pow, exp=power), range(5), 2, "data.cluster_tasks")
        assert list(raised) == [number**power for number in range(5)]


@pytest.mark.ray
def test_what_the_work_raises_on_the_cluster_is_raised_as_it_was(local_ray: None) -> None:
    results = map_on_cluster(partial(square, fails_at=3), range(100), 2, "data.cluster_tasks")
    with pytest.raises(ValueError, match="^3 cannot be squared$") as raised:
        list(results)
    assert type(raised.value) is ValueError


@pytest.mark.ray
def test_a_task_that_is_lost_is_done_again(local_ray: None, tmp_path: Path) -> None:
    work = partial(in_two_runs, marks=tmp_path, killed_at=3, times=2)
    assert list(map_on_cluster(work, range(8), 2, "data.cluster_tasks")) == [number**2 for number in range(8)]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.ray
@pytest.mark.slow
def test_a_task_that_is_killed_again_and_again_is_told(local_ray: None, tmp_path: Path) -> None:
    work = partial(in_two_runs, marks=tmp_path, killed_at=3, times=100)
    with pytest.raises(ChildProcessError, match=r"ended again and again .* killed for memory \(data\.cluster_tasks\)"):
        list(map_on_cluster(work, range(8), 2, "data.cluster_tasks"))


@pytest.mark.parametrize(
    "gone", [WorkerCrashedError(), OutOfMemoryError("of memory"), NodeDiedError("a node died"), ObjectLostError("00", None, "")]
)
def test_however_ray_says_that_a_task_is_gone_it_is_told_in_words(gone: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(task: object) -> None:
        raise gone

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(ChildProcessError, match=r"ended again and again .* killed for memory \(data\.cluster_tasks\)"):
        processes._result(deque([None]), "data.cluster_tasks")  # type: ignore[list-item]


@pytest.mark.ray
def test_who_stops_early_leaves_no_task_behind(local_ray: None) -> None:
    results = map_on_cluster(slow_but_the_first, range(50), 3, "data.cluster_tasks")
    assert next(results) == 0
    results.close()
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0.0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "they work for ten minutes"
        time.sleep(0.2)


def slow_but_the_first(number: int) -> int:
    time.sleep(600.0 if number else 0.0)
    return number


def test_a_cluster_without_cpus_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 8.0})
    with pytest.raises(ValueError, match=r"data\.cluster_tasks is 2, but no node .* offers a CPU; .*=null would do"):
        next(map_on_cluster(square, range(3), 2, "data.cluster_tasks"))
