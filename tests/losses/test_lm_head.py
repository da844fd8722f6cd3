"""The output head within the chunked loss: value and gradients are those of its logits. H hidden size, V vocabulary."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from losses.config import CoupledLoss
from losses.distillation import distillation_loss
from losses.divergence_config import SkewReverseKL
from losses.fused_linear import chunked_distillation_loss
from losses.lm_head import LMHead
from losses.teachers import DenseTeacher
from losses.token_weights import token_weights

LOSS = CoupledLoss(kind="coupled", divergence=SkewReverseKL(), cross_entropy_weight=0.2)
PARTS = [(1.0, None), (0.25, None), (1.0, 3.0), (0.25, 0.5), (-2.0, 30.0)]  # scale and softcap
Problem = tuple[Tensor, Tensor, Tensor, DenseTeacher]


def problem(count: int = 11) -> Problem:
    """Hidden states, head weight and bias (leaves) and a teacher; in float64."""
    generator = torch.Generator().manual_seed(17)
    hidden, weight, bias, logits = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((count, 6), (17, 6), (17,), (count, 17))
    )
    teacher = DenseTeacher(logits, torch.randint(17, (count,), generator=generator))
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), teacher


def whole(hidden: Tensor, head: LMHead, teacher: DenseTeacher) -> Tensor:
    weights = token_weights(teacher.uncertainty, LOSS)
    return distillation_loss(head.logits(hidden), teacher.targets, teacher, weights, LOSS).loss


def chunked(hidden: Tensor, head: LMHead, teacher: DenseTeacher, chunk_targets: int = 4) -> Tensor:
    weights = token_weights(teacher.uncertainty, LOSS)
    return chunked_distillation_loss(hidden, head, teacher.targets, teacher, weights, LOSS, chunk_targets=chunk_targets).loss


@pytest.mark.parametrize(("scale", "softcap"), PARTS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_logits_follow_the_formula(with_bias: bool, scale: float, softcap: float | None) -> None:
    hidden, weight, bias, _ = (value.detach() if isinstance(value, Tensor) else value for value in problem())
    assert isinstance(hidden, Tensor) and isinstance(weight, Tensor) and isinstance(bias, Tensor)
    head = LMHead(weight, bias if with_bias else None, scale, softcap)
    linear = scale * (hidden @ weight.T + (bias if with_bias else 0.0))
    expected = linear if softcap is None else softcap * torch.tanh(linear / softcap)
    torch.testing.assert_close(head.logits(hidden), expected)
    buffer = torch.full((13, 17), torch.nan, dtype=torch.float64)
    torch.testing.assert_close(head.logits_into(buffer, hidden), expected)
    assert buffer[11:].isnan().all(), "only the first rows are written"


@pytest.mark.parametrize("chunk_targets", [1, 3, 10, 11, 1000])
@pytest.mark.parametrize(("scale", "softcap"), PARTS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunks_give_the_gradients_of_every_part(
    with_bias: bool, scale: float, softcap: float | None, chunk_targets: int
) -> None:
    hidden, weight, bias, teacher = problem()
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    head = LMHead(weight, bias if with_bias else None, scale, softcap)
    expected, ours = whole(hidden, head, teacher), chunked(hidden, head, teacher, chunk_targets)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)
    gradients = torch.autograd.grad(expected, leaves)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("bias",), ("weight", "bias"), ("hidden", "weight")], ids="-".join)
def test_frozen_parts_get_no_gradient_and_the_others_theirs(frozen: tuple[str, ...]) -> None:
    hidden, weight, bias, teacher = problem()
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    expected = dict(
        zip(leaves, torch.autograd.grad(whole(hidden, LMHead(weight, bias), teacher), [*leaves.values()]), strict=True)
    )
    for name in frozen:
        leaves[name].requires_grad_(False)
    chunked(hidden, LMHead(weight, bias), teacher).backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name in frozen), name
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-9, atol=1e-12)


def test_all_parts_frozen_leave_a_value_alone() -> None:
    hidden, weight, _, teacher = problem()
    ours = chunked(hidden.detach(), LMHead(weight.detach()), teacher)
    assert not ours.requires_grad
    torch.testing.assert_close(ours, whole(hidden, LMHead(weight), teacher).detach())


def test_backward_twice_adds_the_gradients_twice() -> None:
    hidden, weight, bias, teacher = problem()
    leaves = [hidden, weight, bias]
    once = torch.autograd.grad(whole(hidden, LMHead(weight, bias), teacher), leaves)
    ours = chunked(hidden, LMHead(weight, bias), teacher)
    ours.backward(retain_graph=True)
    (-3 * ours).backward()
    for leaf, gradient in zip(leaves, once, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, -2 * gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("factor", [0.0, 0.5, -3.0])
def test_a_factor_of_the_loss_is_one_of_its_gradients(factor: float) -> None:
    hidden, weight, bias, teacher = problem()
    leaves = [hidden, weight, bias]
    expected = torch.autograd.grad(factor * whole(hidden, LMHead(weight, bias), teacher), leaves)
    ours = torch.autograd.grad(factor * chunked(hidden, LMHead(weight, bias), teacher), leaves)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_a_weight_tied_to_the_embeddings_gets_both_gradients() -> None:
    _, weight, _, teacher = problem()
    ids = torch.arange(11) % 17
    (expected,) = torch.autograd.grad(whole(weight[ids].tanh(), LMHead(weight), teacher), weight)
    (ours,) = torch.autograd.grad(chunked(weight[ids].tanh(), LMHead(weight), teacher), weight)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_another_type_is_that_of_weight_and_bias() -> None:
    _, weight, bias, _ = problem()
    head = LMHead(weight, bias, 0.5, 3.0).to(torch.bfloat16)
    assert head.bias is not None and head.weight.dtype == head.bias.dtype == torch.bfloat16
    assert (head.scale, head.softcap, head.vocab_size) == (0.5, 3.0, 17)
    assert LMHead(weight).to(torch.float32).bias is None


@pytest.mark.parametrize(
    ("weight", "bias", "softcap", "message"),
    [
        (torch.zeros(17), None, None, r"head_weight has the shape \[17\]; it must be \[V, H\]"),
        (torch.zeros(17, 6), torch.zeros(6), None, r"head_bias has the shape \[6\]; it must be \[17\], or None"),
        (torch.zeros(17, 6), None, 0.0, "softcap is 0.0; it must be above 0, or None"),
        (torch.zeros(17, 6), None, -1.0, "softcap is -1.0; it must be above 0, or None"),
        (torch.zeros(17, 6), None, float("nan"), "softcap is nan; it must be above 0, or None"),
    ],
)
def test_parts_that_do_not_fit_each_other(weight: Tensor, bias: Tensor | None, softcap: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LMHead(weight, bias, softcap=softcap)


def test_hidden_states_that_do_not_fit_the_head() -> None:
    head = LMHead(torch.zeros(17, 6))
    head.check(torch.zeros(0, 6))
    with pytest.raises(ValueError, match=r"hidden has the shape \[6\]; it must be \[N, H\]"):
        head.check(torch.zeros(6))
    with pytest.raises(
        ValueError, match=r"head_weight has the shape \[17, 6\]; with hidden states of size 4 it must be \[V, 4\]"
    ):
        head.check(torch.zeros(3, 4))


def test_a_sharded_weight_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(torch.zeros(4, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match=r"head_weight is a DTensor of the shape \[4, 2\]; .* head_weight.full_tensor\(\)"):
            LMHead(weight)
        assert LMHead(weight.full_tensor()).vocab_size == 4
    finally:
        dist.destroy_process_group()
