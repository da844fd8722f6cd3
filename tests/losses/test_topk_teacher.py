"""The truncated teacher: what it keeps of the logits, and what it refuses."""

import math

import pytest
import torch

from losses.topk_teacher import TopkTeacher
from tests.reference import formulas


def random_logits(count: int = 6, vocab_size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(count, vocab_size, generator=generator, dtype=torch.float64)
    return logits, torch.randint(vocab_size, (count,), generator=generator)


def small_support(**changes: torch.Tensor) -> TopkTeacher:
    """Two targets, K = 2; any field can be replaced."""
    fields = {
        "target_logprob": torch.log(torch.tensor([0.5, 0.25])),
        "topk_ids": torch.tensor([[1, 2], [0, 3]]),
        "topk_logprobs": torch.log(torch.tensor([[0.25, 0.125], [0.5, 0.125]])),
        "tail_logmass": torch.log(torch.tensor([0.125, 0.125])),
    }
    return TopkTeacher(**{**fields, **changes})


@pytest.mark.parametrize("top_k", [1, 5, 10])
def test_the_top_k_and_the_tail_of_dense_logits(top_k: int) -> None:
    logits, targets = random_logits()
    support = TopkTeacher.from_logits(logits, targets, top_k)
    for i, (row, g) in enumerate(zip(logits.tolist(), targets.tolist(), strict=True)):
        logs = formulas.log_softmax(row)
        kept = formulas.most_likely_others(row, g, top_k)
        dropped = [log for token, log in enumerate(logs) if token != g and token not in kept]
        assert support.topk_ids[i].tolist() == kept
        assert support.topk_logprobs[i].tolist() == pytest.approx([logs[token] for token in kept])
        assert support.target_logprob[i].item() == pytest.approx(logs[g])
        assert support.tail_logmass[i].item() == pytest.approx(formulas.log_of_sum(dropped))


@pytest.mark.parametrize("top_k", [None, 11])
def test_a_dense_teacher_has_no_tail(top_k: int | None) -> None:
    logits, targets = random_logits()
    support = TopkTeacher.from_logits(logits, targets, top_k)
    assert (support.tail_logmass == -math.inf).all()
    everything = torch.cat([support.topk_ids, targets[:, None]], dim=1).sort(dim=1).values
    assert (everything == torch.arange(12)).all()


def test_uncertainty_is_the_mass_off_the_target() -> None:
    logits, targets = random_logits()
    expected = [formulas.uncertainty(row, g) for row, g in zip(logits.tolist(), targets.tolist(), strict=True)]
    assert TopkTeacher.from_logits(logits, targets, 3).uncertainty.tolist() == pytest.approx(expected)


def test_uncertainty_survives_a_saturated_target() -> None:
    sure = TopkTeacher.from_logits(torch.tensor([[40.0, 0.0, -1.0]]), torch.tensor([0]))
    assert sure.uncertainty.item() == pytest.approx(formulas.uncertainty([40.0, 0.0, -1.0], 0), rel=1e-5)
    rounded = small_support(target_logprob=torch.zeros(2), topk_logprobs=torch.full((2, 2), -50.0))
    assert rounded.uncertainty.tolist() == pytest.approx([2 * math.exp(-50)] * 2, rel=1e-5)
    tiny = small_support(target_logprob=torch.tensor([-1e-9, -1e-12]), topk_logprobs=torch.full((2, 2), -50.0))
    assert tiny.uncertainty.tolist() == pytest.approx([1e-9, 1e-12], rel=1e-5)
    unseen = small_support(target_logprob=torch.zeros(2), topk_logprobs=torch.full((2, 2), -500.0))
    assert unseen.log_uncertainty.tolist() == pytest.approx([-500 + math.log(2)] * 2)


def test_half_precision_logits_are_read_in_float32() -> None:
    logits, targets = random_logits()
    support = TopkTeacher.from_logits(logits.to(torch.bfloat16), targets, 3)
    assert support.target_logprob.dtype == support.topk_logprobs.dtype == support.tail_logmass.dtype == torch.float32


def test_select_keeps_rows_together() -> None:
    support = small_support().select(torch.tensor([1]))
    assert len(support) == 1
    assert support.topk_ids.tolist() == [[0, 3]]
    assert support.target_logprob.exp().item() == pytest.approx(0.25)
    assert len(support.to("cpu").select(slice(0, 0))) == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("target_logprob", torch.zeros(2, 1), r"target_logprob has the shape \[2, 1\]; it must be \[N\]"),
        ("topk_ids", torch.zeros(3, 2, dtype=torch.long), r"topk_ids has the shape \[3, 2\]; with 2 targets .* \[2, K\]"),
        ("topk_ids", torch.zeros(2, 0, dtype=torch.long), r"topk_ids has the shape \[2, 0\].*K at least 1"),
        ("topk_logprobs", torch.zeros(2, 3), r"topk_logprobs has the shape \[2, 3\]; .* \[2, 2\]"),
        ("tail_logmass", torch.zeros(1), r"tail_logmass has the shape \[1\]; it must be \[2\]"),
    ],
)
def test_shapes_that_do_not_belong_together(field: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_support(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("target_logprob", torch.tensor([-0.5, math.nan]), "target_logprob holds nan; .* must be finite"),
        ("target_logprob", torch.tensor([-0.5, -math.inf]), "target_logprob holds -inf; .* must be finite"),
        ("topk_logprobs", torch.tensor([[-1.0, math.nan], [-1, -1]]), "topk_logprobs holds nan; .* at most 0"),
        ("tail_logmass", torch.tensor([math.inf, -1.0]), "tail_logmass holds inf; .* at most 0"),
        ("topk_ids", torch.tensor([[1, 4], [0, 3]]), "topk_ids holds 4; ids of a vocabulary of 4 tokens are 0 to 3"),
        ("topk_ids", torch.tensor([[1, -2], [0, 3]]), "topk_ids holds -2; ids of a vocabulary of 4"),
        ("topk_ids", torch.tensor([[1, 2], [2, 3]]), "topk_ids of row 1 holds its target 2; "),
    ],
)
def test_values_no_teacher_can_have_said(field: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_support(**{field: value}).check(torch.tensor([0, 2]), vocab_size=4)


def test_a_support_as_wide_as_the_vocabulary_or_of_other_targets() -> None:
    small_support().check(torch.tensor([0, 2]), vocab_size=4)
    with pytest.raises(ValueError, match="topk_ids has K=2 columns, but a vocabulary of 2 tokens .* K must be at most 1"):
        small_support().check(torch.tensor([0, 2]), vocab_size=2)
    with pytest.raises(ValueError, match="teacher has 2 rows, but there are 3 targets"):
        small_support().check(torch.tensor([0, 2, 1]), vocab_size=4)


def test_dense_logits_that_do_not_fit_their_targets() -> None:
    logits, targets = random_logits()
    with pytest.raises(ValueError, match=r"top_k is 12 for teacher_logits of the shape \[6, 12\]; it must be 1 to 11"):
        TopkTeacher.from_logits(logits, targets, 12)
    with pytest.raises(ValueError, match=r"teacher_logits has the shape \[12\]; it must be \[N, V\]"):
        TopkTeacher.from_logits(logits[0], targets[:1])
    with pytest.raises(ValueError, match=r"targets has the shape \[5\]; with 6 rows in teacher_logits it must be \[6\]"):
        TopkTeacher.from_logits(logits, targets[:5])
    with pytest.raises(ValueError, match="targets holds 12; ids of a vocabulary of 12 tokens are 0 to 11"):
        TopkTeacher.from_logits(logits, torch.full((6,), 12))
