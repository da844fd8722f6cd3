"""Values and gradients of every divergence, against the slow reading. N targets, K top-k, V vocabulary."""

import pytest
import torch
from torch import Tensor

from losses.config import CoupledLoss, Tail
from losses.distillation import distillation_loss
from losses.divergence_config import SPLIT_DIVERGENCES
from losses.divergences import DIVERGENCES
from losses.teachers import DenseTeacher
from losses.token_weights import token_weights
from losses.topk_teacher import TopkTeacher
from tests.losses.comparisons import CASES, DETACHED, ONE_OF_EACH, Case, random_tokens, teacher_of
from tests.reference import divergences

SUPPORTS: list[tuple[int | None, Tail]] = [
    (None, "bucket"), (1, "bucket"), (6, "bucket"), (22, "bucket"), (1, "renormalize"), (6, "renormalize"),
]  # fmt: skip

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_divergence = pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)


def test_the_reference_and_the_cases_know_every_divergence() -> None:
    assert set(DIVERGENCES) == set(divergences.DIVERGENCES) == {case.kind for case in CASES}


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 40.0])
@pytest.mark.parametrize(("top_k", "tail"), SUPPORTS)
@every_case
def test_values_token_by_token(case: Case, top_k: int | None, tail: Tail, spread: float) -> None:
    teacher, student, targets = random_tokens(count=5, vocab_size=23, spread=spread, seed=int(10 * spread))
    ours = case.values(teacher_of(teacher, targets, top_k), student, targets, tail)
    assert ours.tolist() == pytest.approx(case.reference(teacher, student, targets, top_k, tail), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("top_k", [None, 37])
@every_divergence
def test_rounded_logits_are_computed_in_float32(case: Case, top_k: int | None, dtype: torch.dtype, step: float) -> None:
    teacher, student, targets = random_tokens(count=41, vocab_size=401, seed=1)
    teacher, student = teacher.float(), student.to(dtype).requires_grad_()
    exact = student.detach().double().requires_grad_()
    ours = case.values(teacher_of(teacher, targets, top_k), student, targets)
    expected = case.reference(teacher, exact, targets, top_k)
    assert ours.dtype == torch.float32
    assert ours.tolist() == pytest.approx(expected, rel=2e-5, abs=1e-6), "rounded no further than the logits already are"
    (gradient,) = torch.autograd.grad(ours.sum(), student)
    (exact_gradient,) = torch.autograd.grad(
        case.values(teacher_of(teacher.double(), targets, top_k), exact, targets).sum(), exact
    )
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=step, atol=1e-6)


@pytest.mark.parametrize("top_k", [None, 4])
@every_case
def test_a_coupled_step_is_the_mean_of_its_tokens(case: Case, top_k: int | None) -> None:
    teacher, student, targets = random_tokens(count=9, vocab_size=14, seed=2)
    loss = CoupledLoss(kind="coupled", divergence=case.config)
    support = teacher_of(teacher, targets, top_k)
    sums = distillation_loss(student, targets, support, token_weights(support.uncertainty, loss), loss, case.state)
    expected = sum(case.reference(teacher, student, targets, top_k))
    assert sums.divergence.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert sums.loss.item() == pytest.approx(expected / 9, rel=1e-9, abs=1e-12)
    assert (sums.target_term.item() > 0) == (sums.diversity_term.item() > 0) == (case.kind in SPLIT_DIVERGENCES)


@pytest.mark.parametrize(
    ("top_k", "tail"), [(None, "bucket"), (2, "bucket"), (2, "renormalize"), (5, "bucket"), (5, "renormalize")]
)
@pytest.mark.parametrize("case", [case for case in CASES if case.kind not in DETACHED], ids=str)
def test_gradients_by_finite_differences(case: Case, top_k: int | None, tail: Tail) -> None:
    teacher, student, targets = random_tokens(count=2, vocab_size=6, spread=1.5, seed=3)
    support = teacher_of(teacher, targets, top_k)
    assert torch.autograd.gradcheck(lambda logits: case.values(support, logits, targets, tail), student.requires_grad_())


def class_logprobs(logits: Tensor, targets: Tensor, ids: Tensor, tail: Tail) -> Tensor:
    """Log-probabilities [N, C] of target, tokens ``ids`` [N, K] and what is left, by plain operations."""
    logprobs = logits.log_softmax(1)
    target, named = logprobs.gather(1, targets[:, None]), logprobs.gather(1, ids)
    if tail == "renormalize":
        return torch.cat([target, named.log_softmax(1) + torch.log(1 - target.exp())], dim=1)
    left = torch.ones_like(logits).scatter(1, torch.cat([targets[:, None], ids], dim=1), 0.0)
    return torch.cat([target, named, (logprobs.exp() * left).sum(1, keepdim=True).log()], dim=1)


def both_sides(teacher: Tensor, student: Tensor, targets: Tensor, top_k: int | None, tail: Tail) -> tuple[Tensor, Tensor, int]:
    """Log-probabilities [N, C] of both sides, and how many of the classes are single tokens."""
    if top_k is None:
        return teacher.log_softmax(1), student.log_softmax(1), teacher.shape[1]
    ids = TopkTeacher.from_logits(teacher, targets, top_k).topk_ids
    p, q = (class_logprobs(side, targets, ids, tail) for side in (teacher, student))
    return p, q, 1 + top_k


