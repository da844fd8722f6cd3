"""The loss of a step: against the slow reading, and the same however the step is cut. N targets, V vocabulary."""

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from losses.config import (
    AtkdLoss,
    CoupledLoss,
    DecoupledLoss,
    DiversityOnlyLoss,
    HardLabelLoss,
    LossConfig,
    PolicyGradientLoss,
    TargetOnlyLoss,
)
from losses.distillation import LossSums, distillation_loss
from losses.token_weights import TokenWeights, split_easy, token_weights
from losses.topk_teacher import TopkTeacher
from tests.reference import formulas

CLASSES: dict[str, type] = {
    "coupled": CoupledLoss,
    "decoupled": DecoupledLoss,
    "target_only": TargetOnlyLoss,
    "diversity_only": DiversityOnlyLoss,
    "atkd": AtkdLoss,
}


def loss_of(kind: str, **settings: Any) -> LossConfig:
    loss: LossConfig = CLASSES[kind](kind=kind, **settings)
    return loss


def step(count: int = 9, vocab_size: int = 14, top_k: int | None = None) -> tuple[Tensor, Tensor, Tensor, TopkTeacher]:
    """Teacher logits, student logits (a leaf), targets, support; in float64."""
    generator = torch.Generator().manual_seed(7)
    teacher, student = 2 * torch.randn(2, count, vocab_size, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab_size, (count,), generator=generator)
    return teacher, student.requires_grad_(), targets, TopkTeacher.from_logits(teacher, targets, top_k)


def weights_of(teacher: TopkTeacher, loss: LossConfig) -> TokenWeights:
    easy = split_easy(teacher.uncertainty, loss, seed=0) if isinstance(loss, AtkdLoss) else None
    return token_weights(teacher.uncertainty, loss, easy)


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("kind", list(CLASSES))
def test_a_step_token_by_token(kind: str, direction: str, top_k: int | None) -> None:
    logits, student, targets, teacher = step(top_k=top_k)
    loss = loss_of(kind, divergence=direction, cross_entropy_weight=0.3)
    tokens = list(zip(logits.tolist(), student.tolist(), targets.tolist(), strict=True))
    easy = formulas.easy_tokens([formulas.uncertainty(p, g) for p, _, g in tokens], 0.5)
    expected = formulas.step_loss(tokens, kind, direction, easy, cross_entropy_weight=0.3, top_k=top_k)
    sums = distillation_loss(student, targets, teacher, weights_of(teacher, loss), loss)
    assert sums.loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("normalize", ["groups", "tokens"])
@pytest.mark.parametrize(("easy_ratio", "easy_weight"), [(0.3, 0.7), (0.0, 0.2), (1.0, 0.2), (0.5, 0.0), (0.5, 1.0)])
def test_adaptive_teaching_token_by_token(easy_ratio: float, easy_weight: float, normalize: str) -> None:
    logits, student, targets, teacher = step(top_k=5)
    loss = loss_of("atkd", easy_ratio=easy_ratio, easy_weight=easy_weight, normalize=normalize, tail="renormalize")
    tokens = list(zip(logits.tolist(), student.tolist(), targets.tolist(), strict=True))
    easy = formulas.easy_tokens([formulas.uncertainty(p, g) for p, _, g in tokens], easy_ratio)
    expected = formulas.step_loss(
        tokens, "atkd", easy=easy, easy_weight=easy_weight, normalize=normalize, top_k=5, tail="renormalize"
    )
    sums = distillation_loss(student, targets, teacher, weights_of(teacher, loss), loss)
    assert sums.loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
