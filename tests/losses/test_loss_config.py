"""Knobs of the losses: what may be said, and what is refused."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from losses.config import AtkdLoss, HardLabelLoss, LossConfig

LOSS: TypeAdapter[LossConfig] = TypeAdapter(LossConfig)


def test_the_defaults_are_the_papers() -> None:
    loss = LOSS.validate_python({"kind": "atkd"})
    assert isinstance(loss, AtkdLoss)
    assert (loss.easy_ratio, loss.easy_weight, loss.scope, loss.normalize) == (0.5, 0.2, "batch", "groups")
    assert (loss.divergence.kind, loss.tail, loss.cross_entropy_weight) == ("forward_kl", "bucket", 0.0)
    assert isinstance(LOSS.validate_python({"kind": "hard_label"}), HardLabelLoss)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scope": "microbatch", "easy_ratio": 0.3}, "has no easy_ratio 0.3: leave .* 0.5, or use scope batch"),
        ({"scope": "microbatch", "split": "random"}, "scope microbatch .* has no split 'random'; scope batch has"),
        ({"easy_ratio": 1.5}, "easy_ratio"),
        ({"easy_weight": -0.1}, "easy_weight"),
        ({"easy_ration": 0.5}, "easy_ration"),
    ],
)
def test_what_adaptive_teaching_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LOSS.validate_python({"kind": "atkd", **settings})


def test_a_knob_exists_only_where_it_acts() -> None:
    with pytest.raises(ValidationError, match="easy_ratio"):
        LOSS.validate_python({"kind": "coupled", "easy_ratio": 0.5})
