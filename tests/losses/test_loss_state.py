"""What losses remember from step to step, and the knobs of divergences, selections and rows that are refused."""

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from losses.config import CoupledLoss, HardLabelLoss, LossConfig
from losses.divergence_config import AlphaBeta, InterpolatedTarget, ReverseKL, SkewForwardKL
from losses.loss_state import LossState
from losses.weighing_config import DistantTokens, TeacherLossSamples, UncertainStudentTokens

LOSS: TypeAdapter[LossConfig] = TypeAdapter(LossConfig)
SPLIT_KINDS = ("decoupled", "target_only", "diversity_only", "atkd")


def after(loss: LossConfig, losses: list[float]) -> list[LossState]:
    """The states before the first step and after each, of a run whose steps have these losses."""
    states = [LossState.first(loss)]
    for step, value in enumerate(losses, start=1):
        states.append(states[-1].after(loss, step, len(losses), value))
    return states


def interpolated(**knobs: Any) -> CoupledLoss:
    return CoupledLoss(kind="coupled", divergence=InterpolatedTarget(**knobs))


def distant(**knobs: Any) -> CoupledLoss:
    return CoupledLoss(kind="coupled", tokens=DistantTokens(**knobs))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else 1 - 1 / (1 + math.exp(max(x, -700.0)))


losses_of_steps = st.lists(st.floats(0.0, 50.0), min_size=1, max_size=20)


@settings(max_examples=50, deadline=None)
@given(losses_of_steps, st.floats(0, 0.9), st.floats(0, 1), st.floats(0, 2), st.floats(0, 0.99))
def test_the_target_moves_between_its_straight_line_and_its_end(
    losses: list[float], start: float, way: float, rate: float, momentum: float
) -> None:
    end = start + way * (1 - start)
    shares = [state.teacher_share for state in after(interpolated(start=start, end=end, rate=rate, momentum=momentum), losses)]
    assert shares[0] == start and shares[-1] == pytest.approx(end)
    for step, share in enumerate(shares):
        assert start + (end - start) * step / len(losses) - 1e-12 <= share <= end + 1e-12
    assert all(earlier <= later + 1e-12 for earlier, later in pairwise(shares))


@pytest.mark.parametrize(
    "losses", [[1.0] * 8, [8.0, 4.0, 2.0, 1.0, 0.5, 0.0, 0.0, 3.0], [1.0, 2.0, 4.0, 8.0, 16.0, 1.0, 0.1, 9.0]]
)
@pytest.mark.parametrize(("rate", "momentum"), [(0.3, 0.9), (1.0, 0.0), (0.05, 0.99)])
def test_the_target_follows_the_papers_rule(rate: float, momentum: float, losses: list[float]) -> None:
    t, mean, before = 0.2, 0.0, None
    for step, (value, state) in enumerate(
        zip(losses, after(interpolated(start=0.2, end=0.9, rate=rate, momentum=momentum), losses)[1:], strict=True), start=1
    ):
        if before is not None:  # of the first loss nobody knows whether it improves
            change = max(-1.0, min(1.0, (before - value) / (before + 1e-8)))
            mean = momentum * mean + (1 - momentum) * change
            t = min(0.9, t + rate * sigmoid(mean) * (1 - t))
        before = value
        t = max(0.2 + 0.7 * step / 8, t)
        assert state.teacher_share == pytest.approx(t, rel=1e-9), f"step {step}"


def test_a_falling_loss_moves_the_target_further_than_a_rising_one() -> None:
    loss = interpolated(start=0.2, rate=0.05, momentum=0.5)
    falling, level, rising = (
        after(loss, [values(step) for step in range(1000)][:40] + [1.0] * 960)[40].teacher_share
        for values in (lambda step: 0.9**step, lambda step: 1.0, lambda step: 1.5**step)
    )
    assert 0.2 + 0.8 * 40 / 1000 < rising < level < falling < 1.0


def test_a_loss_that_rises_from_nothing_is_soon_forgotten() -> None:
    states = after(interpolated(start=0.0, rate=0.1, momentum=0.5), [1e-17, 0.3, 0.3, 0.3, 0.3])
    assert [state.improvement for state in states] == pytest.approx([0, 0, -0.5, -0.25, -0.125, -0.0625])
    assert states[-1].teacher_share == 1.0


def test_a_target_that_would_move_away_from_the_teacher_is_refused() -> None:
    with pytest.raises(ValidationError, match="start 0.8 lies beyond end 0.5; start=0.5 would do, or a larger end"):
        InterpolatedTarget(start=0.8, end=0.5)


def test_at_rate_zero_the_target_stays_on_the_line() -> None:
    shares = [state.teacher_share for state in after(interpolated(start=0.4, end=0.8, rate=0.0), [5.0, 1.0, 0.1, 0.01])]
    assert shares == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8])


def fractions(loss: CoupledLoss, losses: list[float]) -> list[float]:
    return [state.kept_fraction for state in after(loss, losses)]