@pytest.mark.parametrize(("top_k", "tail"), [(None, "bucket"), (1, "bucket"), (4, "bucket"), (4, "renormalize")])
@pytest.mark.parametrize("head_mass", [0.1, 0.5, 0.95])
def test_the_shares_of_the_adaptive_kl_carry_no_gradient(head_mass: float, top_k: int | None, tail: Tail) -> None:
    case = Case("adaptive_kl", {"head_mass": head_mass})
    teacher, student, targets = random_tokens(count=6, vocab_size=9, seed=4)
    p, q, singles = both_sides(teacher, student.requires_grad_(), targets, top_k, tail)
    forward, reverse = (p.exp() * (p - q)).sum(1), (q.exp() * (q - p)).sum(1)
    gap = (p.exp() - q.exp()).abs().detach()
    heads = [divergences.head(row, singles, head_mass) for row in p.tolist()]
    in_head = torch.tensor([[column in head for column in range(p.shape[1])] for head in heads])
    share = (gap * in_head).sum(1) / gap.sum(1)
    expected = share * forward + (1 - share) * reverse
    ours = case.values(teacher_of(teacher, targets, top_k), student, targets, tail)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), student), torch.autograd.grad(expected.sum(), student), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("top_k", "tail"), [(None, "bucket"), (1, "bucket"), (4, "bucket"), (4, "renormalize")])
@pytest.mark.parametrize("t", [0.0, 0.4, 0.9, 1.0])
def test_the_student_in_the_interpolated_target_carries_no_gradient(t: float, top_k: int | None, tail: Tail) -> None:
    teacher, student, targets = random_tokens(count=6, vocab_size=9, seed=5)
    p, q, _ = both_sides(teacher, student.requires_grad_(), targets, top_k, tail)
    target = ((1 - t) * q.detach() + t * p).softmax(1)
    expected = torch.nn.functional.kl_div(q, target, reduction="none").sum(1)
    ours = Case("interpolated_target", t=t).values(teacher_of(teacher, targets, top_k), student, targets, tail)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), student), torch.autograd.grad(expected.sum(), student), rtol=1e-9, atol=1e-12
    )


def test_no_gradient_flows_into_the_teacher() -> None:
    teacher, student, targets = random_tokens(count=3, vocab_size=7)
    teacher.requires_grad_()
    for case in ONE_OF_EACH:
        value = case.values(DenseTeacher(teacher, targets), student.requires_grad_(), targets).sum()
        assert torch.autograd.grad(value, [student, teacher], allow_unused=True)[1] is None, str(case)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("head_mass", [0.3, 0.9, 0.999])
def test_a_head_of_many_tokens_is_found(head_mass: float, seed: int) -> None:
    teacher, student, targets = random_tokens(count=3, vocab_size=700, spread=0.5, seed=seed)
    case = Case("adaptive_kl", {"head_mass": head_mass})
    for top_k in (None, 300):
        ours = case.values(teacher_of(teacher, targets, top_k), student, targets)
        assert ours.tolist() == pytest.approx(case.reference(teacher, student, targets, top_k), rel=1e-9)


@pytest.mark.parametrize("top_k", [None, 3])
@every_divergence
def test_no_tokens_cost_nothing(case: Case, top_k: int | None) -> None:
    teacher, student, targets = random_tokens(count=0, vocab_size=7)
    values = case.values(teacher_of(teacher, targets, top_k), student.requires_grad_(), targets)
    values.sum().backward()
    assert values.shape == (0,) and student.grad is not None and student.grad.shape == (0, 7)


@pytest.mark.parametrize("top_k", [None, 3])
def test_the_gradient_of_a_sampled_reverse_kl_is_that_of_the_whole_one_on_average(top_k: int | None) -> None:
    """All tokens of a small vocabulary in turn as the one that was drawn, each as likely as the student finds it."""
    teacher, student, _ = random_tokens(count=1, vocab_size=7, spread=1.5, seed=4)
    expected = student.clone().requires_grad_()
    whole = Case("reverse_kl").values(DenseTeacher(teacher, torch.zeros(1, dtype=torch.long)), expected, torch.zeros(1).long())
    (gradient,) = torch.autograd.grad(whole.sum(), expected)
    drawn = torch.arange(7)
    every = student.repeat(7, 1).requires_grad_()
    probability = student.softmax(dim=1)[0]
    support = teacher_of(teacher.repeat(7, 1), drawn, top_k)
    sampled = Case("sampled_reverse_kl").values(support, every, drawn)
    torch.testing.assert_close((probability * sampled).sum(), whole.sum())
    (of_each,) = torch.autograd.grad((probability * sampled).sum(), every)
    torch.testing.assert_close(of_each.sum(dim=0), gradient[0])


def test_the_gradient_of_a_sampled_reverse_kl_stays_within_its_bound() -> None:
    teacher, student, targets = random_tokens(count=50, vocab_size=9, spread=3.0, seed=5)
    leaf = student.clone().requires_grad_()
    values = Case("sampled_reverse_kl", {"most_nats": 0.5}).values(DenseTeacher(teacher, targets), leaf, targets)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    logprobs = student.log_softmax(dim=1)
    gaps = (logprobs - teacher.log_softmax(dim=1)).gather(1, targets[:, None]).clamp(-0.5, 0.5)
    of_logprob = torch.nn.functional.one_hot(targets, 9) - logprobs.exp()
    torch.testing.assert_close(gradient, gaps * of_logprob)
    assert (gaps.abs() == 0.5).any() and (gaps.abs() < 0.5).any()
