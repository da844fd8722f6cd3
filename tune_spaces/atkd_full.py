"""ATKD with all that its papers leave open: among which tokens they are ranked, the KL's direction, cross entropy, the tail.

The losses have no temperature (the paper's is 1), so there is none to search. The authors' own rule, scope microbatch, splits at
the median and has no ratio.
"""

from tune_spaces.space import read_space

EASY_RATIO = {"low": 0.1, "high": 0.9, "step": 0.2}

SPACE = read_space(
    {
        "loss.easy_weight": {"low": 0.0, "high": 0.8, "step": 0.2},
        "loss.divergence": ["forward_kl", "reverse_kl"],
        "loss.cross_entropy_weight": [0.0, 0.5, 1.0],
        "loss.tail": ["bucket", "renormalize"],
        "branches": {
            "batch": {"loss.scope": ["batch"], "loss.easy_ratio": EASY_RATIO},
            "dataset": {"loss.scope": ["dataset"], "loss.easy_ratio": EASY_RATIO},
            "microbatch": {"loss.scope": ["microbatch"], "loss.easy_ratio": [0.5]},
        },
    }
)
