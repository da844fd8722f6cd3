"""Which tokens are easy, and what each token weighs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.config import (
    AtkdLoss,
    CoupledLoss,
    DecoupledLoss,
    DiversityOnlyLoss,
    HardLabelLoss,
    LossConfig,
    TargetOnlyLoss,
)
from losses.divergence_config import ReverseKL
from losses.token_weights import TokenWeights, easy_border, split_easy, token_weights
from tests.reference import formulas


def atkd(**settings: Any) -> AtkdLoss:
    return AtkdLoss(kind="atkd", **settings)


@pytest.mark.parametrize(("count", "easy_count"), [(0, 0), (1, 0), (2, 1), (3, 2), (5, 2), (7, 4), (10, 5)])
def test_half_of_the_tokens_are_easy_and_a_half_rounds_to_even(count: int, easy_count: int) -> None:
    uncertainty = torch.linspace(0.9, 0.1, count)
    easy = split_easy(uncertainty, atkd(), seed=0)
    assert easy.dtype == torch.bool and easy.shape == (count,)
    assert int(easy.sum()) == easy_count
    assert not easy[: count - easy_count].any(), "the last are the surest here"


@pytest.mark.parametrize(("easy_ratio", "easy_count"), [(0.0, 0), (0.1, 1), (0.3, 3), (0.77, 8), (1.0, 10)])
def test_any_share_of_the_tokens_can_be_easy(easy_ratio: float, easy_count: int) -> None:
    uncertainty = torch.rand(10, generator=torch.Generator().manual_seed(0))
    easy = split_easy(uncertainty, atkd(easy_ratio=easy_ratio), seed=0)
    assert set(easy.nonzero().flatten().tolist()) == formulas.easy_tokens(uncertainty.tolist(), easy_ratio)
    assert int(easy.sum()) == easy_count


@pytest.mark.parametrize("scope", ["batch", "dataset"])
def test_ties_go_to_the_earlier_position(scope: str) -> None:
    tied = torch.tensor([0.5, 0.2, 0.2, 0.2, 0.2, 0.1])
    assert split_easy(tied, atkd(scope=scope), seed=0).tolist() == [False, True, True, False, False, True]
    all_tied = torch.full((1000,), 0.25)
    assert split_easy(all_tied, atkd(scope=scope), seed=0).tolist() == [True] * 500 + [False] * 500


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0]), max_size=30), st.floats(0, 1))
def test_the_split_of_any_tokens(values: list[float], easy_ratio: float) -> None:
    uncertainty = torch.tensor(values, dtype=torch.float64)
    easy = split_easy(uncertainty, atkd(easy_ratio=easy_ratio), seed=0)
    assert set(easy.nonzero().flatten().tolist()) == formulas.easy_tokens(values, easy_ratio)
    if values:
        easy = split_easy(uncertainty, atkd(scope="microbatch"), seed=0)
        assert set(easy.nonzero().flatten().tolist()) == formulas.below_lower_median(values)


def test_an_inverted_split_calls_the_most_uncertain_easy() -> None:
    uncertainty = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.9])
    easy = split_easy(uncertainty, atkd(split="inverted", easy_ratio=0.4), seed=0)
    assert easy.tolist() == [False, True, False, True, False]


def test_a_random_split_depends_on_the_seed_alone() -> None:
    uncertainty = torch.linspace(0, 1, 100)
    loss = atkd(split="random", easy_ratio=0.3)
    first = split_easy(uncertainty, loss, seed=1)
    assert int(first.sum()) == 30
    assert torch.equal(first, split_easy(uncertainty.flip(0), loss, seed=1))
    assert not torch.equal(first, split_easy(uncertainty, loss, seed=2))
    assert not torch.equal(first, split_easy(uncertainty, atkd(easy_ratio=0.3), seed=1))


@pytest.mark.parametrize(("count", "easy_count"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (10, 4)])
def test_the_authors_rule_is_strictly_below_the_lower_median(count: int, easy_count: int) -> None:
    assert int(split_easy(torch.arange(float(count)), atkd(scope="microbatch"), seed=0).sum()) == easy_count


def test_the_authors_rule_finds_no_easy_token_among_equals() -> None:
    assert not split_easy(torch.full((6,), 0.3), atkd(scope="microbatch"), seed=0).any()


TABLE: list[tuple[LossConfig, list[float], list[float]]] = [
    (CoupledLoss(kind="coupled"), [0.0] * 4, [0.0] * 4),
    (CoupledLoss(kind="coupled", divergence=ReverseKL()), [0.0] * 4, [0.0] * 4),
    (DecoupledLoss(kind="decoupled"), [0.25] * 4, [0.25] * 4),
    (TargetOnlyLoss(kind="target_only"), [0.25] * 4, [0.0] * 4),
    (DiversityOnlyLoss(kind="diversity_only"), [0.0] * 4, [0.25] * 4),
    (atkd(easy_weight=0.4, easy_ratio=0.25), [0.2, 0.0, 0.2, 0.2], [0.2, 0.4, 0.2, 0.2]),
    (atkd(easy_weight=0.4, easy_ratio=0.25, normalize="tokens"), [0.15, 0.0, 0.15, 0.15], [0.15, 0.1, 0.15, 0.15]),
]


@pytest.mark.parametrize(("loss", "target", "diversity"), TABLE)
def test_the_table_of_weights(loss: LossConfig, target: list[float], diversity: list[float]) -> None:
    uncertainty = torch.tensor([0.8, 0.2, 0.4, 0.6])
    easy = split_easy(uncertainty, loss, seed=0) if isinstance(loss, AtkdLoss) else None
    weights = token_weights(uncertainty, loss, easy)
    assert weights.target.tolist() == pytest.approx(target)
    assert weights.diversity.tolist() == pytest.approx(diversity)
    assert weights.divergence.tolist() == ([0.25] * 4 if loss.kind == "coupled" else [0.0] * 4)
    assert weights.cross_entropy.tolist() == [0.0] * 4
    assert weights.target.dtype == weights.diversity.dtype == weights.cross_entropy.dtype == torch.float32


def test_hard_labels_weigh_cross_entropy_alone() -> None:
    weights = token_weights(torch.zeros(4), HardLabelLoss(kind="hard_label"))
    assert weights.cross_entropy.tolist() == [0.25] * 4
    assert not weights.target.any() and not weights.diversity.any() and not weights.easy.any()


def test_cross_entropy_can_be_mixed_in() -> None:
    weights = token_weights(torch.rand(4), DecoupledLoss(kind="decoupled", cross_entropy_weight=2.0))
    assert weights.cross_entropy.tolist() == [0.5] * 4


@pytest.mark.parametrize("normalize", ["groups", "tokens"])
@pytest.mark.parametrize("everyone", [True, False])
def test_an_empty_group_adds_nothing(everyone: bool, normalize: str) -> None:
    weights = token_weights(torch.rand(5), atkd(normalize=normalize), easy=torch.full((5,), everyone))
    assert weights.diversity.tolist() == pytest.approx([(0.2 if everyone else 0.8) / 5] * 5)
    assert weights.target.tolist() == pytest.approx([0.0 if everyone else 0.8 / 5] * 5)


@pytest.mark.parametrize("loss", [row[0] for row in TABLE] + [HardLabelLoss(kind="hard_label")])
def test_no_tokens_have_no_weights(loss: LossConfig) -> None:
    weights = token_weights(torch.zeros(0), loss, easy=torch.zeros(0, dtype=torch.bool))
    assert len(weights) == 0


def test_weights_can_be_cut_and_scaled() -> None:
    uncertainty = torch.tensor([0.8, 0.2, 0.4, 0.6])
    weights = token_weights(uncertainty, atkd(), split_easy(uncertainty, atkd(), seed=0))
    part = weights.select(slice(1, 3))
    assert part.easy.tolist() == [True, True] and part.diversity.tolist() == weights.diversity[1:3].tolist()
    assert weights.select(torch.tensor([3, 0])).target.tolist() == pytest.approx([0.4, 0.4])
    assert weights.scaled(2.0).to("cpu").target.tolist() == pytest.approx([0.8, 0.0, 0.0, 0.8])


def test_weights_cut_by_row_and_put_together_again_are_the_same() -> None:
    uncertainty = torch.tensor([0.8, 0.2, 0.4, 0.6, 0.3])
    weights = token_weights(uncertainty, atkd(cross_entropy_weight=0.5), split_easy(uncertainty, atkd(), seed=0))
    rows = weights.split([2, 0, 3])
    assert [len(row) for row in rows] == [2, 0, 3]
    assert rows[2].target.tolist() == weights.target[2:].tolist() and rows[2].easy.tolist() == weights.easy[2:].tolist()
    together = TokenWeights.concatenate(rows)
    for name in ("divergence", "target", "diversity", "cross_entropy", "easy"):
        assert torch.equal(getattr(together, name), getattr(weights, name))


def test_zero_weights_add_nothing() -> None:
    weights = TokenWeights.zero(3)
    assert len(weights) == 3 and not weights.easy.any()
    assert not weights.target.any() and not weights.diversity.any() and not weights.cross_entropy.any()


def test_what_cannot_be_ranked_or_weighed() -> None:
    with pytest.raises(ValueError, match=r"uncertainty has the shape \[2, 1\]; it must be \[N\]"):
        split_easy(torch.zeros(2, 1), atkd(), seed=0)
    with pytest.raises(ValueError, match="uncertainty holds NaN"):
        split_easy(torch.tensor([0.1, torch.nan]), atkd(), seed=0)
    with pytest.raises(ValueError, match=r"easy is None, but loss.kind atkd .* pass split_easy"):
        token_weights(torch.zeros(2), atkd())
    with pytest.raises(ValueError, match=r"uncertainty has the shape \[2\] and easy \[3\]; both must be \[N\]"):
        token_weights(torch.zeros(2), atkd(), easy=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"weights.diversity has the shape \[1\] and weights.easy \[2\]"):
        TokenWeights(*[torch.zeros(2)] * 2, torch.zeros(1), *[torch.zeros(2)] * 3, torch.zeros(2, dtype=torch.bool))


@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), max_size=40), st.floats(0, 1))
def test_the_border_is_the_highest_uncertainty_of_those_that_are_easy(values: list[float], easy_ratio: float) -> None:
    uncertainty, loss = torch.tensor(values), AtkdLoss(kind="atkd", easy_ratio=easy_ratio)
    easy = uncertainty[split_easy(uncertainty, loss, seed=0)].tolist()
    assert easy_border(uncertainty, loss) == max(easy, default=None)
