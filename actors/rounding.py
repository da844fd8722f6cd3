"""Weights in fewer bits than they were trained in, without losing what training changed.

Rounding to the nearest number undoes updates that are smaller than half the distance to the next one: in bfloat16 nearly all of
the first steps. Stochastic rounding (arXiv 2010.06192) takes the number above or below with the chances that make the mean right,
so that what many weights gained stays in their sums, which is what the next layer sees.
"""

import torch
from torch import Tensor

DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of float32's mantissa that a type has not."""
DRAWN = 262_139
"""Numbers that are drawn for a tensor; a prime, so that no row of a matrix meets the draws of the row above."""


def rounded(weights: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return weights in another type; those that it holds exactly are unchanged, and drawn for are the others.

    Weights ``DRAWN`` places from each other share a draw: each goes its way with the right chances all the same, and the drawing
    costs nothing beside the copying.

    Args:
        weights: on the CPU; only float32 is rounded stochastically.
        dtype: bfloat16 and float16 are drawn for, float16 below its normal numbers is rounded to the nearest.
        generator: draws which way.
    """
    bits = DROPPED_BITS.get(dtype)
    if bits is None or weights.dtype != torch.float32:
        return weights.to(dtype)
    found = torch.empty(weights.shape, dtype=dtype)
    patterns, taken = weights.contiguous().view(-1).view(torch.int32), found.view(-1)
    draws = torch.randint(1 << bits, (min(DRAWN, len(patterns)),), dtype=torch.int32, generator=generator)
    sums = torch.empty_like(draws)
    for start in range(0, len(patterns), DRAWN):
        some = patterns[start : start + DRAWN]
        sum_ = torch.add(some, draws[: len(some)], out=sums[: len(some)])
        taken[start : start + DRAWN].copy_(sum_.bitwise_and_(-(1 << bits)).view(torch.float32))  # towards zero, after the draw
    return found


def generator_of(*numbers: int) -> torch.Generator:
    """Return a generator on the CPU that some numbers, such as a seed and a step, make."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % (1 << 63)
    return torch.Generator().manual_seed(seed)
