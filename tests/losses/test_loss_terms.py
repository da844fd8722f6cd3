"""Target and diversity terms: against the slow reading, and the laws they must keep. N targets, K top-k, V vocabulary."""

import math
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losses.prediction import Prediction, split_logits, student_log_odds, student_prediction, teacher_prediction
from losses.terms import binary_kl, diversity_term, target_term
from losses.topk_teacher import TopkTeacher
from tests.reference import formulas

Direction = Literal["forward_kl", "reverse_kl"]
Tail = Literal["bucket", "renormalize"]
DIRECTIONS: tuple[Direction, ...] = ("forward_kl", "reverse_kl")
TAILS: tuple[Tail, ...] = ("bucket", "renormalize")

quick = settings(max_examples=40, deadline=None)


def target_and_diversity(teacher: Prediction, student: Prediction, direction: Direction) -> tuple[Tensor, Tensor]:
    """Both terms [N], the first argument of the divergence being the teacher (forward) or the student (reverse)."""
    first, second = (teacher, student) if direction == "forward_kl" else (student, teacher)
    return target_term(first, second), diversity_term(first, second)


def terms(
    teacher: Tensor, student: Tensor, targets: Tensor, top_k: int | None, tail: Tail, direction: Direction
) -> tuple[Tensor, Tensor]:
    """Target and diversity term [N] from both sides' logits [N, V]."""
    support = TopkTeacher.from_logits(teacher, targets, top_k)
    teacher_side = teacher_prediction(support, tail, student.dtype)
    return target_and_diversity(teacher_side, student_prediction(student, targets, support.topk_ids, tail), direction)


def both_divergences(
    teacher: Tensor, student: Tensor, targets: Tensor, top_k: int | None = None, tail: Tail = "bucket"
) -> Tensor:
    """All four terms, [4, N]."""
    return torch.stack([term for direction in DIRECTIONS for term in terms(teacher, student, targets, top_k, tail, direction)])


