"""The divergences a user may name, and the function of each. docs/add_a_loss.md says how to add one."""

from collections.abc import Callable
from typing import Any

from losses import divergences
from losses.loss_state import LossState
from losses.prediction import Prediction
from losses.terms import Terms

DivergenceFunction = Callable[[Prediction, Prediction, Any, LossState], Terms]
"""(teacher, student, the divergence's own config, the state of this step) -> what each token costs."""

DIVERGENCES: dict[str, DivergenceFunction] = {
    "forward_kl": divergences.forward_kl,
    "reverse_kl": divergences.reverse_kl,
    "jensen_shannon": divergences.jensen_shannon,
    "skew_forward_kl": divergences.skew_forward_kl,
    "skew_reverse_kl": divergences.skew_reverse_kl,
    "adaptive_kl": divergences.adaptive_kl,
    "total_variation": divergences.total_variation,
    "alpha_beta": divergences.alpha_beta,
    "top1_cross_entropy": divergences.top1_cross_entropy,
    "interpolated_target": divergences.interpolated_target,
    "sampled_reverse_kl": divergences.sampled_reverse_kl,
}
