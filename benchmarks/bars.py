"""What all benchmarks share: fair timing, peak memory, tables and bars."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Bar:
    """A measured number and the bound it should keep."""

    name: str
    measured: float
    wanted: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the bound is kept."""
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "met" if self.met else "missed"
        return f"bar {self.name} measured {self.measured:.3g} wanted {sign}{self.wanted:g} {verdict}"


def report(bars: Sequence[Bar]) -> int:
    """Print a line for each bar; return the exit status, 1 if one is missed."""
    print()
    for bar in bars:
        print(bar)
    return 0 if all(bar.met for bar in bars) else 1


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown, its columns aligned."""
    widths = [max(len(line[index]) for line in [columns, *rows]) for index in range(len(columns))]
    rule = ["-" * width for width in widths]
    for line in [columns, rule, *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |", flush=True)


def alternating_seconds(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time tasks in turn, after one round that does not count, so that what slows the machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            synchronize()
            started = time.perf_counter()
            task()
            synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """Return the median over rounds of one task's time over the other's in the same round."""
    return statistics.median(ours / theirs for ours, theirs in zip(seconds, baseline, strict=True))


def synchronize() -> None:
    """Wait for an accelerator to finish, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(task: Callable[[], object]) -> int:
    """Return by how many bytes tensors exceeded, at the worst moment, what there was before."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        task()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return peak_of_trace(trace)


def peak_of_trace(trace: Path) -> int:
    """Return the largest sum of allocations less frees in a profiler's trace."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = largest = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += int(event["args"]["Bytes"])
        largest = max(largest, held)
    return largest
