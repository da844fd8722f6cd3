"""Which loss: every divergence, every kind of loss, each with its own knobs and no others.

A branch replaces the whole section ``loss``: what it does not name (tail, tokens, samples, cross entropy) is at its default.
"""

from typing import Any

from tune_spaces.space import read_space

SHARE = {"low": 0.1, "high": 0.9, "step": 0.2}


def coupled(divergence: str, **knobs: Any) -> dict[str, Any]:
    """Return the branch of a plain divergence; ``knobs`` are those of the divergence."""
    whole = {"loss": [{"kind": "coupled", "divergence": {"kind": divergence}}]}
    return whole | {f"loss.divergence.{knob}": values for knob, values in knobs.items()}


def taught(kind: str, divergence: str = "forward_kl", **knobs: Any) -> dict[str, Any]:
    """Return the branch of a kind of loss that weighs the terms of a KL apart; ``knobs`` are its fields."""
    whole = {"loss": [{"kind": kind, "divergence": {"kind": divergence}}]}
    return whole | {f"loss.{knob}": values for knob, values in knobs.items()}


SPACE = read_space(
    {
        "branches": {
            "cross_entropy": {"loss": [{"kind": "hard_label"}]},
            "forward_kl": coupled("forward_kl"),
            "reverse_kl": coupled("reverse_kl"),
            "jensen_shannon": coupled("jensen_shannon", teacher_weight=SHARE),
            "skew_forward_kl": coupled("skew_forward_kl", teacher_share=SHARE),
            "skew_reverse_kl": coupled("skew_reverse_kl", student_share=SHARE),
            "adaptive_kl": coupled("adaptive_kl", head_mass=SHARE),
            "total_variation": coupled("total_variation"),
            "alpha_beta": coupled("alpha_beta", teacher_power=SHARE, student_power=SHARE),
            "top1_cross_entropy": coupled("top1_cross_entropy"),
            "interpolated_target": coupled("interpolated_target", start={"low": 0.0, "high": 0.8, "step": 0.2}),
            "decoupled": taught("decoupled"),
            "decoupled_reverse_kl": taught("decoupled", "reverse_kl"),
            "target_only": taught("target_only"),
            "diversity_only": taught("diversity_only"),
            "atkd": taught("atkd", easy_ratio=SHARE, easy_weight={"low": 0.0, "high": 0.8, "step": 0.2}),
            "atkd_reverse_kl": taught("atkd", "reverse_kl", easy_ratio=SHARE, easy_weight={"low": 0.0, "high": 0.8, "step": 0.2}),
        },
    }
)