def test_fewer_tokens_once_the_loss_has_fallen_and_more_once_it_has_risen() -> None:
    loss = distant(fraction=0.5, step_size=0.1, tolerance=0.05, momentum=0.0)
    down = [1.0, 0.96, 0.94, 0.90, 0.89]  # 0.94 is below 0.95; 0.90 is not below 0.95 * 0.94, and 0.89 is
    assert fractions(loss, down) == pytest.approx([0.5, 0.5, 0.5, 0.45, 0.45, 0.405])
    up = [1.0, 1.04, 1.06, 1.11, 1.12]
    assert fractions(loss, up) == pytest.approx([0.5, 0.5, 0.5, 0.55, 0.55, 0.605])


def test_the_share_of_tokens_stops_at_its_floor_and_at_one() -> None:
    falling = fractions(distant(fraction=0.5, step_size=0.3, floor=0.2, momentum=0.0), [2.0**-step for step in range(12)])
    assert falling[-1] == falling[-2] == 0.2 and all(later <= earlier for earlier, later in pairwise(falling))
    rising = fractions(distant(fraction=0.5, step_size=0.3, floor=0.2, momentum=0.0), [2.0**step for step in range(12)])
    assert rising[-1] == rising[-2] == 1.0 and all(later >= earlier for earlier, later in pairwise(rising))


def test_it_is_the_running_loss_that_moves_the_share() -> None:
    outlier = [1.0] * 5 + [3.0] + [1.0] * 5
    assert set(fractions(distant(fraction=0.5, step_size=0.1, momentum=0.99), outlier)) == {0.5}
    assert len(set(fractions(distant(fraction=0.5, step_size=0.1, momentum=0.5), outlier))) > 1


@settings(max_examples=50, deadline=None)
@given(losses_of_steps, st.floats(0.1, 1.0), st.floats(0.01, 0.9), st.floats(0.01, 0.5), st.floats(0.01, 1.0), st.floats(0, 0.99))
def test_the_share_of_tokens_follows_the_papers_rule(
    losses: list[float], fraction: float, step_size: float, tolerance: float, floor: float, momentum: float
) -> None:
    floor = min(floor, fraction)
    loss = distant(fraction=fraction, step_size=step_size, tolerance=tolerance, floor=floor, momentum=momentum)
    mean = reference = losses[0]
    kept, expected = fraction, [fraction, fraction]
    for value in losses[1:]:
        mean = momentum * mean + (1 - momentum) * value
        if mean < reference * (1 - tolerance):
            kept, reference = max(kept * (1 - step_size), floor), mean
        elif mean > reference * (1 + tolerance):
            kept, reference = min(kept * (1 + step_size), 1.0), mean
        expected.append(kept)
    assert fractions(loss, losses) == pytest.approx(expected)


WITHOUT_MEMORY: list[LossConfig] = [
    HardLabelLoss(kind="hard_label"),
    CoupledLoss(kind="coupled", divergence=ReverseKL()),
    CoupledLoss(kind="coupled", tokens=UncertainStudentTokens(fraction=0.3)),
    distant(fraction=0.4),
    CoupledLoss(
        kind="coupled", samples=TeacherLossSamples(kind="teacher_loss", threshold_start=1.0, threshold_end=2.0)
    ),
]  # fmt: skip


@pytest.mark.parametrize("loss", WITHOUT_MEMORY, ids=["hard_label", "coupled", "student_entropy", "hellinger", "samples"])
def test_losses_without_memory_only_move_on(loss: LossConfig) -> None:
    states = after(loss, [3.0, 0.1, 8.0, 0.0])
    assert [state.progress for state in states] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert {replace(state, progress=0.0) for state in states} == {LossState.first(loss)}


def test_the_first_state_is_that_of_the_knobs() -> None:
    assert LossState.first(HardLabelLoss(kind="hard_label")) == LossState()
    assert LossState.first(CoupledLoss(kind="coupled")) == LossState()
    assert LossState.first(interpolated(start=0.3)) == LossState(teacher_share=0.3)
    assert LossState.first(distant(fraction=0.4)) == LossState(kept_fraction=0.4)


def test_a_run_may_be_interrupted_between_any_two_steps() -> None:
    loss = CoupledLoss(
        kind="coupled",
        divergence=InterpolatedTarget(rate=0.1, momentum=0.5),
        tokens=DistantTokens(step_size=0.1, momentum=0.5),
    )
    losses = [3.0, 1.0, 2.0, 0.5, 0.1]
    states = after(loss, losses)
    assert states[-1].previous_loss == 0.1 and states[-1].kept_fraction < 0.5 < states[-1].teacher_share
    for step in range(5):
        restored = LossState(**json.loads(json.dumps(asdict(states[step]))))
        assert restored == states[step]
        assert restored.after(loss, step + 1, 5, losses[step]) == states[step + 1]


