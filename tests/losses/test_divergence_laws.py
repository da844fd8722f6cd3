"""The laws that divergences keep: limits that fix their direction, and properties of any logits. N targets, V vocabulary."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losses.config import Tail
from losses.teachers import DenseTeacher
from losses.topk_teacher import TopkTeacher
from tests.losses.comparisons import CASES, Case, random_tokens, teacher_of

Tokens = tuple[Tensor, Tensor, Tensor]
TAILS: tuple[Tail, ...] = ("bucket", "renormalize")
MERGING_NEVER_RAISES = (
    "forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl", "total_variation",
)  # fmt: skip
NEVER_ZERO = ("top1_cross_entropy", "student_tempered_kl")
NEGATIVE_AT_TIMES = "sampled_reverse_kl"  # where the student finds its token less likely than the teacher does
FORWARD, REVERSE = Case("forward_kl"), Case("reverse_kl")

quick = settings(max_examples=30, deadline=None)


@st.composite
def tokens(draw: st.DrawFn, empty_classes: bool = False) -> Tokens:
    """Logits [N, V] of teacher and student in float64 and targets [N]; the teacher's logit of the target is finite."""
    count, vocab_size = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    logit = st.floats(-30, 30)
    if empty_classes:
        logit = st.one_of(logit, st.just(-math.inf), st.sampled_from([-1e30, 1e30, 1e4, -1e4, torch.finfo(torch.float32).min]))
    flat = draw(st.lists(logit, min_size=2 * count * vocab_size, max_size=2 * count * vocab_size))
    teacher, student = torch.tensor(flat, dtype=torch.float64).reshape(2, count, vocab_size)
    targets = torch.tensor(draw(st.lists(st.integers(0, vocab_size - 1), min_size=count, max_size=count)))
    at_target = teacher.gather(1, targets[:, None])
    teacher.scatter_(1, targets[:, None], torch.where(at_target.isinf(), torch.zeros_like(at_target), at_target))
    return teacher, student, targets


def without_ties(teacher: Tensor) -> Tensor:
    """A teacher without equal tokens: which of two is the likeliest would be a matter of rounding."""
    return teacher + torch.randn(teacher.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def dense(case: Case, teacher: Tensor, student: Tensor, targets: Tensor) -> Tensor:
    return case.values(DenseTeacher(teacher, targets), student, targets)


def gradient_of(case: Case, teacher: Tensor, student: Tensor, targets: Tensor, top_k: int | None) -> Tensor:
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(case.values(teacher_of(teacher, targets, top_k), leaf, targets).sum(), leaf)
    return gradient


def assert_same(case: Case, ours: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol, msg=lambda text: f"{case}: {text}")


LIMITS = [
    (Case("jensen_shannon", {"teacher_weight": 1e-6}), 1e6, FORWARD),
    (Case("jensen_shannon", {"teacher_weight": 1 - 1e-6}), 1e6, REVERSE),
    (Case("alpha_beta", {"teacher_power": 1.0, "student_power": 1e-6}), 1.0, FORWARD),
    (Case("alpha_beta", {"teacher_power": 1e-6, "student_power": 1.0}), 1.0, REVERSE),
    (Case("skew_forward_kl", {"teacher_share": 1e-9}), 1.0, FORWARD),
    (Case("skew_reverse_kl", {"student_share": 1e-9}), 1.0, REVERSE),
    (Case("adaptive_kl", {"head_mass": 1 - 1e-12}), 1.0, FORWARD),
    (Case("interpolated_target", t=1.0), 1.0, FORWARD),
]


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize(("case", "factor", "limit"), LIMITS, ids=str)
def test_the_limit_of_a_divergence_is_the_kl_of_its_direction(case: Case, factor: float, limit: Case, top_k: int | None) -> None:
    teacher, student, targets = random_tokens(count=6, vocab_size=13, spread=1.0, seed=7)
    support = teacher_of(teacher, targets, top_k)
    expected = limit.values(support, student, targets)
    other = (REVERSE if limit is FORWARD else FORWARD).values(support, student, targets)
    assert ((expected - other).abs() > 1e-3 * expected).all(), "the directions differ on these tokens"
    torch.testing.assert_close(factor * case.values(support, student, targets), expected, rtol=1e-4, atol=0)
    gradient, limiting = (gradient_of(each, teacher, student, targets, top_k) for each in (case, limit))
    torch.testing.assert_close(factor * gradient, limiting, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 5])
def test_an_interpolated_target_at_the_student_teaches_nothing(top_k: int | None) -> None:
    teacher, student, targets = random_tokens(count=6, vocab_size=13, seed=8)
    case = Case("interpolated_target", t=0.0)
    assert case.values(teacher_of(teacher, targets, top_k), student, targets).abs().max() < 1e-14
    assert gradient_of(case, teacher, student, targets, top_k).abs().max() < 1e-14


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_swapping_the_sides_of_jensen_shannon_swaps_their_weights(weight: float) -> None:
    teacher, student, targets = random_tokens(count=6, vocab_size=13, seed=9)
    one = Case("jensen_shannon", {"teacher_weight": weight})
    other = Case("jensen_shannon", {"teacher_weight": 1 - weight})
    torch.testing.assert_close(dense(one, teacher, student, targets), dense(other, student, teacher, targets))


def test_swapping_the_sides_turns_forward_into_reverse() -> None:
    teacher, student, targets = random_tokens(count=6, vocab_size=13, seed=10)
    pairs = [
        (FORWARD, REVERSE),
        (Case("skew_forward_kl", {"teacher_share": 0.3}), Case("skew_reverse_kl", {"student_share": 0.3})),
        (
            Case("alpha_beta", {"teacher_power": 0.2, "student_power": 0.7}),
            Case("alpha_beta", {"teacher_power": 0.7, "student_power": 0.2}),
        ),
    ]
    for one, other in pairs:
        torch.testing.assert_close(dense(one, teacher, student, targets), dense(other, student, teacher, targets))


