"""What a decoder keeps for its backward pass, found by running it on torch's meta device: shapes without numbers.

B rows, T tokens of a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from actors.student.model import plain_model

PRODUCTS = (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm)
"""What autocast does in 16 bits, as far as decoders use it."""


def saved_bytes(model: PreTrainedModel, rows: int, tokens: int, bfloat16: bool) -> int:
    """Return how many bytes the decoder of a model on the meta device keeps for its backward pass, weights aside.

    Under ``bfloat16`` that includes the weights' 16-bit copies. Rows count as padded, so that attention has a mask, and
    attention as one kernel that keeps no [T, T] matrix but that mask, in its inputs' type: that of the CPU, or a
    memory-efficient one on GPUs.

    Args:
        model: on the meta device, in training mode; gradient checkpointing and adapters as it has them.
        rows: B, of the forward pass.
        tokens: T, padding included.
        bfloat16: whether the pass runs under autocast.
    """
    device = torch.device("meta")
    weights = [weight.untyped_storage() for weight in model.parameters()]
    known, kept = {id(storage) for storage in weights}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in known:
            kept[id(storage)] = storage  # held, so that no other storage gets its id
        return tensor

    token_ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device=device)  # as the library makes it of [B, T]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _AsOnADevice(bfloat16):
        plain_model(model).get_decoder()(input_ids=token_ids, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


class _AsOnADevice(TorchFunctionMode):
    """Does on the meta device what real ones do and it does not: autocast's types, and attention in one kernel."""

    def __init__(self, bfloat16: bool) -> None:
        self._bfloat16 = bfloat16
        self._copies: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = (self._cast(tensor) for tensor in args[:3])
            return _Attention.apply(query, key, value, kwargs.get("attn_mask"))
        if func in PRODUCTS:
            args = [self._cast(one) for one in args]
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        """Return a tensor in 16 bits; a weight's copy is made once, as autocast does."""
        if not self._bfloat16 or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(torch.bfloat16)
        return self._copies.setdefault(id(value), value.to(torch.bfloat16))


class _Attention(torch.autograd.Function):
    """Keeps what a fused attention keeps: inputs, output, mask, and one number for each head and token."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = torch.empty_like(query)
        normalizer = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normalizer, *([] if mask is None else [mask.to(query.dtype)]))
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Any:
        """Never called: nothing is learned on the meta device."""
        raise AssertionError("the activations are counted, not used")
