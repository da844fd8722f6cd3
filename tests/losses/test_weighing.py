"""Which tokens are taught and how much rows count: against the slow reading and by hand. N targets, V vocabulary."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losses.config import AtkdLoss, CoupledLoss, Tail, TeacherLoss
from losses.distillation import LossSums, distillation_loss
from losses.fused_linear import chunked_distillation_loss
from losses.lm_head import LMHead
from losses.loss_state import LossState
from losses.teachers import Teacher
from losses.token_weights import TokenWeights, split_easy, token_weights
from losses.weighing import highest_in_rows, kept_count, sample_weights, selection_factor, selection_scores
from losses.weighing_config import (
    AllTokens,
    DistantTokens,
    TeacherLossSamples,
    TokenSelection,
    UncertainStudentTokens,
    UncertainTeacherTokens,
)
from tests.losses.comparisons import ONE_OF_EACH, Case, random_tokens, teacher_of
from tests.reference import divergences, formulas

ROWS = (4, 0, 6, 1, 2)  # targets of each row of the thirteen
SELECTIONS: list[TokenSelection] = [
    UncertainTeacherTokens(kind="teacher_uncertainty", fraction=0.5),
    UncertainStudentTokens(fraction=0.3),
    DistantTokens(fraction=0.6),
]
every_selection = pytest.mark.parametrize("tokens", SELECTIONS, ids=lambda tokens: tokens.kind)


def coupled(tokens: TokenSelection, case: Case | None = None, cross_entropy: float = 0.0, tail: Tail = "bucket") -> TeacherLoss:
    divergence = (case or Case("forward_kl")).config
    return CoupledLoss(kind="coupled", divergence=divergence, tokens=tokens, cross_entropy_weight=cross_entropy, tail=tail)


@pytest.mark.parametrize(
    ("count", "fraction", "kept"),
    [
        (0, 0.5, 0), (1, 0.01, 1), (1, 1.0, 1), (10, 0.2, 2), (10, 0.24, 2), (10, 0.26, 3), (10, 0.01, 1), (10, 0.999, 10),
        (5, 0.5, 2), (7, 0.5, 4),  # a half goes to the even number
    ],
)  # fmt: skip
def test_the_share_of_a_row_is_rounded_and_at_least_one(count: int, fraction: float, kept: int) -> None:
    assert kept_count(count, fraction) == kept


@pytest.mark.parametrize(
    ("rows", "fraction", "factor"),
    [([10, 10], 0.2, 5.0), ([10, 1, 1], 0.2, 3.0), ([10, 0], 1.0, 1.0), ([], 0.2, 1.0), ([0, 0], 0.2, 1.0), ([3], 0.1, 3.0)],
)
def test_taught_tokens_weigh_more_as_the_others_weigh_nothing(rows: list[int], fraction: float, factor: float) -> None:
    assert selection_factor(rows, fraction) == pytest.approx(factor)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), max_size=8), max_size=5), st.floats(0.01, 1.0))
def test_the_highest_of_each_row_are_taught_ties_to_the_earlier(rows: list[list[int]], fraction: float) -> None:
    expected = []
    for row in rows:
        order = sorted(range(len(row)), key=lambda token: (-row[token], token))
        chosen = order[: kept_count(len(row), fraction)]
        expected += [token in chosen for token in range(len(row))]
    scores = torch.tensor([score for row in rows for score in row], dtype=torch.float64)
    taught = highest_in_rows(scores, [len(row) for row in rows], fraction)
    assert taught.dtype == torch.bool and taught.tolist() == expected


def test_rows_that_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="row_counts adds up to 5, but there are 4 targets; they must be as many"):
        highest_in_rows(torch.zeros(4), [2, 3], 0.5)


@pytest.mark.parametrize("spread", [0.1, 2.0, 20.0])
@pytest.mark.parametrize("top_k", [None, 4])
def test_scores_of_uncertain_tokens(top_k: int | None, spread: float) -> None:
    teacher, student, targets = random_tokens(count=9, vocab_size=13, spread=spread, seed=22)
    support = teacher_of(teacher, targets, top_k)
    of_teacher, of_student = (selection_scores(student, targets, support, coupled(tokens)) for tokens in SELECTIONS[:2])
    unsure = [formulas.uncertainty(row, g) for row, g in zip(teacher.tolist(), targets.tolist(), strict=True)]
    assert of_teacher.tolist() == pytest.approx(unsure, rel=1e-9)
    assert of_student.tolist() == pytest.approx([divergences.entropy(row) for row in student.tolist()], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("spread", [0.1, 2.0, 20.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("top_k", [None, 1, 4, 12])
def test_scores_of_distant_tokens(top_k: int | None, tail: Tail, spread: float) -> None:
    teacher, student, targets = random_tokens(count=9, vocab_size=13, spread=spread, seed=23)
    scores = selection_scores(student, targets, teacher_of(teacher, targets, top_k), coupled(SELECTIONS[2], tail=tail))
    expected = []
    for p, q, g in zip(teacher.tolist(), student.tolist(), targets.tolist(), strict=True):
        kept = None if top_k is None else formulas.most_likely_others(p, g, top_k)
        expected.append(divergences.hellinger(*(divergences.read(side, g, kept, tail) for side in (p, q))))
    assert scores.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert scores.max() <= 1


def test_scores_of_half_precision_are_computed_in_float32_and_carry_no_gradient() -> None:
    teacher, student, targets = random_tokens(count=9, vocab_size=13, seed=24)
    logits = student.to(torch.bfloat16).requires_grad_()
    for tokens in SELECTIONS[1:]:
        scores = selection_scores(logits, targets, teacher_of(teacher.float(), targets, 4), coupled(tokens))
        exact = selection_scores(logits.detach().double(), targets, teacher_of(teacher, targets, 4), coupled(tokens))
        assert scores.dtype == torch.float32 and not scores.requires_grad
        torch.testing.assert_close(scores.double(), exact, rtol=1e-4, atol=1e-6)


def test_excluded_tokens_add_nothing_to_the_students_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf], [1.0, -math.inf, -math.inf]])
    teacher = teacher_of(torch.zeros(2, 3), torch.tensor([0, 0]), None)
    scores = selection_scores(logits, torch.tensor([0, 0]), teacher, coupled(SELECTIONS[1]))
    assert scores.tolist() == pytest.approx([math.log(2), 0.0], abs=1e-6)


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("steepness", [0.5, 1.0, 4.0])
def test_rows_weigh_by_the_teachers_own_loss(steepness: float, progress: float) -> None:
    samples = TeacherLossSamples(kind="teacher_loss", steepness=steepness, threshold_start=1.0, threshold_end=3.0)
    losses = [0.0, 0.7, 1.0, 2.5, 3.0, 9.0]
    threshold = 1.0 + 2.0 * progress
    expected = [math.exp(-1 / math.sqrt(math.exp(-steepness * (x - threshold)))) for x in losses]
    ours = sample_weights(torch.tensor(losses, dtype=torch.float64), samples, LossState(progress=progress)).tolist()
    assert ours == pytest.approx(expected, rel=1e-12)
    assert ours == sorted(ours, reverse=True) and 0 <= min(ours) <= max(ours) < 1
    at_threshold = sample_weights(torch.tensor([threshold]), samples, LossState(progress=progress))
    assert at_threshold.item() == pytest.approx(math.exp(-1))


def test_a_row_the_teacher_cannot_do_at_all_weighs_zero_and_not_nan() -> None:
    samples = TeacherLossSamples(kind="teacher_loss", steepness=50.0, threshold_start=0.0, threshold_end=0.0)
    assert sample_weights(torch.tensor([1e4, 0.0]), samples, LossState()).tolist() == pytest.approx([0.0, math.exp(-1)])


Step = tuple[Tensor, Tensor, Tensor, Tensor, Teacher]


def step(top_k: int | None = 4) -> Step:
    """Hidden states and head (leaves), the logits they make, targets and teacher; in float64."""
    teacher, _, targets = random_tokens(count=13, vocab_size=15, seed=25)
    generator = torch.Generator().manual_seed(26)
    hidden, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((13, 6), (15, 6)))
    hidden.requires_grad_(), weight.requires_grad_()
    return hidden, weight, hidden @ weight.T, targets, teacher_of(teacher, targets, top_k)


def weights_of(teacher: Teacher, loss: TeacherLoss) -> TokenWeights:
    easy = split_easy(teacher.uncertainty, loss, seed=0) if isinstance(loss, AtkdLoss) else None
    return token_weights(teacher.uncertainty, loss, easy)


def chosen_by_hand(student: Tensor, targets: Tensor, teacher: Teacher, loss: TeacherLoss, fraction: float) -> Tensor:
    """Positions of the taught tokens, in order."""
    scores = selection_scores(student, targets, teacher, loss).tolist()
    chosen, first = [], 0
    for count in ROWS:
        ranked = sorted(range(first, first + count), key=lambda token: -scores[token])
        chosen += ranked[: kept_count(count, fraction)]
        first += count
    return torch.tensor(sorted(chosen))


def loss_and_gradients(sums: LossSums, leaves: list[Tensor]) -> list[Tensor]:
    return [sums.loss, *torch.autograd.grad(sums.loss, leaves, retain_graph=True)]


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
@every_selection
def test_a_selection_is_the_plain_loss_of_the_tokens_chosen_by_hand(
    tokens: TokenSelection, case: Case, top_k: int | None
) -> None:
    hidden, weight, student, targets, teacher = step(top_k)
    loss, plain = coupled(tokens, case), coupled(AllTokens(), case)
    assert not isinstance(tokens, AllTokens)
    state = LossState(kept_fraction=tokens.fraction, teacher_share=case.state.teacher_share)
    weights, leaves = weights_of(teacher, loss), [hidden, weight]
    chosen = chosen_by_hand(student, targets, teacher, loss, tokens.fraction)
    assert 4 <= len(chosen) < 13
    by_hand = distillation_loss(student[chosen], targets[chosen], teacher.select(chosen), weights.select(chosen), plain, state)
    whole = distillation_loss(student, targets, teacher, weights, loss, state, ROWS)
    chunks = chunked_distillation_loss(hidden, LMHead(weight), targets, teacher, weights, loss, state, ROWS, chunk_targets=5)
    expected = loss_and_gradients(by_hand, leaves)
    for sums in (whole, chunks):
        torch.testing.assert_close(loss_and_gradients(sums, leaves), expected, rtol=1e-9, atol=1e-12)
        assert sums.targets.item() == len(chosen)
        torch.testing.assert_close(sums.divergence, by_hand.divergence, rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
@every_selection
def test_tokens_not_taught_keep_their_cross_entropy(tokens: TokenSelection, case: Case) -> None:
    hidden, weight, student, targets, teacher = step()
    loss, plain = coupled(tokens, case, cross_entropy=0.3), coupled(AllTokens(), case)
    assert not isinstance(tokens, AllTokens)
    state = LossState(kept_fraction=tokens.fraction, teacher_share=case.state.teacher_share)
    weights, leaves = weights_of(teacher, loss), [hidden, weight]
    chosen = chosen_by_hand(student, targets, teacher, loss, tokens.fraction)
    no_cross_entropy = weights_of(teacher, plain).select(chosen)
    of_teacher = distillation_loss(student[chosen], targets[chosen], teacher.select(chosen), no_cross_entropy, plain, state).loss
    expected = of_teacher + 0.3 * torch.nn.functional.cross_entropy(student, targets)
    gradients = torch.autograd.grad(expected, leaves, retain_graph=True)
    for sums in (
        distillation_loss(student, targets, teacher, weights, loss, state, ROWS),
        chunked_distillation_loss(hidden, LMHead(weight), targets, teacher, weights, loss, state, ROWS, chunk_targets=5),
    ):
        # Weights are float32: 0.3 / 13 is known to seven digits.
        torch.testing.assert_close(loss_and_gradients(sums, leaves), [expected, *gradients], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("cross_entropy", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["coupled", "atkd"])
@every_selection
def test_a_step_may_be_cut_between_its_rows(tokens: TokenSelection, kind: str, cross_entropy: float) -> None:
    hidden, weight, student, targets, teacher = step()
    loss: TeacherLoss = coupled(tokens, cross_entropy=cross_entropy)
    if kind == "atkd":
        loss = AtkdLoss(kind="atkd", tokens=tokens, cross_entropy_weight=cross_entropy)
    weights = weights_of(teacher, loss)
    whole = distillation_loss(student, targets, teacher, weights, loss, row_counts=ROWS)
    for rows in ([ROWS[:1], ROWS[1:]], [ROWS[:3], ROWS[3:]], [(count,) for count in ROWS]):
        parts, first = [], 0
        for counts in rows:
            part = slice(first, first := first + sum(counts))
            arguments = targets[part], teacher.select(part), weights.select(part), loss
            parts.append(distillation_loss(student[part], *arguments, row_counts=counts))
        total = sum(parts[1:], start=parts[0])
        for field in fields(LossSums):
            torch.testing.assert_close(getattr(total, field.name), getattr(whole, field.name), rtol=1e-9, atol=1e-12)
        expected, ours = (torch.autograd.grad(sums.loss, hidden, retain_graph=True) for sums in (whole, total))
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@every_selection
def test_the_state_says_how_many_are_taught(tokens: TokenSelection) -> None:
    _, _, student, targets, teacher = step()
    loss = coupled(tokens)
    weights = weights_of(teacher, loss)
    everything = distillation_loss(student, targets, teacher, weights, loss, LossState(kept_fraction=1.0), ROWS)
    plain = distillation_loss(student, targets, teacher, weights, coupled(AllTokens()))
    torch.testing.assert_close(everything.loss, plain.loss)
    fewest = distillation_loss(student, targets, teacher, weights, loss, LossState(kept_fraction=0.01), ROWS)
    assert fewest.targets.item() == 4, "one of each row that has any"


@every_selection
def test_rows_must_be_known_to_rank_their_targets(tokens: TokenSelection) -> None:
    hidden, weight, student, targets, teacher = step()
    loss = coupled(tokens)
    rest = targets, teacher, weights_of(teacher, loss), loss
    for rows, message in (
        (None, f"row_counts is None, but tokens {tokens.kind} ranks the targets of each row: pass the number of targets"),
        ((4, 8), "row_counts adds up to 12, but there are 13 targets; they must be as many"),
    ):
        with pytest.raises(ValueError, match=message):
            distillation_loss(student, *rest, row_counts=rows)
        with pytest.raises(ValueError, match=message):
            chunked_distillation_loss(hidden, LMHead(weight), *rest, row_counts=rows)