def random_tokens(count: int, vocab_size: int, spread: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = spread * torch.randn(2, count, vocab_size, generator=generator, dtype=torch.float64)
    return teacher, student, torch.randint(vocab_size, (count,), generator=generator)


@st.composite
def tokens(draw: st.DrawFn, empty_classes: bool = False, largest: float = 30.0) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher and student logits [N, V] in float64 and targets [N]; the teacher's target logit is finite."""
    count, vocab_size = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    logit = st.floats(-largest, largest)
    if empty_classes:
        logit = st.one_of(logit, st.just(-math.inf), st.sampled_from([-1e30, 1e30, 1e4, -1e4]))
    flat = draw(st.lists(logit, min_size=2 * count * vocab_size, max_size=2 * count * vocab_size))
    teacher, student = torch.tensor(flat, dtype=torch.float64).reshape(2, count, vocab_size)
    targets = torch.tensor(draw(st.lists(st.integers(0, vocab_size - 1), min_size=count, max_size=count)))
    at_target = teacher[torch.arange(count), targets]
    teacher[torch.arange(count), targets] = torch.where(at_target.isinf(), torch.zeros_like(at_target), at_target)
    return teacher, student, targets


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("top_k", [1, 3, 16, 22, None])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_values_token_by_token(direction: Direction, tail: Tail, top_k: int | None, spread: float) -> None:
    teacher, student, targets = random_tokens(count=7, vocab_size=23, spread=spread, seed=int(10 * spread))
    of_target, of_others = terms(teacher, student, targets, top_k, tail, direction)
    for i, (teacher_row, student_row, g) in enumerate(zip(teacher.tolist(), student.tolist(), targets.tolist(), strict=True)):
        first, second = (teacher_row, student_row) if direction == "forward_kl" else (student_row, teacher_row)
        kept = formulas.most_likely_others(teacher_row, g, top_k or 22)
        assert of_target[i].item() == pytest.approx(formulas.target_term(first, second, g), rel=1e-9, abs=1e-12)
        expected = formulas.diversity_term(first, second, g, kept, tail)
        assert of_others[i].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_values_of_each_dtype_in_odd_shapes(dtype: torch.dtype, tolerance: float) -> None:
    teacher, student, targets = random_tokens(count=41, vocab_size=401, spread=2.0, seed=1)
    expected = both_divergences(teacher, student, targets, top_k=37)
    support = TopkTeacher.from_logits(teacher, targets, top_k=37)
    in_float32 = TopkTeacher(
        support.target_logprob.float(), support.topk_ids, support.topk_logprobs.float(), support.tail_logmass.float()
    )
    logits = student.to(dtype)
    student_side = student_prediction(logits, targets, in_float32.topk_ids, "bucket")
    assert student_side.nontarget_logprobs.dtype == torch.float32, "computed in float32 whatever the logits' type"
    teacher_side = teacher_prediction(in_float32, "bucket", torch.float32)
    ours = [term for way in DIRECTIONS for term in target_and_diversity(teacher_side, student_side, way)]
    torch.testing.assert_close(torch.stack(ours).double(), expected, rtol=tolerance, atol=tolerance)


def test_gradients_are_the_papers_closed_forms() -> None:
    teacher, student, targets = random_tokens(count=5, vocab_size=11, spread=2.0, seed=2)
    rows = torch.arange(5)
    p, q = teacher.softmax(1), student.softmax(1)
    is_target = torch.zeros_like(p, dtype=torch.bool)
    is_target[rows, targets] = True
    p_hat = p.masked_fill(is_target, 0.0) / p.masked_fill(is_target, 0.0).sum(1, keepdim=True)
    q_hat = q.masked_fill(is_target, 0.0) / q.masked_fill(is_target, 0.0).sum(1, keepdim=True)
    gap = (p - q)[rows, targets][:, None]
    student.requires_grad_()
    of_target, of_others = terms(teacher, student, targets, None, "bucket", "forward_kl")
    (target_gradient,) = torch.autograd.grad(of_target.sum(), student, retain_graph=True)
    (diversity_gradient,) = torch.autograd.grad(of_others.sum(), student)
    torch.testing.assert_close(target_gradient, torch.where(is_target, -gap, gap * q_hat))
    torch.testing.assert_close(diversity_gradient, q_hat - p_hat)
    assert (diversity_gradient[rows, targets] == 0).all(), "an easy token leaves its target's logit alone"


@pytest.mark.parametrize("top_k", [2, 7])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_by_finite_differences(direction: Direction, tail: Tail, top_k: int) -> None:
    teacher, student, targets = random_tokens(count=3, vocab_size=8, spread=1.5, seed=3)
    assert torch.autograd.gradcheck(
        lambda logits: terms(teacher, logits, targets, top_k, tail, direction), student.requires_grad_()
    )


def test_gradient_of_the_split_and_of_cross_entropy() -> None:
    _, student, targets = random_tokens(count=3, vocab_size=6, spread=2.0, seed=4)
    ids = torch.stack([(targets + 2) % 6, (targets + 3) % 6], dim=1)
    assert torch.autograd.gradcheck(lambda logits: split_logits(logits, targets, ids), student.requires_grad_())
    ours = -torch.nn.functional.logsigmoid(student_log_odds(student, targets))
    expected = torch.nn.functional.cross_entropy(student, targets, reduction="none")
    torch.testing.assert_close(ours, expected)
    (gradient,) = torch.autograd.grad(ours.sum(), student)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(gradient, expected_gradient)


def test_the_gradient_has_the_type_of_the_logits() -> None:
    logits = torch.randn(2, 5).to(torch.bfloat16).requires_grad_()
    student_log_odds(logits, torch.tensor([0, 4])).sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


@quick
@given(tokens(), st.floats(-50, 50), st.floats(-50, 50))
def test_shifting_all_logits_changes_nothing(drawn: tuple[Tensor, Tensor, Tensor], shift: float, other_shift: float) -> None:
    teacher, student, targets = drawn
    shifted = both_divergences(teacher + shift, student + other_shift, targets)
    torch.testing.assert_close(shifted, both_divergences(teacher, student, targets), rtol=1e-7, atol=1e-9)


@quick
@given(tokens(), st.randoms(use_true_random=False))
def test_renaming_the_tokens_changes_nothing(drawn: tuple[Tensor, Tensor, Tensor], random: object) -> None:
    teacher, student, targets = drawn
    vocab_size = teacher.shape[1]
    order = list(range(vocab_size))
    random.shuffle(order)  # type: ignore[attr-defined]
    new_name = torch.empty(vocab_size, dtype=torch.long)
    new_name[torch.tensor(order)] = torch.arange(vocab_size)
    renamed = both_divergences(teacher[:, order], student[:, order], new_name[targets])
    torch.testing.assert_close(renamed, both_divergences(teacher, student, targets), rtol=1e-9, atol=1e-10)


@quick
@given(tokens(), st.integers(1, 8), st.sampled_from(TAILS))
def test_zero_when_student_equals_teacher(drawn: tuple[Tensor, Tensor, Tensor], top_k: int, tail: Tail) -> None:
    teacher, _, targets = drawn
    values = both_divergences(teacher, teacher.clone(), targets, min(top_k, teacher.shape[1] - 1), tail)
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-10)


@quick
@given(tokens(), st.integers(1, 8), st.sampled_from(TAILS))
def test_never_negative(drawn: tuple[Tensor, Tensor, Tensor], top_k: int, tail: Tail) -> None:
    teacher, student, targets = drawn
    assert (both_divergences(teacher, student, targets, min(top_k, teacher.shape[1] - 1), tail) > -1e-10).all()


