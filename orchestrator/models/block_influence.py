"""How much each layer of a model changes the hidden states that pass through it."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orchestrator.models.layer_cut import blocks_of


@torch.no_grad()
def block_influences(model: PreTrainedModel, rows: Iterable[Tensor]) -> list[float]:
    """Return of each block one minus the mean cosine, over all tokens, of the hidden states before and after it.

    From 0, for a block that changes no direction, to 2. ShortGPT (arXiv 2403.03853), equation 1. Rows, int64 [T] each, pass the
    model one by one.
    """
    blocks = blocks_of(model)
    cosines = torch.zeros(len(blocks), dtype=torch.float64)
    hooks = [
        block.register_forward_hook(partial(_add_cosines, cosines, position), with_kwargs=True)
        for position, block in enumerate(blocks)
    ]
    tokens = 0
    try:
        for row in rows:
            model(input_ids=row[None], use_cache=False)
            tokens += len(row)
    finally:
        for hook in hooks:
            hook.remove()
    assert tokens, "there are rows to measure on"
    return (1 - cosines / tokens).tolist()


def _add_cosines(
    cosines: Tensor, position: int, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
) -> None:  # fmt: skip
    before = inputs[0] if inputs else named["hidden_states"]
    after = output if isinstance(output, Tensor) else output[0]
    cosines[position] += torch.cosine_similarity(before.double(), after.double(), dim=-1).sum()
