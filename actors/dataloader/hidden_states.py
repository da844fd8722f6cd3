"""The teacher's last hidden states as a record keeps them, and as a teacher. N targets, H hidden size, V vocabulary."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from actors.records import Example, TeacherScores
from losses.lm_head import LMHead
from losses.teachers import HiddenTeacher

PROVEN_TARGETS = 8
MOST_NATS = 0.1
"""Between what the head makes of the states and what the teacher said, averaged over some targets: states rounded to bfloat16 lie
within a tenth of it, another head's or other layer's lie nats away."""


def bits_of(states: Tensor) -> np.ndarray:
    """Return hidden states [N, H] as their bits in bfloat16, uint16 [N, H]."""
    return states.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


def states_of(bits: np.ndarray) -> Tensor:
    """Return the hidden states, bfloat16 [N, H], of their bits."""
    return torch.from_numpy(np.array(bits, np.uint16).view(np.int16)).view(torch.bfloat16)


def as_hidden_teacher(examples: Sequence[Example], scores: Sequence[TeacherScores], head: LMHead) -> HiddenTeacher:
    """Return the hidden states of some rows, one row after the other, with the head that makes logits of them."""
    states = [one.hidden for one in scores if one.hidden is not None]
    assert len(states) == len(scores), "the log keeps hidden states"
    targets = torch.from_numpy(np.concatenate([example.targets for example in examples]).astype(np.int64))
    return HiddenTeacher(states_of(np.concatenate(states)), head, targets)


@torch.no_grad()
def require_right_head(example: Example, scores: TeacherScores, head: LMHead) -> None:
    """Raise if a row's hidden states times the head do not say of its first targets what the teacher said.

    Raises:
        ValueError: with the distance, and what would do.
    """
    assert scores.hidden is not None, "the log keeps hidden states"
    states = states_of(scores.hidden[:PROVEN_TARGETS]).to(head.weight.device, head.weight.dtype)
    targets = torch.from_numpy(example.targets[:PROVEN_TARGETS].astype(np.int64)).to(states.device)
    found = head.logits(states).float().log_softmax(dim=1).gather(1, targets[:, None])[:, 0].cpu().numpy()
    gap = float(np.abs(found - scores.target_logprob[:PROVEN_TARGETS]).mean())
    if not gap <= MOST_NATS:
        raise ValueError(
            f"row {example.row}: the teacher's head times its hidden states is {gap:.2e} nats from what the teacher said of the "
            f"targets (may {MOST_NATS:g}): its engine does something else on the way to the logits; rollouts.wire=candidates "
            "would do"
        )