@quick
@given(tokens())
def test_terms_add_up_to_the_divergence(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    teacher, student, targets = drawn
    forward_target, forward_diversity, reverse_target, reverse_diversity = both_divergences(teacher, student, targets)
    teacher_uncertainty = TopkTeacher.from_logits(teacher, targets).uncertainty
    student_uncertainty = TopkTeacher.from_logits(student, targets).uncertainty
    for i, (p, q) in enumerate(zip(teacher.tolist(), student.tolist(), strict=True)):
        forward = forward_target[i] + teacher_uncertainty[i] * forward_diversity[i]
        assert forward.item() == pytest.approx(formulas.full_divergence(p, q), rel=1e-9, abs=1e-10)
        reverse = reverse_target[i] + student_uncertainty[i] * reverse_diversity[i]
        assert reverse.item() == pytest.approx(formulas.full_divergence(q, p), rel=1e-9, abs=1e-10)


@quick
@given(tokens(), st.integers(1, 8), st.sampled_from(DIRECTIONS))
def test_a_tail_bucket_is_never_above_the_dense_value(
    drawn: tuple[Tensor, Tensor, Tensor], top_k: int, direction: Direction
) -> None:
    teacher, student, targets = drawn
    dense_target, dense_diversity = terms(teacher, student, targets, None, "bucket", direction)
    top_k = min(top_k, teacher.shape[1] - 1)
    bucket_target, bucket_diversity = terms(teacher, student, targets, top_k, "bucket", direction)
    assert (bucket_diversity <= dense_diversity + 1e-9).all()
    torch.testing.assert_close(bucket_target, dense_target, rtol=1e-9, atol=1e-10)


@quick
@given(tokens(), st.sampled_from(TAILS))
def test_keeping_every_token_is_dense(drawn: tuple[Tensor, Tensor, Tensor], tail: Tail) -> None:
    teacher, student, targets = drawn
    everything = TopkTeacher.from_logits(teacher, targets, teacher.shape[1] - 1)
    assert (everything.tail_logmass == -math.inf).all()
    shuffled = torch.randperm(everything.topk_ids.shape[1], generator=torch.Generator().manual_seed(0))
    ids, logprobs = everything.topk_ids[:, shuffled], everything.topk_logprobs[:, shuffled]
    everything = TopkTeacher(everything.target_logprob, ids, logprobs, everything.tail_logmass)
    student_side = student_prediction(student, targets, everything.topk_ids, tail)
    _, diversity = target_and_diversity(teacher_prediction(everything, tail, student.dtype), student_side, "forward_kl")
    not_targets = torch.ones_like(teacher, dtype=torch.bool).scatter(1, targets[:, None], False)
    p, q = (side[not_targets].reshape(len(targets), -1).log_softmax(1) for side in (teacher, student))
    expected = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(diversity, expected, rtol=1e-9, atol=1e-10)


@settings(max_examples=150, deadline=None)
@given(tokens(empty_classes=True), st.integers(1, 8), st.sampled_from(TAILS), st.sampled_from([torch.float32, torch.float64]))
def test_finite_for_any_logits(drawn: tuple[Tensor, Tensor, Tensor], top_k: int, tail: Tail, dtype: torch.dtype) -> None:
    teacher, student, targets = drawn
    student = student.to(dtype).requires_grad_()
    values = both_divergences(teacher.to(dtype), student, targets, min(top_k, teacher.shape[1] - 1), tail)
    assert values.isfinite().all()
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert gradient.isfinite().all()


def test_a_class_without_teacher_mass_costs_87_nats() -> None:
    teacher = torch.tensor([[0.0, 0.0, -math.inf]])
    student = torch.tensor([[0.0, 0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([0])
    _, diversity = terms(teacher, student, targets, None, "bucket", "reverse_kl")
    expected = 0.5 * math.log(0.5 / 1.0) + 0.5 * (math.log(0.5) - math.log(np.finfo(np.float32).tiny))
    assert diversity.item() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(diversity.sum(), student)
    assert gradient[0, 2] > 10, "and the student is pushed off that class"


def test_a_stored_empty_tail_keeps_the_reverse_divergence_finite() -> None:
    support = TopkTeacher(
        torch.tensor([math.log(0.5)]), torch.tensor([[1]]), torch.tensor([[math.log(0.5)]]), torch.tensor([-math.inf])
    )
    student = torch.zeros(1, 4, requires_grad=True)
    student_side = student_prediction(student, torch.tensor([0]), support.topk_ids, "bucket")
    _, diversity = target_and_diversity(teacher_prediction(support, "bucket", torch.float32), student_side, "reverse_kl")
    diversity.sum().backward()
    assert diversity.item() == pytest.approx(2 / 3 * 87.34 - 0.6365, abs=1e-2)
    assert student.grad is not None and student.grad.isfinite().all() and student.grad[0, 2] > 0


def test_saturated_students_in_float32_agree_with_exact_arithmetic() -> None:
    teacher, student = [0.0, 1.0, -1.0, 0.5], [200.0, 0.0, 1.0, -3.0]
    for one, other in ((teacher, student), (student, teacher)):
        of_target, of_others = terms(torch.tensor([one]), torch.tensor([other]), torch.tensor([0]), None, "bucket", "forward_kl")
        assert of_target.item() == pytest.approx(formulas.target_term(one, other, 0), rel=1e-5)
        assert of_others.item() == pytest.approx(formulas.diversity_term(one, other, 0), rel=1e-5)


def test_binary_divergence_is_zero_only_at_equality() -> None:
    odds = torch.tensor([-200.0, -3.0, 0.0, 3.0, 200.0])
    assert (binary_kl(odds, odds) == 0).all()
    assert (binary_kl(odds, odds + 1.0)[1:4] > 0.01).all()