def test_coupled_and_dense_is_the_plain_divergence(direction: str) -> None:
    logits, student, targets, teacher = step()
    loss = loss_of("coupled", divergence=direction)
    p, q = logits.log_softmax(1), student.log_softmax(1)
    first, second = (p, q) if direction == "forward_kl" else (q, p)
    expected = (first.exp() * (first - second)).sum(1).mean()
    sums = distillation_loss(student, targets, teacher, weights_of(teacher, loss), loss)
    torch.testing.assert_close(sums.loss, expected)
    (ours,), (theirs,) = (torch.autograd.grad(value, student, retain_graph=True) for value in (sums.loss, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("kind", ["coupled", "atkd"])
def test_gradients_by_finite_differences(kind: str, direction: str) -> None:
    _, student, targets, teacher = step(count=4, vocab_size=7, top_k=3)
    loss = loss_of(kind, divergence=direction, cross_entropy_weight=0.5)
    weights = weights_of(teacher, loss)
    assert torch.autograd.gradcheck(lambda logits: distillation_loss(logits, targets, teacher, weights, loss).loss, student)


def test_hard_labels_need_no_teacher() -> None:
    _, student, targets, _ = step()
    loss = HardLabelLoss(kind="hard_label")
    sums = distillation_loss(student, targets, None, token_weights(torch.zeros(9), loss), loss)
    expected = torch.nn.functional.cross_entropy(student, targets)
    torch.testing.assert_close(sums.loss, expected, rtol=1e-6, atol=0)
    assert sums.cross_entropy.item() == pytest.approx(9 * expected.item())
    assert sums.target_term.item() == sums.diversity_term.item() == 0


@pytest.mark.parametrize("cuts", [[9], [1, 8], [3, 3, 3], [0, 4, 0, 5], [1] * 9])
@pytest.mark.parametrize("settings", [{"kind": "coupled"}, {"kind": "coupled", "divergence": "reverse_kl"}, {"kind": "atkd"}])
def test_a_step_may_be_cut_into_any_micro_batches(settings: dict[str, Any], cuts: list[int]) -> None:
    _, student, targets, teacher = step(top_k=5)
    loss = loss_of(**settings, cross_entropy_weight=0.1)
    weights = weights_of(teacher, loss)
    whole = distillation_loss(student, targets, teacher, weights, loss)
    (expected,) = torch.autograd.grad(whole.loss, student)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    total: LossSums | None = None
    for part in order.split(cuts):
        sums = distillation_loss(student[part], targets[part], teacher.select(part), weights.select(part), loss)
        total = sums if total is None else total + sums
    assert total is not None
    for field in fields(LossSums):
        torch.testing.assert_close(getattr(total, field.name), getattr(whole, field.name), rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(total.loss, student)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_sums_for_reports_are_of_each_group_and_carry_no_gradient() -> None:
    logits, student, targets, teacher = step()
    loss = AtkdLoss(kind="atkd", easy_ratio=0.3)
    weights = weights_of(teacher, loss)
    sums = distillation_loss(student, targets, teacher, weights, loss)
    terms = [
        (formulas.target_term(p, q, g), formulas.diversity_term(p, q, g), is_easy)
        for p, q, g, is_easy in zip(logits.tolist(), student.tolist(), targets.tolist(), weights.easy.tolist(), strict=True)
    ]
    assert sums.targets.item() == 9 and sums.easy.item() == 3
    assert sums.target_term.item() == pytest.approx(sum(t for t, _, _ in terms))
    assert sums.diversity_term.item() == pytest.approx(sum(d for _, d, _ in terms))
    assert sums.easy_diversity.item() == pytest.approx(sum(d for _, d, is_easy in terms if is_easy))
    assert sums.hard_target.item() == pytest.approx(sum(t for t, _, is_easy in terms if not is_easy))
    assert sums.hard_diversity.item() == pytest.approx(sum(d for _, d, is_easy in terms if not is_easy))
    assert sums.easy_loss.item() == pytest.approx(0.2 * sum(d for _, d, is_easy in terms if is_easy) / 3), "easy_weight 0.2"
    assert [field.name for field in fields(sums) if getattr(sums, field.name).requires_grad] == ["loss"]


def test_means_are_over_the_tokens_each_term_speaks_of() -> None:
    values = dict(
        loss=1.0, divergence=20.0, target_term=8.0, diversity_term=12.0, easy_diversity=2.0, hard_target=3.0, hard_diversity=9.0,
        easy_loss=0.125, cross_entropy=4.0, targets=4.0, easy=1.0, clipped=3.0,
    )  # fmt: skip
    sums = LossSums(**{name: torch.tensor(value) for name, value in values.items()})
    atkd, jensen = AtkdLoss(kind="atkd"), loss_of("coupled", divergence="jensen_shannon")
    assert sums.means(atkd) == {
        "cross_entropy": 1.0, "targets": 4.0, "divergence": 5.0, "target_term": 2.0, "diversity_term": 3.0,
        "easy_share": 0.25, "easy_diversity": 2.0, "hard_target": 1.0, "hard_diversity": 3.0, "easy_loss": 0.125,
    }  # fmt: skip
    assert sums.means(loss_of("coupled")).keys() == {"cross_entropy", "targets", "divergence", "target_term", "diversity_term"}
    assert sums.means(jensen) == {"cross_entropy": 1.0, "targets": 4.0, "divergence": 5.0}, "it has no two terms"
    policy = PolicyGradientLoss(kind="policy_gradient")
    assert sums.means(policy) == {"cross_entropy": 1.0, "targets": 4.0, "divergence": 5.0, "clipped_share": 0.75}
    assert sums.means(HardLabelLoss(kind="hard_label")) == {"cross_entropy": 1.0, "targets": 4.0}
    assert set(LossSums.zero("cpu").means(atkd).values()) == {0.0}
    assert (sums + LossSums.zero("cpu")).means(atkd) == sums.means(atkd) == LossSums(*sums.detach().tensors()).means(atkd)


def test_weightless_tokens_give_zero_loss_and_gradient() -> None:
    _, student, targets, teacher = step()
    sums = distillation_loss(student, targets, teacher, TokenWeights.zero(9), loss_of("coupled", divergence="reverse_kl"))
    sums.loss.backward()
    assert sums.loss.item() == 0 and student.grad is not None and not student.grad.any()


@pytest.mark.parametrize("kind", list(CLASSES))
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_or_no_tokens_give_a_finite_loss_and_gradient(count: int, kind: str) -> None:
    _, student, targets, teacher = step(count=count)
    loss = loss_of(kind)
    sums = distillation_loss(student, targets, teacher, weights_of(teacher, loss), loss)
    sums.loss.backward()
    assert math.isfinite(sums.loss.item()) and (count > 0 or sums.loss.item() == 0)
    assert student.grad is not None and student.grad.isfinite().all()


def test_arguments_that_do_not_belong_together() -> None:
    _, student, targets, teacher = step(top_k=3)
    loss = loss_of("decoupled")
    weights = weights_of(teacher, loss)
    with pytest.raises(ValueError, match=r"student_logits has the shape \[14\]; it must be \[N, V\]"):
        distillation_loss(student[0], targets[:1], teacher, weights, loss)
    with pytest.raises(ValueError, match=r"targets has the shape \[8\]; with 9 rows in student_logits it must be \[9\]"):
        distillation_loss(student, targets[:8], teacher, weights, loss)
    with pytest.raises(ValueError, match="targets holds -100; ids of a vocabulary of 14 tokens are 0 to 13"):
        distillation_loss(student, targets.clone().fill_(-100), teacher, weights, loss)
    with pytest.raises(ValueError, match="weights has 4 rows, but there are 9 targets"):
        distillation_loss(student, targets, teacher, weights.select(slice(4)), loss)
    with pytest.raises(ValueError, match="teacher has 4 rows, but there are 9 targets"):
        distillation_loss(student, targets, teacher.select(slice(4)), weights, loss)
    with pytest.raises(ValueError, match="teacher is None, but loss.kind decoupled needs one; only hard_label does without"):
        distillation_loss(student, targets, None, weights, loss)
