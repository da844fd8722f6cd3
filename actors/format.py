"""Numbers as people write them.

It stands among the actors because placement counts in words too, and all that does so in the orchestrator stands above it.
"""

MIB, GIB = 2**20, 2**30


def plural(count: int, noun: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    """Write bytes."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB)):
        if count >= 0.1 * factor:
            return f"{count / factor:,.2f} {unit}" if count < 10 * factor else f"{count / factor:,.0f} {unit}"
    return f"{count / 1024:,.1f} KiB"


def duration(seconds: float | None) -> str:
    """Write a time: seconds below two minutes, minutes below two hours, hours above; a dash where it is not known."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def percent(share: float) -> str:
    """Return a share such as ``12.3 %``, a tiny one with two digits: ``0.042 %``."""
    number = f"{100 * share:.1f}" if share >= 0.001 else f"{100 * share:.2g}"
    return f"{number}\u00a0%"
