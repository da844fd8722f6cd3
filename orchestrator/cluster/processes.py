"""Work on many items in processes of this machine, in the items' order and some at a time."""

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Items that are begun for each process."""


def map_in_order(
    work: Callable[[Item], Result], items: Iterable[Item], processes: int, key: str
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with what the work makes of it; no more items are taken than the processes are kept busy by.

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
        yield from ((item, work(item)) for item in items)
        return
    try:
        sent = pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"{key} is {processes}, but the work cannot be sent to a process ({error}); {key}=1 would do") from error
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin, initargs=(sent,)) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(_do, item)))
                if len(waiting) >= AHEAD * processes:
                    yield _first(waiting)
            while waiting:
                yield _first(waiting)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"a process ended while it worked, as one does that is killed for memory; {key} is {processes}, fewer would do"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _first(waiting: "deque[tuple[Item, Future[Result]]]") -> tuple[Item, Result]:
    item, result = waiting.popleft()
    return item, result.result()


_work: Callable[[Any], Any] | None = None
"""Of a process that was started here."""


def _begin(sent: bytes) -> None:
    global _work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many processes as wanted have a thread each
    _work = pickle.loads(sent)  # of our own making


def _do(item: Any) -> Any:
    assert _work is not None, "_begin comes first"
    return _work(item)
