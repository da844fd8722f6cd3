"""The section compare, and the losses of its arms on every configuration there is."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from losses.config import AtkdLoss, CoupledLoss
from losses.divergence_config import ReverseKL
from orchestrator.config.compare import ARMS, CompareConfig
from orchestrator.config.load import ConfigError, load_config
from orchestrator.config.run import RunConfig
from orchestrator.search.compare import bind_arms, loss_of, point_of

CONFIGS = sorted(Path("configs").glob("*.yaml"))
ON_POLICY = load_config("configs/on_policy_cpu.yaml")
LOSSES = [
    "{kind: atkd, split: random}", "{kind: atkd, scope: microbatch}", "{kind: coupled, divergence: jensen_shannon}",
    "{kind: atkd, easy_ratio: 0.3, divergence: reverse_kl, tokens: student_entropy}", "{kind: hard_label}",
]  # fmt: skip


def tiny(loss: str) -> RunConfig:
    return load_config("configs/tiny_cpu.yaml", [f"loss={loss}"])


def arms_of(config: RunConfig) -> dict[str, Any]:
    """The checked configuration of each arm."""
    points = {arm: {"loss": loss_of(arm, config)} for arm in ARMS}
    bound = bind_arms(config, points)
    return {arm: bound.config_of(json.loads(json.dumps(point))) for arm, point in points.items()}


@pytest.mark.parametrize("path", [path for path in CONFIGS if load_config(path).rollouts is None], ids=lambda path: path.stem)
def test_every_arm_stands_in_every_configuration_and_differs_in_its_loss_alone(path: Path) -> None:
    config = load_config(path)
    arms = arms_of(config)
    assert len({arm.loss.model_dump_json() for arm in arms.values()}) == len(ARMS)
    for arm in arms.values():
        rest = {"loss": config.loss, "scores": config.scores}
        assert arm.model_copy(update=rest) == config


@pytest.mark.parametrize("loss", LOSSES)
def test_every_arm_stands_whatever_the_loss_of_the_configuration_is(loss: str) -> None:
    losses = {arm: config.loss for arm, config in arms_of(tiny(loss)).items()}
    assert losses["forward_kl"] == CoupledLoss(kind="coupled")
    assert [losses[arm].split for arm in ("atkd", "atkd_random", "atkd_inverted")] == ["uncertainty", "random", "inverted"]
    assert len({loss.model_dump_json() for loss in losses.values()}) == len(ARMS)


def test_arms_of_atkd_take_their_knobs_from_the_configuration() -> None:
    losses = {arm: config.loss for arm, config in arms_of(tiny("{kind: atkd, easy_ratio: 0.3, normalize: tokens}")).items()}
    assert losses["atkd"] == AtkdLoss(kind="atkd", easy_ratio=0.3, normalize="tokens")
    assert losses["atkd_inverted"] == AtkdLoss(kind="atkd", easy_ratio=0.3, normalize="tokens", split="inverted")


def test_a_control_of_the_authors_rule_splits_within_the_batch() -> None:
    losses = {arm: config.loss for arm, config in arms_of(tiny("{kind: atkd, scope: microbatch}")).items()}
    assert [losses[arm].scope for arm in ("atkd", "atkd_random")] == ["microbatch", "batch"]


def own(arm: dict[str, Any], config: RunConfig = ON_POLICY) -> dict[str, Any]:
    """The checked configuration of an arm of one's own."""
    settings = config.compare.model_copy(update={"arms": ("atkd", "mine"), "own_arms": {"mine": arm}, "baseline": "atkd"})
    config = config.model_copy(update={"compare": settings})
    points = {name: point_of(name, config) for name in settings.arms}
    bound = bind_arms(config, points)
    return {name: bound.config_of(point) for name, point in points.items()}


def test_an_arm_of_ones_own_sets_what_it_says_and_leaves_the_rest() -> None:
    arms = own({"rollouts.student_share": 1.0, "loss": {"kind": "coupled", "divergence": "reverse_kl"}})
    mine, rollouts = arms["mine"], ON_POLICY.rollouts
    assert rollouts is not None and mine.rollouts == rollouts.model_copy(update={"student_share": 1.0})
    assert mine.loss == CoupledLoss(kind="coupled", divergence=ReverseKL())
    assert mine.train == ON_POLICY.train and arms["atkd"].rollouts == rollouts
    assert own({"rollouts": None})["mine"].rollouts is None


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"teacher.engine.dtype": "float32"}, "compare.own_arms.mine cannot vary teacher.engine.dtype: it changes the scores"),
        ({"scores.top_k": 128}, "compare.own_arms.mine: scores.top_k is 128, and the store that all arms share holds 64"),
        ({"loss": {"kind": "hard_label"}}, "compare.arms, with loss={'kind': 'hard_label'}: "),
        ({"los": {"kind": "atkd"}}, "los: there is no such key; did you mean loss?"),
    ],
)
def test_an_arm_of_ones_own_that_cannot_be_is_refused(arm: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        own(arm)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arms": ["atkd", "forwardkl"]}, "no arm is called 'forwardkl'; did you mean forward_kl? There are cross_entropy"),
        ({"arms": ["atkd", "zzz"]}, "no arm is called 'zzz'; there are cross_entropy"),
        ({"arms": ["atkd", "forward_kl", "atkd"]}, "arm atkd stands twice; once would do"),
        ({"arms": ["forward_kl"]}, "arms holds forward_kl alone; a comparison needs two"),
        ({"arms": []}, "arms holds nothing; a comparison needs two"),
        ({"arms": ["atkd", "decoupled"]}, "baseline forward_kl is none of the arms atkd, decoupled; atkd would do"),
        ({"learning_rates": [1e-3, 2.0]}, "2 is no learning rate; one such as 2e-5 would do"),
        ({"learning_rates": [1e-3, 1e-4, 1e-3]}, "learning rate 0.001 stands twice; once would do"),
        ({"metric": "heldout_los"}, "no trial reports 'heldout_los'; did you mean heldout_loss? There are heldout_loss"),
        ({"concurrent": 0}, "0 is no number of trials; 1 or auto would do"),
        ({"seeds": 0}, "greater than or equal to 1"),
        ({"own_arms": {"mine": {"train.epochs": 2}}}, "own_arms has mine, but it is none of the arms cross_entropy, "),
        ({"own_arms": {"atkd": {"train.epochs": 2}}}, "own_arms has atkd, which has its loss already; another name would do"),
        ({"arms": ["atkd", "mein"], "own_arms": {}, "baseline": "atkd"}, "no arm is called 'mein'; there are cross_entropy"),
        ({"own_arms": {"mine": {"loss": {"weights": [1.0, float("inf")]}}}}, "own_arms.mine.loss.weights.1 is inf, which cannot"),
        ({"teachers": {"a": {}, "b": {"calibrate": float("nan")}}}, "teachers.b.calibrate is nan, which cannot be written down"),
    ],
)
def test_what_cannot_be_compared_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CompareConfig(**settings)


def test_more_is_better_of_some_metrics() -> None:
    assert CompareConfig().direction == "min"
    assert CompareConfig(metric="top1_agreement").direction == "max"
