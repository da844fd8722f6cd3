"""Work on many items in processes of this machine, or in Ray tasks on all nodes, in the items' order and some at a time."""

import os
import pickle
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context
from typing import Any, TypeVar

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayTaskError, WorkerCrashedError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Items that are begun for each process."""

GONE = (WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError)
"""How Ray tells that a task's process or node ended, and that it has begun the task as often as it does."""

ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false"}
"""Environment of processes and tasks: as many as wanted have a thread each."""


def map_in_processes(work: Callable[[Item], Result], items: Iterable[Item], processes: int, key: str) -> Generator[Result]:
    """Yield what the work makes of each item; no more items are taken than the processes are kept busy by.

    Args:
        work: sent to each process once; what it raises is raised here.
        items: each is sent to a process.
        processes: how many there are; with one the work is done here.
        key: of the configuration, that says how many, for errors.

    Raises:
        ValueError: if the work cannot be sent.
        ChildProcessError: if a process ends by itself, for which a lack of memory is the usual reason.
    """
    if processes == 1:
        yield from map(work, items)
        return
    try:
        sent = pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"{key} is {processes}, but the work cannot be sent to a process ({error}); {key}=1 would do") from error
    waiting: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin, initargs=(sent,)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(_do, item))
                if len(waiting) >= AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"a process ended while it worked, as one does that is killed for memory; {key} is {processes}, fewer would do"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def map_on_cluster(work: Callable[[Item], Result], items: Iterable[Item], tasks: int, key: str) -> Generator[Result]:
    """Yield what the work makes of each item, in Ray tasks of one CPU on whichever nodes have room; Ray is connected.

    A task whose node or process is lost is begun again elsewhere.

    Args:
        work: sent to each process once; what it raises is raised here.
        items: each is sent to a task.
        tasks: most that are begun at one time, those that wait for a CPU among them.
        key: of the configuration, that says how many, for errors.

    Raises:
        ValueError: if no node has a CPU, as the cluster says.
        ChildProcessError: if a task's process ends by itself again and again, for which a lack of memory is the usual reason.
    """
    if ray.cluster_resources().get("CPU", 0) < 1:
        raise ValueError(f"{key} is {tasks}, but no node of the cluster offers a CPU; {key}=null would do")
    do = ray.remote(_do_on_cluster).options(num_cpus=1, name=key, runtime_env={"env_vars": ONE_THREAD})
    sent, waiting = ray.put(work), deque[ray.ObjectRef]()
    try:
        for item in items:
            waiting.append(do.remote([sent], item))
            if len(waiting) >= tasks:
                yield _result(waiting, key)
        while waiting:
            yield _result(waiting, key)
    finally:
        for task in waiting if ray.is_initialized() else ():  # to cancel one would begin a Ray
            ray.cancel(task, force=True)


def _result(waiting: "deque[ray.ObjectRef]", key: str) -> Any:
    try:
        return ray.get(waiting.popleft())
    except RayTaskError as error:
        raise error.cause from error
    except GONE as error:
        raise ChildProcessError(
            f"the process of a task ended again and again while it worked, as one does that is killed for memory ({key})"
        ) from error


def _do_on_cluster(sent: list[ray.ObjectRef], item: Any) -> Any:
    return _work_of(sent[0])(item)


@lru_cache(maxsize=1)
def _work_of(sent: ray.ObjectRef) -> Callable[[Any], Any]:
    """Return the work of a process that Ray started: it is fetched for the first of its tasks."""
    work: Callable[[Any], Any] = ray.get(sent)
    return work


_work: Callable[[Any], Any] | None = None
"""Of a process that was started here."""


def _begin(sent: bytes) -> None:
    global _work
    os.environ.update(ONE_THREAD)
    _work = pickle.loads(sent)  # of our own making


def _do(item: Any) -> Any:
    assert _work is not None, "_begin comes first"
    return _work(item)