@pytest.mark.parametrize("kind", SPLIT_KINDS)
@pytest.mark.parametrize("divergence", ["jensen_shannon", "total_variation", "alpha_beta", "skew_reverse_kl"])
def test_a_kind_that_weighs_two_terms_refuses_a_divergence_of_one(kind: str, divergence: str) -> None:
    message = (
        f"divergence {divergence} does not fall into a target and a diversity term .* forward_kl or reverse_kl does.* coupled"
    )
    with pytest.raises(ValidationError, match=message):
        LOSS.validate_python({"kind": kind, "divergence": divergence})
    assert LOSS.validate_python({"kind": "coupled", "divergence": divergence}).kind == "coupled"
    for split in ("forward_kl", "reverse_kl"):
        assert LOSS.validate_python({"kind": kind, "divergence": split}).kind == kind


def test_a_name_alone_means_its_defaults() -> None:
    short = LOSS.validate_python({"kind": "coupled", "divergence": "alpha_beta", "tokens": "student_entropy"})
    long = LOSS.validate_python(
        {"kind": "coupled", "divergence": {"kind": "alpha_beta"}, "tokens": {"kind": "student_entropy"}, "samples": "equal"}
    )
    assert short == long and isinstance(short, CoupledLoss)
    assert short.divergence == AlphaBeta(teacher_power=0.2, student_power=0.7)
    assert short.tokens == UncertainStudentTokens(fraction=0.2)
    knobs = LOSS.validate_python({"kind": "coupled", "divergence": {"kind": "skew_forward_kl", "teacher_share": 0.4}})
    assert isinstance(knobs, CoupledLoss) and knobs.divergence == SkewForwardKL(teacher_share=0.4)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("divergence", "forward", "'forward'.*'forward_kl'"),
        ("divergence", {"kind": "jensen_shanon"}, "'jensen_shanon'.*'jensen_shannon'"),
        ("divergence", {"teacher_weight": 0.5}, "kind"),
        ("divergence", {"kind": "forward_kl", "teacher_weight": 0.5}, "teacher_weight\n.*not permitted"),
        ("divergence", {"kind": "jensen_shannon", "teacher_wieght": 0.5}, "teacher_wieght\n.*not permitted"),
        ("divergence", {"kind": "jensen_shannon", "teacher_weight": 0.0}, "teacher_weight\n.*greater than 0"),
        ("divergence", {"kind": "jensen_shannon", "teacher_weight": 1.0}, "teacher_weight\n.*less than 1"),
        ("divergence", {"kind": "skew_forward_kl", "teacher_share": 1.0}, "teacher_share\n.*less than 1"),
        ("divergence", {"kind": "skew_reverse_kl", "student_share": 0.0}, "student_share\n.*greater than 0"),
        ("divergence", {"kind": "skew_reverse_kl", "teacher_share": 0.1}, "teacher_share\n.*not permitted"),
        ("divergence", {"kind": "adaptive_kl", "head_mass": 0.0}, "head_mass\n.*greater than 0"),
        ("divergence", {"kind": "adaptive_kl", "head_mass": 1.0}, "head_mass\n.*less than 1"),
        ("divergence", {"kind": "alpha_beta", "teacher_power": 0.0}, "teacher_power\n.*greater than 0"),
        ("divergence", {"kind": "alpha_beta", "student_power": -1.0}, "student_power\n.*greater than 0"),
        ("divergence", {"kind": "alpha_beta", "student_power": math.inf}, "student_power\n.*finite"),
        ("divergence", {"kind": "interpolated_target", "start": -0.1}, "start\n.*greater than or equal to 0"),
        ("divergence", {"kind": "interpolated_target", "end": 1.1}, "end\n.*less than or equal to 1"),
        ("divergence", {"kind": "interpolated_target", "momentum": 1.0}, "momentum\n.*less than 1"),
        ("tokens", "teacher_uncertainty", "fraction\n.*required"),
        ("tokens", "student_entrophy", "'student_entrophy'.*'student_entropy'"),
        ("tokens", {"kind": "student_entropy", "fraction": 0.0}, "fraction\n.*greater than 0"),
        ("tokens", {"kind": "student_entropy", "fraction": 1.01}, "fraction\n.*less than or equal to 1"),
        ("tokens", {"kind": "student_entropy", "floor": 0.1}, "floor\n.*not permitted"),
        ("tokens", {"kind": "hellinger", "step_size": 1.0}, "step_size\n.*less than 1"),
        (
            "tokens", {"kind": "hellinger", "step_size": 0.1, "fraction": 0.05},
            "fraction 0.05 begins below floor 0.1; floor=0.05 would do",
        ),
        ("samples", "teacher_loss", "threshold_start\n.*required"),
        ("samples", {"kind": "teacher_loss", "threshold_start": 1, "threshold_end": 2, "steepness": 0}, "steepness\n.*greater"),
        ("samples", {"kind": "teacher_loss", "threshold_start": 1, "threshold_end": math.nan}, "threshold_end\n.*finite"),
    ],
)  # fmt: skip
def test_knobs_that_are_refused(section: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LOSS.validate_python({"kind": "coupled", section: value})


def test_a_share_that_stays_as_it_is_may_be_below_the_floor() -> None:
    loss = LOSS.validate_python({"kind": "coupled", "tokens": {"kind": "hellinger", "fraction": 0.05}})
    assert isinstance(loss, CoupledLoss) and LossState.first(loss).kept_fraction == 0.05
