"""How much memory this process may take: what the machine has, and what the limit of its container leaves of that.

A container sees the memory of the whole machine. Its limit, beyond which the kernel ends its processes, stands in the files of
its control group, version 1 or 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The limit of one control group. Bytes."""

    most: int
    """What its processes may hold together."""
    held: int
    """What they hold now; what the kernel would drop of its file cache before it ends a process is not counted."""


def available_memory(root: Path = ROOT) -> int:
    """Return how many bytes this process can still take: free on the machine, and within every limit around it.

    ``root`` is the folder in which ``proc`` and ``sys`` stand.
    """
    free = int(psutil.virtual_memory().available)
    return max(0, min([free, *(limit.most - limit.held for limit in memory_limits(root))]))


def total_memory(root: Path = ROOT) -> int:
    """Return how many bytes this process and those beside it may hold: the machine's, or the least limit around them."""
    return min([int(psutil.virtual_memory().total), *(limit.most for limit in memory_limits(root))])


def memory_limits(root: Path = ROOT) -> list[MemoryLimit]:
    """Return the limits of the control groups that this process is in; none where nothing limits it, or nothing can be read."""
    limits = []
    for folder, most, held, cache in _groups(root):
        try:
            limit = MemoryLimit(int((folder / most).read_text()), int((folder / held).read_text()) - _cache(folder, cache))
        except (OSError, ValueError):  # version 2 writes "max" where there is no limit, and has no file at its root
            continue
        limits.append(limit)
    return limits


def _groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Yield the folder of each group, with the names of its files: the limit, what is held, and the cache within its statistics.

    A group and those around it limit the process. Within a container the outermost folder that is to be seen is its own.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = root / "sys/fs/cgroup"
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder, *names
            if folder == base:
                break


def _cache(folder: Path, name: str) -> int:
    for line in (folder / "memory.stat").read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
