"""What the float32 reference may take of memory and time; weighed before any of the teacher's weights is loaded."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from actors.memory import available_memory
from actors.records import Example
from actors.teacher.parity import Probe

MOST_SECONDS = 60.0
"""Of all forward passes together; the replica's devices wait meanwhile."""
ROOM_FOR_A_FORWARD_PASS = 1.2
"""Times the weights."""
PRODUCT = (128, 2048, 8192)
"""[rows, inner, columns] of the product whose speed is measured: a row's tokens, and a matrix that no cache holds."""
TRIES = 3

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a model's forward passes in float32 are."""

    weights: int
    """Of the model; each token multiplies by each of them and adds once."""
    rate: float
    """Floating-point operations a second."""
    where: str
    """What computes, in words."""

    def seconds(self, tokens: int) -> float:
        """Return how long so many tokens take."""
        return 2.0 * self.weights * tokens / self.rate

    def most_tokens(self) -> int:
        """Return how many tokens there is time for."""
        return int(MOST_SECONDS * self.rate / (2.0 * self.weights))

    def why_fewer(self, rows: int, tokens: int, compared: int) -> str:
        """Return in words why so few rows are compared of those that were to be, which take so many tokens."""
        instead = f"{compared} of those with the shortest prompts are compared" if compared else "no row is short enough"
        return (
            f"in float32 the {tokens} tokens of {rows} rows would take {self.seconds(tokens):.0f} s (may {MOST_SECONDS:.0f}; "
            f"{self.weights / 1e9:.1f} billion weights, {self.rate / 1e9:.0f} GFLOP/s on {self.where}), so {instead}"
        )


def pace_of(weights: int, device: str) -> Pace:
    """Return the pace of a model of so many weights on this process's device, from the speed of a product there."""
    threads = torch.get_num_threads()
    cpus = f"{threads} {'thread' if threads == 1 else 'threads'}; teacher.engine.cpus gives more"
    return Pace(weights, product_rate(device), "its GPU" if device == "cuda" else cpus)


def free_memory(device: str) -> int:
    """Return the free bytes of this process's GPU (``cuda``), or those that it may take of its node's memory."""
    return int(torch.cuda.mem_get_info()[0]) if device == "cuda" else available_memory()


def why_no_room(weights: int, device: str) -> str:
    """Return in words why so many weights do not fit in float32; an empty text where they do."""
    wanted, free = 4 * ROOM_FOR_A_FORWARD_PASS * weights, free_memory(device)
    if wanted <= free:
        return ""
    return (
        f"in float32 the teacher takes {wanted / 2**30:.1f} GiB, and its replica finds {free / 2**30:.1f} GiB free "
        f"({'GPU' if device == 'cuda' else 'CPU'})"
    )


def product_rate(device: str, clock: Clock = time.perf_counter) -> float:
    """Return how many floating-point operations a second this process gets out of a product in float32, by trying it."""
    rows, inner, columns = PRODUCT
    left, right = torch.ones(rows, inner, device=device), torch.ones(inner, columns, device=device)
    seconds = []
    for _ in range(1 + TRIES):  # the first, which starts threads and libraries, does not count
        started = clock()
        float((left @ right)[0, 0])  # waits for a GPU
        seconds.append(clock() - started)
    return 2.0 * rows * inner * columns / max(min(seconds[1:]), 1e-9)


def rows_in_time(probe: Probe, most_tokens: int) -> list[Example]:
    """Return the probe's rows if they have no more tokens, else as many of those with the shortest prompts as go in."""
    if sum(len(row.token_ids) for row in probe.rows) <= most_tokens:
        return list(probe.rows)
    chosen: dict[str, Example] = {}
    left = most_tokens
    for row in sorted([*probe.rows, *probe.shorter], key=prompt_length):
        if len(chosen) < len(probe.rows) and row.key not in chosen and len(row.token_ids) <= left:
            chosen[row.key] = row
            left -= len(row.token_ids)
    return list(chosen.values())


def prompt_length(row: Example) -> int:
    """Return how many tokens stand before a row's first target."""
    return int(row.target_positions[0])
