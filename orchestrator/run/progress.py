"""Lines that say how far something is while it goes on."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Sight(NamedTuple):
    """What a look at the work finds."""

    news: object
    """What must differ from last time for the line to be worth saying."""
    line: str
    """For the user."""


@contextmanager
def progress_lines(look: Callable[[], Sight | None], every_seconds: float, say: Callable[[str], None]) -> Iterator[None]:
    """Look every few seconds while the body runs, and say what is new."""
    over = threading.Event()

    def watch() -> None:
        told: object = None
        while not over.wait(every_seconds):
            if (sight := look()) and sight.news != told:
                told = sight.news
                say(sight.line)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
