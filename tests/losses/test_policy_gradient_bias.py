"""What the policy gradient is on average, over every response there can be. Student and teacher are tables of logits.

Four tokens, the last of which ends a response; three tokens at most.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from losses.config import PolicyGradientLoss
from losses.distillation import distillation_loss
from losses.policy_gradient import DrawnTokens, policy_gradient_weights
from losses.topk_teacher import TopkTeacher

V, END, LONGEST = 4, 3, 3
Text = tuple[int, ...]
PREFIXES: list[Text] = [text for length in range(LONGEST) for text in itertools.product(range(END), repeat=length)]
STATE = {prefix: state for state, prefix in enumerate(PREFIXES)}
TEXTS: list[Text] = [
    text
    for length in range(1, LONGEST + 1)
    for text in itertools.product(range(V), repeat=length)
    if END not in text[:-1] and (text[-1] == END or length == LONGEST)
]


@dataclass
class World:
    """Logits [S, V] after each of S beginnings, in float64."""

    teacher: Tensor
    then: Tensor
    """The student's when it wrote."""
    now: Tensor
    """A leaf."""
    teacher_share: float

    @property
    def mixture(self) -> Tensor:
        """[S, V], by which texts are drawn."""
        return self.teacher_share * self.teacher.softmax(1) + (1 - self.teacher_share) * self.then.softmax(1)


def world(teacher_share: float = 0.0, moved: float = 0.0) -> World:
    generator = torch.Generator().manual_seed(9)
    teacher, then, change = torch.randn(3, len(PREFIXES), V, generator=generator, dtype=torch.float64)
    return World(teacher, then, (then + moved * change).requires_grad_(), teacher_share)


def plain(exact_weight: float) -> PolicyGradientLoss:
    return PolicyGradientLoss(
        kind="policy_gradient", exact_weight=exact_weight, length_normalization=False, whiten=False, reward_scale=1.0,
        most_reward=None, clip_ratio=None,
    )  # fmt: skip


def places(text: Text) -> tuple[list[int], Tensor]:
    """The beginnings at which its tokens were drawn, and the tokens."""
    return [STATE[text[:length]] for length in range(len(text))], torch.tensor(text)


def losses(one: World, loss: PolicyGradientLoss) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each text the probability of its being drawn, and what ``losses/`` makes of it, summed over its tokens."""
    for text in TEXTS:
        states, targets = places(text)
        column = targets[:, None]
        student, teacher = (logits[states].log_softmax(1).gather(1, column)[:, 0] for logits in (one.then, one.teacher))
        drawn = one.mixture[states].gather(1, column)[:, 0].log()
        tokens = DrawnTokens(student, teacher, drawn, torch.ones(len(text), dtype=torch.bool))
        weights = policy_gradient_weights(tokens, [len(text)], loss).scaled(len(text))
        support = TopkTeacher.from_logits(one.teacher[states], targets, None)
        yield drawn.sum().exp(), distillation_loss(one.now[states], targets, support, weights, loss).loss


def mean_gradient(one: World, loss: PolicyGradientLoss) -> Tensor:
    mean = torch.stack([probability * value for probability, value in losses(one, loss)]).sum()
    (gradient,) = torch.autograd.grad(mean, one.now)
    return gradient


def gradient_of_the_sequences_divergence(one: World) -> Tensor:
    """Of KL(q || p) over whole texts, q the student now."""
    total = torch.zeros((), dtype=torch.float64)
    for text in TEXTS:
        states, targets = places(text)
        q, p = (logits[states].log_softmax(1).gather(1, targets[:, None]).sum() for logits in (one.now, one.teacher))
        total = total + q.exp() * (q - p)
    (gradient,) = torch.autograd.grad(total, one.now)
    return gradient


def gradient_of_each_draw_alone(one: World) -> Tensor:
    """Of how the student draws one token, all before and after it drawn from the mixture, by recursion over beginnings."""
    rewards = one.teacher.log_softmax(1) - one.then.log_softmax(1)
    mixture, total = one.mixture, torch.zeros((), dtype=torch.float64)
    value: dict[Text, float] = {}
    """Mean reward of the rest of a text, where the mixture goes on."""
    for prefix in reversed(PREFIXES):
        state = STATE[prefix]
        to_come = [value.get((*prefix, token), 0.0) if token != END else 0.0 for token in range(V)]
        returns = rewards[state] + torch.tensor(to_come, dtype=torch.float64)
        value[prefix] = float((mixture[state] * returns).sum())
        reached = 1.0
        for length in range(len(prefix)):
            reached *= float(mixture[STATE[prefix[:length]], prefix[length]])
        total = total - reached * (one.now[state].softmax(0) * returns).sum()
    (gradient,) = torch.autograd.grad(total, one.now)
    return gradient


def test_every_text_is_there_once() -> None:
    assert sum(float(probability) for probability, _ in losses(world(0.3), plain(1.0))) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("exact_weight", [0.0, 0.4, 1.0])
def test_it_is_that_of_the_sequences_reverse_kl(exact_weight: float) -> None:
    one = world()
    found, wanted = mean_gradient(one, plain(exact_weight)), gradient_of_the_sequences_divergence(one)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("teacher_share", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("exact_weight", [0.0, 0.4, 1.0])
def test_with_a_mixture_it_is_that_of_each_draw_alone(exact_weight: float, teacher_share: float) -> None:
    one = world(teacher_share)
    found, wanted = mean_gradient(one, plain(exact_weight)), gradient_of_each_draw_alone(one)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    of_sequences = (found - gradient_of_the_sequences_divergence(one)).abs().max()
    assert of_sequences < 1e-9 if teacher_share == 0 else of_sequences > 1e-3, "each token has its own weight alone"


@pytest.mark.parametrize("teacher_share", [0.0, 0.2])
def test_a_student_that_has_moved_has_that_of_each_draw_by_what_it_is_now(teacher_share: float) -> None:
    one = world(teacher_share, moved=0.5)
    torch.testing.assert_close(mean_gradient(one, plain(0.0)), gradient_of_each_draw_alone(one), rtol=1e-9, atol=1e-12)


def test_without_the_weights_a_mixture_would_mislead() -> None:
    one = world(0.2)
    as_if_own = World(one.teacher, one.then, one.now, 0.0)
    drawn = torch.stack([probability for probability, _ in losses(one, plain(0.0))])
    values = torch.stack([value for _, value in losses(as_if_own, plain(0.0))])  # whose weights are all 1
    (found,) = torch.autograd.grad((drawn.detach() * values).sum(), one.now)
    assert (found - gradient_of_each_draw_alone(one)).abs().max() > 0.01
