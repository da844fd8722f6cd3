"""Losses that learn from what models drew are refused where nothing is drawn, or otherwise than they take it for."""

import pytest

from losses.config import PolicyGradientLoss
from orchestrator.config.load import ConfigError, load_config

WIDE = "student.model.hidden_size=64"  # of whose heads vLLM on CPUs serves the size
POLICY_GRADIENT = "loss={kind: policy_gradient}"


@pytest.mark.parametrize(("overrides", "message"), [
    (
        [POLICY_GRADIENT],
        r"policy_gradient takes its targets for tokens that were drawn .* but rollouts is null; rollouts=\{student_share: 1\.0\} "
        r"at temperature 1 and top_p 1 would do, or loss\.kind=coupled with loss\.divergence=reverse_kl$",
    ),
    (
        [POLICY_GRADIENT, "rollouts={temperature: 0.5, student_share: 1}", WIDE],
        r"policy_gradient .* but rollouts\.temperature is 0\.5, rollouts\.top_p is 1; ",
    ),
    (
        [POLICY_GRADIENT, "rollouts={top_p: 0.9, student_share: 1}", WIDE],
        r"policy_gradient .* but rollouts\.temperature is 1, rollouts\.top_p is 0\.9; ",
    ),
    (
        [POLICY_GRADIENT, "rollouts={}", WIDE],
        r"by cross entropy alone, but loss\.corpus_weight is 0 and rollouts\.student_share is 0\.5; "
        r"rollouts\.student_share=1\.0 would do, or loss\.corpus_weight=1\.0$",
    ),
    (
        ["loss={kind: policy_gradient, corpus_weight: 0.1}", "rollouts={student_share: 1}", WIDE],
        r"loss\.corpus_weight is 0\.1 and rollouts\.student_share is 1; "
        r"loss\.corpus_weight=0 would do, or rollouts\.student_share=0\.5$",
    ),
    (["loss={kind: policy_gradient, exact_weight: 1.5}"], r"loss\.exact_weight: Input should be less than or equal to 1"),
    (["loss={kind: policy_gradient, clip_ratio: 1}"], r"loss\.clip_ratio: Input should be less than 1; got 1"),
    (["loss={kind: policy_gradient, reward_scale: 0}"], r"loss\.reward_scale: Input should be greater than 0; got 0"),
    (["loss={kind: policy_gradient, divergence: reverse_kl}"], r"loss\.divergence: does not go with policy_gradient"),
])  # fmt: skip
def test_what_does_not_fit_is_named_with_what_would_do(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("configs/tiny_cpu.yaml", overrides)


@pytest.mark.parametrize("overrides", [
    [POLICY_GRADIENT, "rollouts={student_share: 1}"], ["loss={kind: policy_gradient, corpus_weight: 0.1}", "rollouts={}"],
])  # fmt: skip
def test_what_is_drawn_can_be_learned_from(overrides: list[str]) -> None:
    assert isinstance(load_config("configs/tiny_cpu.yaml", [*overrides, WIDE]).loss, PolicyGradientLoss)