@quick
@given(tokens(), st.floats(-50, 50), st.floats(-50, 50), st.sampled_from([None, 1, 4]))
def test_shifting_all_logits_changes_nothing(drawn: Tokens, shift: float, other_shift: float, top_k: int | None) -> None:
    teacher, student, targets = drawn
    teacher = without_ties(teacher)
    top_k = top_k and min(top_k, teacher.shape[1] - 1)
    for case in CASES:
        shifted = case.values(teacher_of(teacher + shift, targets, top_k), student + other_shift, targets)
        expected = case.values(teacher_of(teacher, targets, top_k), student, targets)
        assert_same(case, shifted, expected, rtol=1e-7, atol=1e-9)


@quick
@given(tokens(), st.randoms(use_true_random=False), st.sampled_from([None, 1, 4]))
def test_renaming_the_tokens_changes_nothing(drawn: Tokens, random: object, top_k: int | None) -> None:
    teacher, student, targets = drawn
    teacher = without_ties(teacher)
    top_k = top_k and min(top_k, teacher.shape[1] - 1)
    order = list(range(teacher.shape[1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    new_name = torch.tensor(order).argsort()[targets]
    for case in CASES:
        renamed = case.values(teacher_of(teacher[:, order], new_name, top_k), student[:, order], new_name)
        expected = case.values(teacher_of(teacher, targets, top_k), student, targets)
        assert_same(case, renamed, expected, rtol=1e-9, atol=1e-10)


@quick
@given(tokens(), st.sampled_from([None, 1, 4]), st.sampled_from(TAILS))
def test_zero_when_student_equals_teacher(drawn: Tokens, top_k: int | None, tail: Tail) -> None:
    teacher, _, targets = drawn
    support = teacher_of(teacher, targets, top_k and min(top_k, teacher.shape[1] - 1))
    for case in CASES:
        if case.kind not in NEVER_ZERO:
            assert case.values(support, teacher.clone(), targets, tail).abs().max() < 1e-10, str(case)


@quick
@given(tokens(), st.sampled_from([None, 1, 4]), st.sampled_from(TAILS))
def test_never_negative(drawn: Tokens, top_k: int | None, tail: Tail) -> None:
    teacher, student, targets = drawn
    support = teacher_of(teacher, targets, top_k and min(top_k, teacher.shape[1] - 1))
    for case in CASES:
        if case.kind != NEGATIVE_AT_TIMES:
            assert (case.values(support, student, targets, tail) > -1e-10).all(), str(case)


@quick
@given(tokens(), st.integers(1, 8))
def test_a_tail_bucket_is_never_above_the_dense_value(drawn: Tokens, top_k: int) -> None:
    teacher, student, targets = drawn
    truncated = TopkTeacher.from_logits(teacher, targets, min(top_k, teacher.shape[1] - 1))
    for case in CASES:
        if case.kind in MERGING_NEVER_RAISES:
            whole = dense(case, teacher, student, targets)
            assert (case.values(truncated, student, targets) <= whole + 1e-9).all(), str(case)


@quick
@given(tokens(), st.booleans(), st.sampled_from(TAILS))
def test_keeping_every_token_is_dense(drawn: Tokens, by_number: bool, tail: Tail) -> None:
    teacher, student, targets = drawn
    teacher = without_ties(teacher)
    everything = TopkTeacher.from_logits(teacher, targets, teacher.shape[1] - 1 if by_number else None)
    for case in CASES:
        ours, expected = case.values(everything, student, targets, tail), dense(case, teacher, student, targets)
        assert_same(case, ours, expected, rtol=1e-9, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    tokens(empty_classes=True), st.sampled_from([None, 1, 4, 8]), st.sampled_from(TAILS),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_finite_for_any_logits(drawn: Tokens, top_k: int | None, tail: Tail, dtype: torch.dtype) -> None:
    teacher, student, targets = drawn
    support = teacher_of(teacher.to(dtype), targets, top_k and min(top_k, teacher.shape[1] - 1))
    leaf = student.to(dtype).requires_grad_()
    for case in CASES:
        values = case.values(support, leaf, targets, tail)
        assert values.isfinite().all(), str(case)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        assert gradient.isfinite().all(), str(case)


@pytest.mark.parametrize("top_k", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("twins", [2, 3])
def test_equal_tokens_are_in_the_head_together(twins: int, dtype: torch.dtype, top_k: int | None) -> None:
    teacher, student, targets = (values.to(dtype) for values in random_tokens(count=20, vocab_size=9, spread=1.0, seed=11))
    targets = targets.long()
    likeliest = torch.zeros_like(teacher, dtype=torch.bool)
    for step in range(twins):
        likeliest.scatter_(1, (targets[:, None] + step) % 9, True)
    teacher = torch.where(likeliest, teacher.amax(dim=1, keepdim=True) + 0.5, teacher)
    p, q = teacher.double().softmax(1), student.double().softmax(1)
    gap = (p - q).abs()
    share = (gap * likeliest).sum(dim=1) / gap.sum(dim=1)
    forward, reverse = (p * (p.log() - q.log())).sum(dim=1), (q * (q.log() - p.log())).sum(dim=1)
    ours = Case("adaptive_kl", {"head_mass": 0.1}).values(teacher_of(teacher, targets, top_k), student, targets)
    torch.testing.assert_close(ours.double(), share * forward + (1 - share) * reverse, rtol=1e-4, atol=1e-6)
