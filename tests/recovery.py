"""How long it takes from some harm until the work goes on; pytest keeps it with the drill, and ``make drills`` prints it."""

import time
from collections.abc import Callable

Record = Callable[[str, object], None]
"""What pytest's ``record_property`` is."""


def record_recovery(record: Record, seconds: float) -> None:
    """Note how many seconds it took."""
    record("recovery_seconds", round(seconds, 1))


def record_until(record: Record, goes_on: Callable[[], bool], most_seconds: float = 400.0) -> None:
    """Wait until the work goes on, from now on, and note the seconds."""
    began = time.monotonic()
    while not goes_on() and time.monotonic() < began + most_seconds:
        time.sleep(0.05)
    record_recovery(record, time.monotonic() - began)
