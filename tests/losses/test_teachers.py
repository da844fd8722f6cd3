"""Teachers that say everything: logits, or hidden states with their head. N targets, H hidden size, V vocabulary."""

import math

import pytest
import torch
from torch import Tensor

from losses.config import AtkdLoss, CoupledLoss, LossConfig
from losses.distillation import distillation_loss
from losses.divergence_config import JensenShannon
from losses.fused_linear import chunked_distillation_loss
from losses.lm_head import LMHead
from losses.teachers import DenseTeacher, HiddenTeacher, Teacher
from losses.token_weights import TokenWeights, split_easy, token_weights
from losses.topk_teacher import TopkTeacher
from losses.weighing_config import DistantTokens
from tests.losses.comparisons import ONE_OF_EACH, Case, random_tokens
from tests.reference import formulas

LOSSES: list[LossConfig] = [
    AtkdLoss(kind="atkd", cross_entropy_weight=0.1),
    CoupledLoss(kind="coupled", divergence=JensenShannon()),
    CoupledLoss(kind="coupled", tokens=DistantTokens(fraction=0.4)),
]
ROWS = (3, 5, 1, 2)  # targets of each row of the eleven


def hidden_teacher(count: int = 11, bias: bool = True, softcap: float | None = None) -> HiddenTeacher:
    """Hidden states of size 6 and a head over 17 tokens, in float64."""
    generator = torch.Generator().manual_seed(12)
    hidden, weight, of_tokens = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((count, 6), (17, 6), (17,))
    )
    targets = torch.randint(17, (count,), generator=generator)
    return HiddenTeacher(hidden, LMHead(weight, of_tokens if bias else None, scale=0.7, softcap=softcap), targets)


def weights_of(teacher: Teacher, loss: LossConfig) -> TokenWeights:
    easy = split_easy(teacher.uncertainty, loss, seed=0) if isinstance(loss, AtkdLoss) else None
    return token_weights(teacher.uncertainty, loss, easy)


@pytest.mark.parametrize("spread", [0.1, 2.0, 30.0])
@pytest.mark.parametrize("count", [0, 1, 7, 600])
def test_uncertainty_is_the_mass_off_the_target(count: int, spread: float) -> None:
    logits, _, targets = random_tokens(count, vocab_size=9, spread=spread, seed=13)
    expected = [formulas.uncertainty(row, g) for row, g in zip(logits.tolist(), targets.tolist(), strict=True)]
    ours = DenseTeacher(logits, targets).uncertainty
    assert ours.dtype == torch.float64 and ours.tolist() == pytest.approx(expected, rel=1e-9)
    half = DenseTeacher(logits.to(torch.bfloat16), targets).uncertainty
    assert half.dtype == torch.float32 and half.shape == (count,)


def test_uncertainty_survives_a_saturated_target() -> None:
    logits = [200.0, 0.0, -1.0]
    unsure = DenseTeacher(torch.tensor([logits], dtype=torch.float64), torch.tensor([0])).uncertainty
    assert unsure.item() == pytest.approx(formulas.uncertainty(logits, 0), rel=1e-9, abs=0)
    alone = DenseTeacher(torch.tensor([[0.0, -math.inf, -math.inf]]), torch.tensor([0])).uncertainty
    assert 0 <= alone.item() < 1e-30, "a target that has all mass is certain"


def test_the_uncertainty_of_hidden_states_is_that_of_their_logits() -> None:
    teacher = hidden_teacher(count=600)
    torch.testing.assert_close(
        teacher.uncertainty, DenseTeacher(teacher.head.logits(teacher.hidden), teacher.targets).uncertainty
    )
    assert len(hidden_teacher(count=0).uncertainty) == 0


@pytest.mark.parametrize("index", [slice(1, 4), torch.tensor([3, 0]), torch.arange(7) % 2 == 0], ids=["slice", "ids", "mask"])
def test_select_keeps_rows_together(index: slice | Tensor) -> None:
    hidden = hidden_teacher(count=7)
    logits, targets = hidden.head.logits(hidden.hidden)[index], hidden.targets[index]
    for teacher in (hidden.dense().select(index), hidden.select(index).dense(), hidden.dense().to("cpu").select(index)):
        torch.testing.assert_close(teacher.logits, logits)
        assert torch.equal(teacher.targets, targets) and len(teacher) == len(targets)
    assert len(hidden.select(index)) == len(targets)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_dense_logits_say_what_a_support_of_all_tokens_says(case: Case) -> None:
    teacher, student, targets = random_tokens(count=7, vocab_size=11, seed=14)
    dense = case.values(DenseTeacher(teacher, targets), student, targets, "renormalize")
    torch.testing.assert_close(dense, case.values(TopkTeacher.from_logits(teacher, targets), student, targets))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("loss", LOSSES, ids=["atkd", "jensen_shannon", "hellinger"])
def test_hidden_states_teach_what_their_logits_teach(loss: LossConfig, softcap: float | None) -> None:
    teacher = hidden_teacher(softcap=softcap)
    dense = DenseTeacher(teacher.head.logits(teacher.hidden), teacher.targets)
    generator = torch.Generator().manual_seed(15)
    hidden, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((11, 4), (17, 4)))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    weights = weights_of(dense, loss)
    expected = distillation_loss(hidden @ weight.T, dense.targets, dense, weights, loss, row_counts=ROWS).loss
    gradients = torch.autograd.grad(expected, leaves)
    assert expected.item() > 0.01
    for other in (teacher, dense):
        whole = distillation_loss(hidden @ weight.T, dense.targets, other, weights, loss, row_counts=ROWS).loss
        chunked = [
            chunked_distillation_loss(
                hidden, LMHead(weight), dense.targets, other, weights, loss, row_counts=ROWS, chunk_targets=size
            ).loss
            for size in (1, 4, 11, 100)
        ]
        for ours in (whole, *chunked):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)
            torch.testing.assert_close(torch.autograd.grad(ours, leaves), gradients, rtol=1e-9, atol=1e-12)


