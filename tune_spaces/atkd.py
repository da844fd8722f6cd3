"""The paper's plane: how many tokens are easy, and what they weigh. 25 points; its defaults 0.5 and 0.2 are one of them."""

from tune_spaces.space import read_space

SPACE = read_space(
    {
        # Neither end of the ratio: with no easy tokens their weight only scales the loss, with no hard ones it is no ATKD.
        "loss.easy_ratio": {"low": 0.1, "high": 0.9, "step": 0.2},
        "loss.easy_weight": {"low": 0.0, "high": 0.8, "step": 0.2},
    }
)
