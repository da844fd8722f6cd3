"""Work in a thread of the driver beside its own: neither outlives the other, and the first error is the one that is raised."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE_SECONDS = 3.0


@contextmanager
def in_background(name: str, work: Callable[[], object], stop: Callable[[], None]) -> Iterator[None]:
    """Work while the body runs; leave when both are done. The work's error goes before the body's.

    Args:
        name: of the thread.
        work: what is done there.
        stop: makes it end early, if the body failed.
    """
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception):  # a body that waited for the work fails with it; the work is then about to say why
            thread.join(GRACE_SECONDS)
        if failure:
            raise failure[0] from None
        stop()
        thread.join()
        raise
    thread.join()
    if failure:
        raise failure[0]
