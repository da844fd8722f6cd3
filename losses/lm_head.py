"""The output head: from hidden states to logits. N targets, H hidden size, V vocabulary."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear


@dataclass(frozen=True)
class LMHead:
    """logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), where the model has these parts.

    Raises:
        ValueError: if the parts do not fit each other, naming the argument, its shape or value and the right one.
    """

    weight: Tensor
    """[V, H]; may be tied to the input embeddings."""

    bias: Tensor | None = None
    """[V], or None."""

    scale: float = 1.0
    """Factor of the logits, where an architecture has one."""

    softcap: float | None = None
    """Bound of the logits, where an architecture squeezes them by a tanh."""

    def __post_init__(self) -> None:
        if isinstance(self.weight, DTensor):
            raise ValueError(
                f"head_weight is a DTensor of the shape {list(self.weight.shape)}; compute the loss within the forward of the "
                "module that fully_shard wraps, where the weight is whole, or pass head_weight.full_tensor()"
            )
        if self.weight.dim() != 2:
            raise ValueError(f"head_weight has the shape {list(self.weight.shape)}; it must be [V, H]")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"head_bias has the shape {list(self.bias.shape)}; it must be [{len(self.weight)}], or None")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap is {self.softcap}; it must be above 0, or None")

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.weight)

    def check(self, hidden: Tensor) -> None:
        """Raise if hidden states are not [N, H].

        Raises:
            ValueError: naming the shape and the right one.
        """
        if hidden.dim() != 2:
            raise ValueError(f"hidden has the shape {list(hidden.shape)}; it must be [N, H]")
        if self.weight.shape[1] != hidden.shape[1]:
            shape, size = list(self.weight.shape), hidden.shape[1]
            raise ValueError(f"head_weight has the shape {shape}; with hidden states of size {size} it must be [V, {size}]")

    def to(self, dtype: torch.dtype) -> "LMHead":
        """Return the head in another type; without a copy where it has it already."""
        return replace(self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [N, V] of hidden states [N, H]."""
        logits = linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def logits_into(self, buffer: Tensor, hidden: Tensor) -> Tensor:
        """Write the logits [n, V] of hidden states [n, H] over the first rows of a buffer; return those rows."""
        logits = buffer[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.T, out=logits)
        else:
            torch.addmm(self.bias, hidden, self.weight.T, out=logits)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def linear_gradient(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Return, of the gradient [n, V] of the logits [n, V], that of ``hidden @ weight.T + bias``; the first may be used up."""
        if self.softcap is not None:
            gradient = gradient.mul_(1 - (logits / self.softcap).square_())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)
