"""LMHead and loss chunk by chunk: what it gives is what the whole gives. N targets, H hidden size, V vocabulary."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from losses.config import AtkdLoss, CoupledLoss, HardLabelLoss, LossConfig
from losses.distillation import LossSums, distillation_loss
from losses.divergence_config import ReverseKL
from losses.fused_linear import chunked_distillation_loss
from losses.lm_head import LMHead
from losses.token_weights import TokenWeights, split_easy, token_weights
from losses.topk_teacher import TopkTeacher

LOSSES: list[LossConfig] = [
    AtkdLoss(kind="atkd", cross_entropy_weight=0.1),
    CoupledLoss(kind="coupled", divergence=ReverseKL()),
    HardLabelLoss(kind="hard_label"),
]


def problem(count: int, loss: LossConfig) -> tuple[Tensor, Tensor, Tensor, Tensor, TopkTeacher, TokenWeights]:
    """Hidden states, head weight and bias (leaves), targets, teacher, weights; in float64."""
    generator = torch.Generator().manual_seed(11)
    hidden, head, bias, logits = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((count, 6), (17, 6), (17,), (count, 17))
    )
    targets = torch.randint(17, (count,), generator=generator)
    teacher = TopkTeacher.from_logits(logits, targets, top_k=4)
    easy = split_easy(teacher.uncertainty, loss, seed=0) if isinstance(loss, AtkdLoss) else None
    weights = token_weights(teacher.uncertainty, loss, easy)
    return hidden.requires_grad_(), head.requires_grad_(), bias.requires_grad_(), targets, teacher, weights


@pytest.mark.parametrize("chunk_targets", [1, 3, 10, 11, 1024])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
def test_chunks_give_the_value_and_gradients_of_the_whole(loss: LossConfig, with_bias: bool, chunk_targets: int) -> None:
    hidden, head, bias, targets, teacher, weights = problem(11, loss)
    leaves = [hidden, head, bias] if with_bias else [hidden, head]
    used_bias = bias if with_bias else None
    whole = distillation_loss(torch.nn.functional.linear(hidden, head, used_bias), targets, teacher, weights, loss)
    expected = torch.autograd.grad(whole.loss, leaves)
    sums = chunked_distillation_loss(
        hidden, LMHead(head, used_bias), targets, teacher, weights, loss, chunk_targets=chunk_targets
    )
    for field in fields(LossSums):
        torch.testing.assert_close(getattr(sums, field.name), getattr(whole, field.name), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(sums.loss, leaves), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
def test_no_targets_give_a_zero_loss_that_still_reaches_hidden_and_head(loss: LossConfig) -> None:
    hidden, head, _, targets, teacher, weights = problem(0, loss)
    sums = chunked_distillation_loss(hidden, LMHead(head), targets, teacher, weights, loss)
    assert sums.loss.item() == 0 and sums.targets.item() == 0
    sums.loss.backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 6)
    assert head.grad is not None and not head.grad.any()


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_no_tensor_of_all_targets_and_the_vocabulary_ever_exists() -> None:
    hidden, head, _, targets, teacher, weights = problem(200, LOSSES[0])
    with LargestTensor() as watched:
        chunked_distillation_loss(hidden, LMHead(head), targets, teacher, weights, LOSSES[0], chunk_targets=10).loss.backward()
    assert watched.elements == hidden.numel() < 200 * 17, "the hidden states' own gradient is the largest"


def test_no_gradient_is_needed_to_evaluate() -> None:
    hidden, head, _, targets, teacher, weights = problem(11, LOSSES[0])
    with torch.no_grad():
        sums = chunked_distillation_loss(hidden, LMHead(head), targets, teacher, weights, LOSSES[0], chunk_targets=4)
    assert not sums.loss.requires_grad and sums.loss.item() > 0


def test_half_precision_under_autocast() -> None:
    hidden, head, _, targets, teacher, weights = problem(11, LOSSES[0])
    expected = chunked_distillation_loss(hidden, LMHead(head), targets, teacher, weights, LOSSES[0]).loss
    hidden32, head32 = hidden.detach().float().requires_grad_(), head.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_distillation_loss(hidden32, LMHead(head32), targets, teacher, weights, LOSSES[0], chunk_targets=4).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    (expected_gradient,) = torch.autograd.grad(expected, head)
    assert head32.grad is not None
    torch.testing.assert_close(head32.grad.double(), expected_gradient, rtol=0.1, atol=0.02)


def test_arguments_that_do_not_fit_the_head() -> None:
    loss = LOSSES[0]
    hidden, head, bias, targets, teacher, weights = problem(3, loss)
    with pytest.raises(ValueError, match=r"hidden has the shape \[1, 3, 6\]; it must be \[N, H\]"):
        chunked_distillation_loss(hidden[None], LMHead(head), targets, teacher, weights, loss)
    with pytest.raises(ValueError, match=r"head_weight has the shape \[6, 17\]; .* of size 6 it must be \[V, 6\]"):
        chunked_distillation_loss(hidden, LMHead(head.T), targets, teacher, weights, loss)
    with pytest.raises(ValueError, match=r"head_bias has the shape \[5\]; it must be \[17\], or None"):
        chunked_distillation_loss(hidden, LMHead(head, bias[:5]), targets, teacher, weights, loss)
    with pytest.raises(ValueError, match=r"targets has the shape \[2\]; with 3 rows in hidden it must be \[3\]"):
        chunked_distillation_loss(hidden, LMHead(head), targets[:2], teacher, weights, loss)
    with pytest.raises(ValueError, match="targets holds 17; ids of a vocabulary of 17 tokens are 0 to 16"):
        chunked_distillation_loss(hidden, LMHead(head), targets.clone().fill_(17), teacher, weights, loss)
    with pytest.raises(ValueError, match="chunk_targets is 0; it must be at least 1"):
        chunked_distillation_loss(hidden, LMHead(head), targets, teacher, weights, loss, chunk_targets=0)


def test_micro_batches_add_up_in_the_gradients() -> None:
    hidden, head, bias, targets, teacher, weights = problem(11, LOSSES[0])
    whole = chunked_distillation_loss(hidden, LMHead(head, bias), targets, teacher, weights, LOSSES[0]).loss
    expected = torch.autograd.grad(whole, [hidden, head, bias])
    for part in (slice(0, 4), slice(4, 4), slice(4, 11)):
        args = hidden[part], LMHead(head, bias), targets[part], teacher.select(part), weights.select(part), LOSSES[0]
        chunked_distillation_loss(*args, chunk_targets=2).loss.backward()
    torch.testing.assert_close([hidden.grad, head.grad, bias.grad], list(expected), rtol=1e-9, atol=1e-12)


def test_it_runs_between_the_parts_of_a_compiled_module() -> None:
    hidden, head, _, targets, teacher, weights = problem(11, LOSSES[0])
    trunk = torch.nn.Linear(6, 6, dtype=torch.float64)

    def loss_of(inputs: Tensor) -> Tensor:
        last = torch.tanh(trunk(inputs))
        return chunked_distillation_loss(last, LMHead(head), targets, teacher, weights, LOSSES[0], chunk_targets=4).loss

    leaves = [hidden, head, trunk.weight]
    expected = loss_of(hidden)
    compiled = torch.compile(loss_of, backend="aot_eager")(hidden)  # the tracing is what is on trial, not the code generator
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
def test_a_gpu_gives_what_the_cpu_gives(loss: LossConfig) -> None:
    hidden, head, bias, targets, teacher, weights = problem(11, loss)
    expected = torch.autograd.grad(
        chunked_distillation_loss(hidden, LMHead(head, bias), targets, teacher, weights, loss).loss, [hidden, head, bias]
    )
    there = [leaf.detach().cuda().requires_grad_() for leaf in (hidden, head, bias)]
    sums = chunked_distillation_loss(
        there[0], LMHead(there[1], there[2]), targets.cuda(), teacher.to("cuda"), weights.to("cuda"), loss, chunk_targets=4
    )
    found = [gradient.cpu() for gradient in torch.autograd.grad(sums.loss, there)]
    torch.testing.assert_close(found, list(expected), rtol=1e-9, atol=1e-12)


def test_the_gradient_of_a_16_bit_head_loses_nothing_over_many_chunks() -> None:
    """Its parts are summed in float32: rounded once, at the end, and not with every chunk."""
    hidden, head, _, targets, teacher, weights = (
        value if not isinstance(value, Tensor) else value.detach() for value in problem(600, LOSSES[2])
    )
    in_16_bits = [hidden.bfloat16(), head.bfloat16()]
    exact_leaf = in_16_bits[1].double().requires_grad_()
    whole = distillation_loss(in_16_bits[0].double() @ exact_leaf.T, targets, teacher, weights, LOSSES[2])
    (exact,) = torch.autograd.grad(whole.loss, exact_leaf)
    leaf = in_16_bits[1].requires_grad_()
    sums = chunked_distillation_loss(in_16_bits[0], LMHead(leaf), targets, teacher, weights, LOSSES[2], chunk_targets=2)
    (found,) = torch.autograd.grad(sums.loss, leaf)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() / exact.norm() < 5e-3