def test_states_in_16_bits_make_logits_in_the_heads_type_whatever_autocast_is_set_to() -> None:
    exact = hidden_teacher()
    head = exact.head.to(torch.float32)
    rounded = HiddenTeacher(exact.hidden.to(torch.bfloat16), head, exact.targets)
    expected = head.logits(exact.hidden.to(torch.bfloat16).float())
    torch.testing.assert_close(rounded.dense().logits, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rounded.dense().logits, rounded.select(slice(None)).dense().logits)
        torch.testing.assert_close(rounded.dense().logits, expected)


def test_nothing_flows_into_the_teachers_head() -> None:
    teacher = hidden_teacher()
    teacher.hidden.requires_grad_(), teacher.head.weight.requires_grad_()
    student = torch.randn(11, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(16)).requires_grad_()
    loss = LOSSES[1]
    sums = distillation_loss(student, teacher.targets, teacher, weights_of(teacher, loss), loss)
    used = torch.autograd.grad(sums.loss, [student, teacher.hidden, teacher.head.weight], allow_unused=True)
    assert [gradient is not None for gradient in used] == [True, False, False]


LOGITS, _, TARGETS = random_tokens(count=3, vocab_size=5)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (LOGITS[0], TARGETS, r"teacher.logits has the shape \[5\]; it must be \[N, V\]"),
        (LOGITS, TARGETS[:2], r"targets has the shape \[2\]; with 3 rows in teacher.logits it must be \[3\]"),
        (LOGITS, TARGETS + 5, "targets holds .*; ids of a vocabulary of 5 tokens are 0 to 4"),
    ],
)
def test_logits_of_the_wrong_shape(logits: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseTeacher(logits, targets)


def with_value(place: tuple[int, int], value: float) -> Tensor:
    logits = LOGITS.clone()
    logits[place] = value
    return logits


@pytest.mark.parametrize(
    ("logits", "targets", "vocab_size", "message"),
    [
        (LOGITS, TARGETS[:2], 5, "teacher has 3 rows, but there are 2 targets; they must be as many"),
        (LOGITS, TARGETS, 6, "teacher has a vocabulary of 5 tokens, but the student one of 6; they must agree"),
        (LOGITS, (TARGETS + torch.tensor([0, 1, 1])) % 5, 5, "teacher.targets of row 1 is .*, but the target is "),
        (with_value((1, 2), math.nan), TARGETS, 5, "teacher.logits holds a row whose largest value is nan; it must be finite"),
        (with_value((1, 2), math.inf), TARGETS, 5, "teacher.logits holds a row whose largest value is inf; it must be finite"),
        (torch.full((3, 5), -math.inf), TARGETS, 5, "teacher.logits holds a row whose largest value is -inf; it must be finite"),
        (
            with_value((2, int(TARGETS[2])), -math.inf), TARGETS, 5,
            f"teacher.logits of row 2 is -inf at its target {int(TARGETS[2])}; .* of the target must be finite",
        ),
    ],
)  # fmt: skip
def test_logits_no_teacher_can_have_said(logits: Tensor, targets: Tensor, vocab_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseTeacher(logits, TARGETS).check(targets, vocab_size)


def test_what_is_right_passes_the_check() -> None:
    excluded = with_value((0, (int(TARGETS[0]) + 1) % 5), -math.inf)
    DenseTeacher(excluded, TARGETS).check(TARGETS, 5)
    teacher = hidden_teacher()
    teacher.check(teacher.targets, 17)


def test_hidden_states_that_do_not_fit() -> None:
    teacher = hidden_teacher(count=3)
    hidden, head, targets = teacher.hidden, teacher.head, teacher.targets
    with pytest.raises(ValueError, match=r"hidden has the shape \[1, 3, 6\]; it must be \[N, H\]"):
        HiddenTeacher(hidden[None], head, targets)
    with pytest.raises(
        ValueError, match=r"head_weight has the shape \[17, 6\]; with hidden states of size 5 it must be \[V, 5\]"
    ):
        HiddenTeacher(hidden[:, :5], head, targets)
    with pytest.raises(ValueError, match=r"targets has the shape \[2\]; with 3 rows in teacher.hidden it must be \[3\]"):
        HiddenTeacher(hidden, head, targets[:2])
    with pytest.raises(ValueError, match="targets holds -1; ids of a vocabulary of 17 tokens are 0 to 16"):
        HiddenTeacher(hidden, head, torch.full((3,), -1))
    with pytest.raises(ValueError, match="teacher has 3 rows, but there are 2 targets"):
        teacher.check(targets[:2], 17)
    with pytest.raises(ValueError, match="teacher has a vocabulary of 17 tokens, but the student one of 18"):
        teacher.check(targets, 18)
    with pytest.raises(ValueError, match="teacher.targets of row 0 is"):
        teacher.check((targets + 1) % 17, 17)
    with pytest.raises(ValueError, match="teacher.hidden holds a value that is not finite; hidden states must be finite"):
        HiddenTeacher(hidden.masked_fill(hidden == hidden[1, 2], math.nan), head, targets).check(targets, 17)


def test_a_loss_checks_its_dense_teacher() -> None:
    weights = token_weights(torch.zeros(3), LOSSES[1])
    with pytest.raises(ValueError, match="teacher has a vocabulary of 5 tokens, but the student one of 6"):
        distillation_loss(torch.zeros(3, 6), TARGETS, DenseTeacher(LOGITS, TARGETS), weights, LOSSES[1])
