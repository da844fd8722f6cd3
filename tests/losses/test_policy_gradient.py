"""The policy gradient: against the slow reading, and the same however a step is cut. N targets, V vocabulary."""

import itertools
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from losses.config import CoupledLoss, PolicyGradientLoss
from losses.distillation import LossSums, distillation_loss
from losses.divergence_config import SampledReverseKL
from losses.fused_linear import chunked_distillation_loss
from losses.lm_head import LMHead
from losses.policy_gradient import DrawnTokens, advantages, policy_gradient_weights
from losses.token_weights import TokenWeights, token_weights
from losses.topk_teacher import TopkTeacher
from tests.reference import policy_gradients
from tests.reference.policy_gradients import Knobs, Token

COUNTS = [5, 1, 4, 3, 0, 6]
DATA_ROWS = (2, 4)
V = 7
PLAIN = Knobs(whiten=False, length_normalization=False, reward_scale=1.0, most_reward=None, clip_ratio=None)
KNOBS = [
    Knobs(),
    PLAIN,
    Knobs(exact_weight=0.0, most_reward=0.8),
    Knobs(exact_weight=0.3, discount=0.7, whiten=False, clip_ratio=0.05),
    Knobs(discount=0.0, length_normalization=False, corpus_weight=0.5),
    Knobs(exact_weight=0.0, clip_ratio=None, reward_scale=3.0, corpus_weight=2.0),
]


def loss_of(knobs: Knobs, **changes: Any) -> PolicyGradientLoss:
    return PolicyGradientLoss(kind="policy_gradient", **{**asdict(knobs), **changes})


@dataclass
class Step:
    """Rows that student and teacher wrote, and two that the data has; all in float64."""

    teacher_logits: Tensor
    student: Tensor
    """A leaf; it has moved since the rows were written."""
    targets: Tensor
    tokens: DrawnTokens

    @property
    def teacher(self) -> TopkTeacher:
        return TopkTeacher.from_logits(self.teacher_logits, self.targets, None)

    @property
    def rows(self) -> list[list[Token]]:
        columns = (self.teacher_logits, self.student, self.targets, self.tokens.student_logprob, self.tokens.drawn_logprob)
        drawn = self.tokens.drawn.tolist()
        every = [
            Token(*values[:3], *(values[3:] if is_drawn else ()))
            for *values, is_drawn in zip(*(column.tolist() for column in columns), drawn, strict=True)
        ]
        tokens = iter(every)
        return [list(itertools.islice(tokens, count)) for count in COUNTS]

    def weights(self, loss: PolicyGradientLoss) -> TokenWeights:
        return policy_gradient_weights(self.tokens, COUNTS, loss)


def step(mixed: bool = True, moved: float = 0.3) -> Step:
    generator = torch.Generator().manual_seed(5)
    count = sum(COUNTS)
    teacher, then, change = torch.randn(3, count, V, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (count,), generator=generator)
    drawn = torch.cat([torch.full((rows,), row not in DATA_ROWS) for row, rows in enumerate(COUNTS)])
    student_logprob, teacher_logprob = (
        logits.log_softmax(1).gather(1, targets[:, None])[:, 0] * drawn for logits in (then, teacher)
    )
    mixture = (0.2 * teacher_logprob.exp() + 0.8 * student_logprob.exp()).log() if mixed else student_logprob
    student = (then + moved * change).requires_grad_()
    return Step(teacher, student, targets, DrawnTokens(student_logprob, teacher_logprob, mixture * drawn, drawn))


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("mixed", [True, False])
def test_a_step_token_by_token(knobs: Knobs, mixed: bool) -> None:
    one = step(mixed)
    loss = loss_of(knobs)
    found = distillation_loss(one.student, one.targets, one.teacher, one.weights(loss), loss).loss
    assert found.item() == pytest.approx(policy_gradients.step_loss(one.rows, knobs), rel=1e-9)


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_gradients_by_finite_differences(knobs: Knobs) -> None:
    one, loss = step(), loss_of(knobs)
    weights, teacher = one.weights(loss), one.teacher
    assert torch.autograd.gradcheck(
        lambda logits: distillation_loss(logits, one.targets, teacher, weights, loss).loss, one.student
    )


