"""Stochastic rounding: exact numbers stay, means are kept, and small updates are not lost."""

import math

import pytest
import torch

from actors.rounding import generator_of, rounded

TYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
def test_each_weight_is_one_of_its_two_neighbours(dtype: torch.dtype) -> None:
    weights = torch.randn(10_000, generator=generator_of(1)).clamp(-4, 4)
    weights = torch.where(weights.abs() < 1e-3, weights + 0.01, weights)  # float16 has other steps below its normal numbers
    nearest = weights.to(dtype)
    towards = torch.where(weights > nearest.float(), math.inf, -math.inf).to(dtype)
    other = torch.where(weights == nearest.float(), nearest, torch.nextafter(nearest, towards))
    found = rounded(weights, dtype, generator_of(2))
    assert found.dtype == dtype and ((found == nearest) | (found == other)).all()
    assert 0.1 < (found != nearest).float().mean() < 0.4, "a quarter goes the longer way"


@pytest.mark.parametrize("dtype", TYPES)
def test_the_mean_of_many_is_the_weight_itself(dtype: torch.dtype) -> None:
    for weight in (0.1, -0.3, 1 + 1e-4, 3.14159):
        many = rounded(torch.full((200_000,), weight), dtype, generator_of(3)).double()
        spread = float(many.std()) / math.sqrt(len(many))
        assert float(many.mean()) == pytest.approx(torch.tensor(weight).item(), abs=5 * spread + 1e-12)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float32])
def test_what_a_type_holds_exactly_is_unchanged(dtype: torch.dtype) -> None:
    weights = torch.randn(1000, generator=generator_of(4)).to(dtype).float()
    weights[:4] = torch.tensor([0.0, -0.0, math.inf, -math.inf])
    assert torch.equal(rounded(weights, dtype, generator_of(5)).float(), weights)
    assert rounded(torch.tensor([math.nan]), dtype, generator_of(6)).isnan().all()


def test_an_update_that_rounding_to_the_nearest_undoes_is_seen_by_the_next_layer() -> None:
    before = torch.randn(64, 4096, generator=generator_of(7)).bfloat16().float() / 64
    after = before + 5e-6 * torch.ones_like(before).sign()
    seen = torch.ones(4096)
    change = (after - before) @ seen
    nearest = (after.bfloat16().float() - before) @ seen
    drawn = (rounded(after, torch.bfloat16, generator_of(8)).float() - before) @ seen
    assert float((nearest - change).abs().mean()) > 3 * float((drawn - change).abs().mean())


def test_the_same_numbers_round_alike() -> None:
    weights = torch.randn(1000, generator=generator_of(9))
    first, second, other = (rounded(weights, torch.bfloat16, generator_of(0, step)) for step in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
