"""SIGTERM, which ``ray job stop``, Slurm and Kubernetes send, is a Ctrl-C with another exit code.

Ray must not have the handling of it. Its own handler prints the frames of C++, ends the process by force three seconds later, and
leaves Ray Train's actors to find out for themselves. So ours is put back once Ray stands, and does what Ctrl-C does.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_received = threading.Event()


def listen() -> None:
    """From now on let SIGTERM raise a KeyboardInterrupt where this process stands; only its main thread can ask for that."""
    if threading.current_thread() is threading.main_thread():
        _received.clear()
        signal.signal(signal.SIGTERM, _end)


def received() -> bool:
    """Whether SIGTERM came since this process listens; whatever is raised then is raised because of it."""
    return _received.is_set()


@contextmanager
def listening_on() -> Iterator[None]:
    """Put our handler back, if there was one, after a body that sets another, which raises a SystemExit meanwhile."""
    ours = signal.getsignal(signal.SIGTERM) is _end
    try:
        yield
    except SystemExit:
        if not ours:
            raise
        _received.set()
        raise KeyboardInterrupt from None
    finally:
        if ours and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    _received.set()
    interrupt = signal.getsignal(signal.SIGINT)  # Ray Train's, while it trains: it ends its actors; a job has the signal blocked
    if callable(interrupt):
        interrupt(signal.SIGINT, frame)
    raise KeyboardInterrupt
