"""Operations of a decoder for one token, by arithmetic: what plans assume, and what training workers are measured against."""

from typing import Protocol

import numpy as np


class DecoderShape(Protocol):
    """What the operations depend on of one model. Weights that are tied count once."""

    @property
    def weights(self) -> int:
        """Weights in all."""

    @property
    def trained(self) -> int:
        """Weights that learn."""

    @property
    def layers(self) -> int:
        """Decoder blocks."""

    @property
    def block_weights(self) -> int:
        """Weights of all blocks together."""

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""

    @property
    def head_weights(self) -> int:
        """Weights of the output head."""

    @property
    def trains_head(self) -> bool:
        """Whether the output head learns."""


def mean_context(lengths: np.ndarray) -> float:
    """Return the tokens of the row in which a token stands, on average over tokens; ``lengths`` int64 [rows]."""
    return float((lengths.astype(float) ** 2).sum() / lengths.sum())


def blocks_flops(shape: DecoderShape, context: float) -> float:
    """Return the operations of all blocks forward: two for each weight, and attention over, on average, half a row.

    Args:
        context: tokens of a token's own row, as ``mean_context`` has them.
    """
    return 2 * shape.block_weights + shape.layers * 4 * shape.hidden_size * context / 2


def head_flops(shape: DecoderShape, share: float = 1.0) -> float:
    """Return the operations of the output head forward; ``share`` of the tokens is multiplied by it."""
    return 2 * shape.head_weights * share


def learning_flops(shape: DecoderShape, context: float, target_share: float) -> float:
    """Return the operations of forward and backward pass, without those that gradient checkpointing repeats.

    Backwards each weight is met twice, for its own gradient and for that of its input; a frozen one once.

    Args:
        context: tokens of a token's own row, as ``mean_context`` has them.
        target_share: targets for each token; the output head is multiplied by these alone.
    """
    frozen = shape.trained < shape.weights / 2
    blocks, head = blocks_flops(shape, context), head_flops(shape, target_share)
    return blocks * (2 if frozen else 3) + head * (3 if shape.trains_head else 2)
