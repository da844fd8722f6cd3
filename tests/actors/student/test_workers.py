"""The random numbers of a training worker."""

import torch

from actors.student.ranks import Worker
from losses.section import LARGEST_SEED


def drawn(seed: int, step: int, rank: int = 0) -> list[float]:
    Worker(rank, 2, torch.device("cpu")).seed_step(seed, step)
    drawn: list[float] = torch.rand(4).tolist()
    return drawn


def test_a_step_draws_the_same_for_the_same_seed_step_and_rank_and_else_others() -> None:
    assert drawn(3, 7) == drawn(3, 7)
    every = [drawn(seed, step, rank) for seed in (0, 1, LARGEST_SEED) for step in (1, 2, 10**6) for rank in (0, 1)]
    assert len({tuple(numbers) for numbers in every}) == len(every)
