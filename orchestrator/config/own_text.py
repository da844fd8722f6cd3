"""Which losses take their targets for tokens that models drew, and what of a run's rollouts they need. Imports no torch."""

from collections.abc import Mapping

from actors.config.rollouts import RolloutsConfig
from losses.config import DistillationLoss, LossConfig, PolicyGradientLoss

OWN_TEXT_ALONE = {"student_share": 1.0, "temperature": 1.0, "top_p": 1.0, "adaptive_share": None, "replay": None}
"""Rollouts all of whose rows the student draws as it is, from its own distribution."""


def require_own_text(loss: LossConfig, rollouts: RolloutsConfig | None) -> None:
    """Raise if the loss takes the targets for tokens that models drew, and they are not.

    Raises:
        ValueError: naming the keys, their values, and what would do.
    """
    if isinstance(loss, PolicyGradientLoss):
        require_drawn_rows(loss, rollouts)
    if not isinstance(loss, DistillationLoss) or loss.divergence.kind != "sampled_reverse_kl":
        return
    if seen := other_rollouts(rollouts, OWN_TEXT_ALONE):
        raise ValueError(
            "loss.divergence sampled_reverse_kl takes all targets for tokens that the student drew from its own "
            f"distribution, but {seen}; rollouts={{student_share: 1.0}} at temperature 1 and top_p 1 would do, or "
            "loss.divergence=reverse_kl"
        )
    if rollouts is not None and rollouts.teacher_share > 0:
        raise ValueError(
            "loss.divergence sampled_reverse_kl has no weights for tokens that the teacher drew, but rollouts.teacher_share is "
            f"{rollouts.teacher_share:g}; rollouts.teacher_share=0 would do, or loss.kind=policy_gradient"
        )


def require_drawn_rows(loss: PolicyGradientLoss, rollouts: RolloutsConfig | None) -> None:
    """Raise if no text is drawn that a policy gradient could learn from, or rows are there that nothing learns from."""
    if seen := other_rollouts(rollouts, {"temperature": 1.0, "top_p": 1.0}):
        raise ValueError(
            "loss.kind policy_gradient takes its targets for tokens that were drawn from a model's own distribution, but "
            f"{seen}; rollouts={{student_share: 1.0}} at temperature 1 and top_p 1 would do, or loss.kind=coupled with "
            "loss.divergence=reverse_kl"
        )
    assert rollouts is not None, "they are as wanted"
    if rollouts.learns_from_data == (loss.corpus_weight > 0):
        return
    remedy = "rollouts.student_share=1.0 would do, or loss.corpus_weight=1.0"
    if loss.corpus_weight > 0:
        remedy = "loss.corpus_weight=0 would do, or rollouts.student_share=0.5"
    raise ValueError(
        "loss.kind policy_gradient learns from rows that stay as the data has them by cross entropy alone, but "
        f"loss.corpus_weight is {loss.corpus_weight:g} and rollouts.student_share is {rollouts.student_share:g}; {remedy}"
    )


def other_rollouts(rollouts: RolloutsConfig | None, wanted: Mapping[str, float | None]) -> str:
    """Return, in words, what the rollouts are where they are not as they are wanted; an empty text where they are."""
    if rollouts is None:
        return "rollouts is null"
    found = {key: getattr(rollouts, key) for key in wanted}
    other = {key: value for key, value in found.items() if value != wanted[key]}
    return ", ".join(f"rollouts.{key} is {value if isinstance(value, float) else 'set'}" for key, value in other.items())