@pytest.mark.parametrize("cuts", [[5, 1, 4, 3, 0, 6], [1] * 19, [0, 12, 7]])
def test_a_step_may_be_cut_into_any_micro_batches(cuts: list[int]) -> None:
    one, loss = step(), loss_of(Knobs(corpus_weight=0.5))
    weights = one.weights(loss)
    whole = distillation_loss(one.student, one.targets, one.teacher, weights, loss)
    (expected,) = torch.autograd.grad(whole.loss, one.student)
    total = LossSums.zero("cpu", torch.float64)
    for part in torch.randperm(19, generator=torch.Generator().manual_seed(1)).split(cuts):
        teacher = one.teacher.select(part)
        total = total + distillation_loss(one.student[part], one.targets[part], teacher, weights.select(part), loss)
    for field in fields(LossSums):
        torch.testing.assert_close(getattr(total, field.name), getattr(whole, field.name), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(total.loss, one.student), (expected,), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_targets", [1, 4, 100])
def test_chunks_through_the_head_give_the_value_and_gradients_of_the_whole(chunk_targets: int) -> None:
    one, loss = step(), loss_of(Knobs(corpus_weight=0.5))
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(19, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(V, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = one.weights(loss)
    whole = distillation_loss(hidden @ head.T, one.targets, one.teacher, weights, loss)
    sums = chunked_distillation_loss(hidden, LMHead(head), one.targets, one.teacher, weights, loss, chunk_targets=chunk_targets)
    assert whole.clipped > 0
    for field in fields(LossSums):
        torch.testing.assert_close(getattr(sums, field.name), getattr(whole, field.name), rtol=1e-9, atol=1e-12)
    expected = torch.autograd.grad(whole.loss, [hidden, head])
    torch.testing.assert_close(torch.autograd.grad(sums.loss, [hidden, head]), expected, rtol=1e-9, atol=1e-12)


def test_rewards_of_each_token_alone_are_the_sampled_reverse_kl() -> None:
    one = step(mixed=False, moved=0.0)
    every = torch.ones(19, dtype=torch.bool)
    then = one.student.detach().log_softmax(1).gather(1, one.targets[:, None])[:, 0]
    teacher = one.teacher_logits.log_softmax(1).gather(1, one.targets[:, None])[:, 0]
    alone = loss_of(PLAIN, discount=0.0, exact_weight=0.0)
    weights = policy_gradient_weights(DrawnTokens(then, teacher, then, every), COUNTS, alone)
    sampled = CoupledLoss(kind="coupled", divergence=SampledReverseKL())
    found, wanted = (
        torch.autograd.grad(distillation_loss(one.student, one.targets, one.teacher, some, loss).loss, one.student)
        for some, loss in ((weights, alone), (token_weights(one.teacher.uncertainty, sampled), sampled))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_whitened_advantages_have_mean_0_and_deviation_1_over_what_models_drew() -> None:
    one = step()
    found = advantages(one.tokens, COUNTS, loss_of(Knobs()))
    own = found[one.tokens.drawn]
    assert own.mean().item() == pytest.approx(0, abs=1e-9) and own.std(correction=0).item() == pytest.approx(1, rel=1e-6)
    assert not found[~one.tokens.drawn].any()


@pytest.mark.parametrize(("advantage", "ratio", "moves"), [
    (1.0, 1.3, False), (1.0, 0.7, True), (-1.0, 1.3, True), (-1.0, 0.7, False), (1.0, 1.1, True), (-1.0, 1.1, True),
])  # fmt: skip
def test_a_token_is_held_once_it_has_gone_far_enough(advantage: float, ratio: float, moves: bool) -> None:
    logits = torch.tensor([[0.5, -0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1])
    then = logits.detach().log_softmax(1)[:, 1] - math.log(ratio)
    weights = TokenWeights(
        *[torch.zeros(1, dtype=torch.float64)] * 4, torch.tensor([advantage], dtype=torch.float64), then,
        torch.zeros(1, dtype=torch.bool),
    )  # fmt: skip
    teacher = TopkTeacher.from_logits(torch.zeros(1, 3, dtype=torch.float64), target, None)
    sums = distillation_loss(logits, target, teacher, weights, loss_of(Knobs(exact_weight=0.0)))
    (gradient,) = torch.autograd.grad(sums.loss, logits)
    assert bool(gradient.any()) == moves and bool(sums.clipped) == (not moves)


def test_nothing_overflows_where_the_student_found_a_token_impossible() -> None:
    logits = torch.tensor([[90.0, 0.0, 0.0]], requires_grad=True)
    tokens = DrawnTokens(torch.tensor([-300.0]), torch.tensor([-0.1]), torch.tensor([-1.7]), torch.ones(1, dtype=torch.bool))
    loss = loss_of(Knobs(whiten=False, clip_ratio=None))
    teacher = TopkTeacher.from_logits(torch.zeros(1, 3), torch.tensor([0]), None)
    sums = distillation_loss(logits, torch.tensor([0]), teacher, policy_gradient_weights(tokens, [1], loss), loss)
    (gradient,) = torch.autograd.grad(sums.loss, logits)
    assert sums.loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_step_without_a_difference_teaches_nothing_and_has_no_nan(count: int) -> None:
    tokens = DrawnTokens(*[torch.full((count,), -1.0)] * 3, torch.ones(count, dtype=torch.bool))
    weights = policy_gradient_weights(tokens, [count], loss_of(Knobs()))
    assert len(weights) == count and not weights.advantage.any()
    data = policy_gradient_weights(DrawnTokens.of_data(count), [count], loss_of(Knobs(corpus_weight=0.5)))
    assert not data.advantage.any() and not data.divergence.any()
    assert data.cross_entropy.tolist() == [0.5 / max(count, 1)] * count


def test_tokens_of_rows_stand_one_after_the_other() -> None:
    one = step().tokens
    parts = [DrawnTokens(*(getattr(one, field.name)[cut] for field in fields(one))) for cut in (slice(0, 8), slice(8, 19))]
    again = DrawnTokens.concatenate(parts)
    assert all(torch.equal(getattr(again, field.name), getattr(one, field.name)) for field in fields(one))


def test_wrong_arguments_are_named_with_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"^teacher_logprob has the shape \[3\] and drawn \[2\]; both must be \[N\]$"):
        DrawnTokens(torch.zeros(2), torch.zeros(3), torch.zeros(2), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="^row_counts adds up to 5, but there are 4 tokens; they must be as many$"):
        policy_gradient_weights(DrawnTokens.of_data(4), [2, 3], loss_of(Knobs()))
    with pytest.raises(ValueError, match=r"^loss.kind policy_gradient weighs tokens by how .*: call policy_gradient_weights"):
        token_weights(torch.zeros(4), loss_of(Knobs()))
