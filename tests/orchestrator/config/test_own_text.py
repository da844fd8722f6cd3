"""Losses that learn from what models drew are refused where nothing is drawn, and rollouts that cannot be."""

import pytest

from actors.dataloader.sampler import Visits
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
        r"policy_gradient .* but rollouts\.temperature is 0\.5; ",
    ),
    (
        [POLICY_GRADIENT, "rollouts={top_p: 0.9, student_share: 1}", WIDE],
        r"policy_gradient .* but rollouts\.top_p is 0\.9; ",
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
    (
        ["loss={kind: coupled, divergence: sampled_reverse_kl}", "rollouts={student_share: 1, teacher_share: 0.2}", WIDE],
        r"sampled_reverse_kl has no weights for tokens that the teacher drew, but rollouts\.teacher_share is 0\.2; "
        r"rollouts\.teacher_share=0 would do, or loss\.kind=policy_gradient$",
    ),
    (["rollouts={teacher_share: 1}"], r"rollouts\.teacher_share: Input should be less than 1; got 1"),
    (["rollouts={teacher_share: -0.1}"], r"rollouts\.teacher_share: Input should be greater than or equal to 0; got -0\.1"),
    (
        ["rollouts={teacher_engine: {kind: transformers}}"],
        r"teacher_engine says how the teacher draws tokens, but teacher_share is 0; teacher_share=0\.2 would do, or "
        r"teacher_engine=null$",
    ),
    (
        ["rollouts={teacher_share: 0.2, teacher_engine: {replicas: auto}}"],
        r"teacher_engine\.replicas is auto, but samplers stand beside teacher and student; 1 would do$",
    ),
    (
        ["rollouts={teacher_share: 0.2, teacher_engine: {kind: vllm}}", "teacher.model.heads=8",
         "teacher.engine.kind=transformers", WIDE],
        r"teacher\.model has heads of size 16 .* hidden_size 256 would do",
    ),
    (["rollouts={inner_epochs: 0}"], r"rollouts\.inner_epochs: Input should be greater than or equal to 1; got 0"),
    (
        ["rollouts={refresh_steps: 8, inner_epochs: 4, keep_steps: 15}", "train.keep_checkpoints=2",
         "train.checkpoint_every_steps=17", WIDE],
        r"rollouts\.keep_steps is 15, but .* reads up to 24 steps again; rollouts\.keep_steps=24 would do",
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
    [POLICY_GRADIENT, "rollouts={student_share: 1}"], [POLICY_GRADIENT, "rollouts={student_share: 1, teacher_share: 0.2}"],
    ["loss={kind: policy_gradient, corpus_weight: 0.1}", "rollouts={}"],
])  # fmt: skip
def test_what_is_drawn_can_be_learned_from(overrides: list[str]) -> None:
    assert isinstance(load_config("configs/tiny_cpu.yaml", [*overrides, WIDE]).loss, PolicyGradientLoss)


def test_a_teacher_that_draws_tokens_is_served_as_it_scores_or_by_an_engine_of_its_own() -> None:
    config = load_config("configs/tiny_cpu.yaml", ["rollouts={teacher_share: 0.2}", "teacher.engine.cpus=0.5", WIDE])
    assert config.teacher_sampler_engine == config.teacher.engine.model_copy(update={"replicas": 1})
    assert "rollouts.teacher_engine" not in config.engines
    own = load_config("configs/tiny_cpu.yaml", ["rollouts={teacher_share: 0.2, teacher_engine: {replicas: 3}}", WIDE])
    assert own.teacher_sampler_engine is not None and own.teacher_sampler_engine.replicas == 3
    assert own.engines["rollouts.teacher_engine"] == own.teacher_sampler_engine
    assert load_config("configs/tiny_cpu.yaml", ["rollouts={}", WIDE]).teacher_sampler_engine is None


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(("window", "times", "repeated"), [(3, 2, 10), (1, 4, 7), (5, 3, 30), (4, 2, 1)])
def test_kept_steps_hold_all_that_a_training_of_several_visits_reads_again(
    lag: int, window: int, times: int, repeated: int
) -> None:
    """Wherever it is killed: the last rows that may be written then, and the first that it reads from a checkpoint on."""
    settings = f"refresh_steps: {window}, inner_epochs: {times}, lag: {lag}"
    checkpoints = ["train.keep_checkpoints=1", f"train.checkpoint_every_steps={repeated}", WIDE]
    with pytest.raises(ConfigError, match=r"rollouts\.keep_steps=\d+ would do") as refused:
        load_config("configs/tiny_cpu.yaml", [f"rollouts={{{settings}, keep_steps: 1}}", *checkpoints])
    least = int(str(refused.value).split("rollouts.keep_steps=")[1].split()[0])
    load_config("configs/tiny_cpu.yaml", [f"rollouts={{{settings}, keep_steps: {least}}}", *checkpoints])
    visits = Visits(10_000, window, times)
    for step in range(repeated + 1, repeated + 3 * window * times + 1):
        oldest = min(visits.deal(again) for again in range(step - repeated + 1, step + 1))
        newest = ((visits.deal(step) - 1) // window + 1 + lag) * window
        assert newest - oldest + 1 <= least
