"""Rows that keep as many tokens as hold a share of the mass, and columns that name none. N targets, K top-k, V vocabulary."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losses.config import Tail
from losses.topk_teacher import NO_TOKEN, TopkTeacher
from tests.losses.comparisons import CASES, DETACHED, ONE_OF_EACH, Case, random_tokens
from tests.reference import divergences, formulas

TAILS: tuple[Tail, ...] = ("bucket", "renormalize")


def kept_by_hand(teacher: list[float], target: int, top_k: int, share: float) -> list[int]:
    """The shortest run of the likeliest ``top_k`` others that holds the share of the mass off the target, or all of them."""
    logs = formulas.log_softmax(teacher)
    others = formulas.most_likely_others(teacher, target, top_k)
    enough = share * formulas.uncertainty(teacher, target)
    for length in range(1, top_k):
        if math.fsum(math.exp(logs[token]) for token in others[:length]) >= enough:
            return others[:length]
    return others


@pytest.mark.parametrize("spread", [0.3, 2.0, 20.0])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("top_k", [1, 5, 11])
def test_the_shortest_run_that_holds_the_share_is_kept(top_k: int, share: float, spread: float) -> None:
    teacher, _, targets = random_tokens(count=9, vocab_size=13, spread=spread, seed=18)
    support = TopkTeacher.from_logits(teacher, targets, top_k)
    kept = support.keep_mass(share)
    kept.check(targets, vocab_size=13)
    assert kept.topk_ids.shape == support.topk_ids.shape
    for i, (row, g) in enumerate(zip(teacher.tolist(), targets.tolist(), strict=True)):
        logs, tokens = formulas.log_softmax(row), kept_by_hand(row, g, top_k, share)
        dropped = [log for token, log in enumerate(logs) if token != g and token not in tokens]
        assert kept.topk_ids[i].tolist() == tokens + [NO_TOKEN] * (top_k - len(tokens))
        expected = [logs[token] for token in tokens] + [-math.inf] * (top_k - len(tokens))
        assert kept.topk_logprobs[i].tolist() == pytest.approx(expected)
        assert kept.tail_logmass[i].item() == pytest.approx(formulas.log_of_sum(dropped))
        assert kept.target_logprob[i].item() == support.target_logprob[i].item()


@pytest.mark.parametrize("top_k", [12, None])
def test_a_support_of_all_tokens_keeps_its_likeliest_too(top_k: int | None) -> None:
    teacher, _, targets = random_tokens(count=9, vocab_size=13, seed=18)
    kept = TopkTeacher.from_logits(teacher, targets, top_k).keep_mass(0.5)
    for ids, row, g in zip(kept.topk_ids.tolist(), teacher.tolist(), targets.tolist(), strict=True):
        assert {token for token in ids if token != NO_TOKEN} == set(kept_by_hand(row, g, 12, 0.5))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(-20, 20), min_size=6, max_size=6), min_size=1, max_size=3),
    st.floats(0.01, 1.0), st.integers(1, 5), st.integers(0, 5),
)  # fmt: skip
def test_mass_is_conserved_and_keeping_again_changes_nothing(
    rows: list[list[float]], share: float, top_k: int, target: int
) -> None:
    targets = torch.full((len(rows),), target)
    kept = TopkTeacher.from_logits(torch.tensor(rows, dtype=torch.float64), targets, top_k).keep_mass(share)
    total = kept.target_logprob.exp() + kept.topk_logprobs.exp().sum(dim=1) + kept.tail_logmass.exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    assert (kept.topk_ids[:, 0] != NO_TOKEN).all(), "the likeliest other stays, however small the share"
    again = kept.keep_mass(share)
    assert torch.equal(again.topk_ids, kept.topk_ids) and torch.equal(again.tail_logmass, kept.tail_logmass)


def test_all_of_the_mass_keeps_all_columns_that_have_some() -> None:
    teacher, _, targets = random_tokens(count=6, vocab_size=9, seed=19)
    support = TopkTeacher.from_logits(teacher, targets, 5)
    assert torch.equal(support.keep_mass(1.0).topk_ids, support.topk_ids)


@pytest.mark.parametrize("share", [0.6, 0.8, 0.97])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_are_those_of_the_kept_classes(case: Case, tail: Tail, share: float) -> None:
    teacher, student, targets = random_tokens(count=7, vocab_size=13, seed=20)
    knobs = case.knobs if case.t is None else {**case.knobs, "t": case.t}
    expected, lengths = [], set()
    for p, q, g in zip(teacher.tolist(), student.tolist(), targets.tolist(), strict=True):
        tokens = kept_by_hand(p, g, 6, share)
        lengths.add(len(tokens))
        expected.append(divergences.value(case.kind, p, q, g, tokens, tail, **knobs))
    assert len(lengths) > 1, "rows differ in what they keep"
    support = TopkTeacher.from_logits(teacher, targets, 6).keep_mass(share)
    assert case.values(support, student, targets, tail).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def ragged(targets: Tensor, teacher: Tensor) -> TopkTeacher:
    """A support of K = 4 whose rows keep different numbers of tokens."""
    support = TopkTeacher.from_logits(teacher, targets, 4).keep_mass(0.6)
    assert 0 < (support.topk_ids == NO_TOKEN).sum() < support.topk_ids.numel()
    return support


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("case", [case for case in ONE_OF_EACH if case.kind not in DETACHED], ids=str)
def test_gradients_by_finite_differences(case: Case, tail: Tail) -> None:
    teacher, student, targets = random_tokens(count=3, vocab_size=7, spread=1.5, seed=21)
    support = ragged(targets, teacher)
    assert torch.autograd.gradcheck(lambda logits: case.values(support, logits, targets, tail), student.requires_grad_())


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_columns_without_a_token_change_no_gradient_not_even_the_targets(case: Case, tail: Tail) -> None:
    teacher, student, targets = random_tokens(count=3, vocab_size=7, spread=1.5, seed=21)
    support = ragged(targets, teacher)
    for i in range(3):
        row, target = support.select(slice(i, i + 1)), targets[i : i + 1]
        named = row.topk_ids[0] != NO_TOKEN
        narrow = TopkTeacher(row.target_logprob, row.topk_ids[:, named], row.topk_logprobs[:, named], row.tail_logmass)
        leaf = student[i : i + 1].clone().requires_grad_()
        (ours,), (expected,) = (torch.autograd.grad(case.values(each, leaf, target, tail).sum(), leaf) for each in (row, narrow))
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
        assert ours[0, target].abs() > 1e-3, "the target's own logit is taught"


@pytest.mark.parametrize("tail", TAILS)
def test_a_row_that_names_no_token_at_all_is_finite(tail: Tail) -> None:
    support = TopkTeacher(
        torch.tensor([math.log(0.6)]), torch.full((1, 2), NO_TOKEN), torch.full((1, 2), -math.inf), torch.tensor([math.log(0.4)])
    )
    support.check(torch.tensor([1]), vocab_size=4)
    for case in CASES:
        student = torch.tensor([[0.3, 1.0, -0.5, 0.1]], requires_grad=True)
        case.values(support, student, torch.tensor([1]), tail).sum().backward()
        assert student.grad is not None and student.grad.isfinite().all(), str(case)


def small_support(ids: list[list[int]], logprobs: list[list[float]]) -> TopkTeacher:
    return TopkTeacher(torch.full((2,), -1.0), torch.tensor(ids), torch.tensor(logprobs), torch.full((2,), -2.0))


@pytest.mark.parametrize(
    ("ids", "logprobs", "message"),
    [
        ([[1, -1], [0, 3]], [[-2.0, -3.0], [-2.0, -3.0]], "topk_ids holds -1, no token, where topk_logprobs is not -inf"),
        ([[1, -2], [0, 3]], [[-2.0, -math.inf], [-2.0, -3.0]], "topk_ids holds -2; ids of a vocabulary of 4 tokens are 0 to 3"),
        ([[1, 3], [3, 3]], [[-2.0, -3.0], [-2.0, -3.0]], "topk_ids of row 1 holds 3 twice; the top-K must all be different"),
    ],
)
def test_columns_that_name_no_token_but_have_mass_or_name_one_twice(
    ids: list[list[int]], logprobs: list[list[float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small_support(ids, logprobs).check(torch.tensor([0, 2]), vocab_size=4)


def test_several_columns_may_name_no_token() -> None:
    small_support([[-1, -1], [3, -1]], [[-math.inf] * 2, [-2.0, -math.inf]]).check(torch.tensor([0, 2]), vocab_size=4)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, math.nan])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(ValueError, match=f"share is {share}; it must be above 0 and at most 1"):
        small_support([[1, 2], [0, 3]], [[-2.0, -3.0], [-2.0, -3.0]]).keep_mass(share)
