"""The section tune, and spaces bound to configurations: what can be searched, and what is refused before anything starts."""

import random
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from actors.config.rollouts import ResponsesConfig
from losses.config import CoupledLoss, TeacherLoss
from losses.divergence_config import Divergence, JensenShannon
from orchestrator.config.load import ConfigError, dump_config, load_config, parse_yaml, validate
from orchestrator.config.run import RunConfig
from orchestrator.config.tune import METRICS, TuneConfig, rung_steps
from orchestrator.search.bound_space import NOT_SEARCHABLE, SEARCHABLE, bind, search_of
from orchestrator.search.tune import some_learn_from_data
from tune_spaces.registry import SPACES
from tune_spaces.space import read_space

CONFIGS = [path for path in sorted(Path("configs").glob("*.yaml")) if load_config(path).rollouts is None]
TINY = load_config("configs/tiny_cpu.yaml")
PRETRAINED = load_config("configs/qwen_7b_to_0.5b_lora.yaml")


OF_ATKD = ("atkd", "atkd_full", "smoke")
"""Spaces that vary the knobs of ATKD, and so begin with it."""


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_space_can_be_searched_from_every_configuration(path: Path, name: str) -> None:
    config = load_config(path)
    if name in OF_ATKD and config.loss.kind != "atkd":
        with pytest.raises(ConfigError, match=r"(?s)tune\.space, with .*loss\.easy_ratio: does not go with coupled"):
            bind(config, SPACES[name]).config_of(SPACES[name].draw(random.Random(5)))
        return
    bound = bind(config, SPACES[name])
    generator = random.Random(5)
    for _ in range(200):
        bound.config_of(bound.space.draw(generator))


@pytest.mark.parametrize("name", [name for name, space in SPACES.items() if space.size()])
def test_every_point_of_a_grid_is_a_configuration_of_its_own(name: str) -> None:
    bound = bind(TINY, SPACES[name])
    assert len({bound.config_of(point).model_dump_json() for point in bound.grid()}) == len(bound.grid()) == SPACES[name].size()


def test_a_trial_differs_from_its_search_in_the_point_alone() -> None:
    point = {"loss.easy_ratio": 0.3, "train.optimizer.learning_rate": 1e-3}
    trial = bind(TINY, read_space({path: [value] for path, value in point.items()})).config_of(point)
    asked = load_config("configs/tiny_cpu.yaml", [*(f"{path}={value}" for path, value in point.items()), "scores.overlap=false"])
    assert trial == asked


def test_a_whole_section_is_replaced_before_its_keys() -> None:
    whole = {"kind": "coupled", "divergence": {"kind": "jensen_shannon"}}
    space = read_space({"loss.divergence.teacher_weight": [0.3], "loss": [whole]})
    (point,) = space.grid()
    loss = bind(TINY, space).config_of(point).loss
    assert loss == CoupledLoss(kind="coupled", divergence=JensenShannon(teacher_weight=0.3))
    assert point["loss"] == {"kind": "coupled", "divergence": {"kind": "jensen_shannon"}}, "the point is not written into"


def test_the_space_of_losses_has_every_divergence_and_every_kind() -> None:
    losses = [config.loss for config in map(bind(TINY, SPACES["losses"]).config_of, SPACES["losses"].grid())]
    variants = get_args(get_args(Divergence)[0])
    elsewhere = {"sampled_reverse_kl", "tempered_kl", "student_tempered_kl"}  # of the student's text, and of classifiers
    wanted = {variant().kind for variant in variants} - elsewhere
    assert {loss.divergence.kind for loss in losses if loss.kind != "hard_label"} == wanted
    kinds = {get_args(variant.model_fields["kind"].annotation)[0] for variant in get_args(TeacherLoss)}
    assert {loss.kind for loss in losses} == kinds | {"hard_label"}


def test_trials_read_a_complete_store_so_that_tokens_can_be_ranked_over_it() -> None:
    assert TINY.scores.overlap
    trial = bind(TINY, read_space({"loss.scope": ["batch", "dataset"]})).config_of({"loss.scope": "dataset"})
    assert trial.loss.scope == "dataset" and not trial.scores.overlap  # type: ignore[union-attr]


def test_a_space_of_whole_numbers_and_adapters() -> None:
    space = read_space(
        {"train.batch_rows": {"low": 8, "high": 32, "integer": True}, "student.lora": [None, {"rank": 4}], "seed": [0, 1],
         "scores.top_k": {"low": 8, "high": 64, "step": 8}}
    )  # fmt: skip
    draws = [bind(PRETRAINED, space).config_of(space.draw(random.Random(seed))) for seed in range(20)]
    assert {draw.student.lora and draw.student.lora.rank for draw in draws} == {None, 4}
    assert {draw.seed for draw in draws} == {0, 1}
    assert all(draw.scores.top_k % 8 == 0 for draw in draws)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"loss.easy_ration": [0.3]}, r"loss\.easy_ration: there is no such key; did you mean easy_ratio\?"),
        ({"train.optimiser.learning_rate": [1]}, r"train\.optimiser: there is no such key; did you mean optimizer\?"),
        ({"train.learning_rate": [1]}, r"there is no such key; there is train\.optimizer\.learning_rate"),
        ({"loss.teaching": ["atkd"]}, r"loss\.teaching: is now loss\.kind"),
        ({"loss": [{"teaching": "atkd"}]}, r"loss\.teaching: is now loss\.kind"),
        ({"bogus.x": [1]}, r"bogus: there is no such key; there are checkpoints, compare, data, evaluate"),
        ({"loss.easy_ratio": {"low": 0.5, "high": 1.5}},
         r"tune\.space, with loss\.easy_ratio=1\.5: .*\n  loss\.easy_ratio: Input should be less than or equal to 1; got 1\.5"),
        ({"loss.easy_ratio": [0.3, "many"]}, r"with loss\.easy_ratio='many': .*\n.* should be a valid number"),
        ({"train.batch_rows": {"low": 8, "high": 64}},
         r"valid integer.*got 36\.3.*\n  \(a range of whole numbers .* integer: true"),
        ({"loss.scope": ["batch", "microbatch"], "loss.easy_ratio": [0.5, 0.3]},
         r"with loss\.scope='microbatch', loss\.easy_ratio=0\.3: .*\n  loss: scope microbatch splits at the median"),
        ({"loss.divergence.teacher_weight": [0.3]}, r"teacher_weight: does not go with forward_kl"),
        ({"student.lora.rank": [4, 8]}, r"student\.lora is None here and has no keys to search; give it as a mapping first"),
        ({"loss": [{"kind": "coupled", "divergence": "jensen_shannon"}], "loss.divergence.teacher_weight": [0.1]},
         r"loss\.divergence is 'jensen_shannon' here and has no keys to search; give it as a mapping first"),
        ({"scores.top_k": [32, 128]}, r"up to 128: the store that all trials share holds 64; .* or search up to 64"),
        ({"scores.top_k": {"low": 8, "high": 72, "step": 8}}, r"cannot vary scores\.top_k up to 72"),
        ({"seed": [0, 1]}, r"cannot vary seed: it draws and fine-tunes models of this run as well, and all trials share them"),
        ({"teacher.engine.dtype": ["float32"]},
         r"cannot vary teacher\.engine\.dtype: it changes the scores, and a search shares"),
        ({"student.model.layers": [1, 2]},
         r"cannot vary student\.model\.layers: student\.finetune trains the run's own .*; student\.finetune=null would do"),
        ({"student.finetune": [None]}, r"cannot vary student\.finetune: it is fine-tuned once for all trials; student\.lora can"),
        ({"scores": [{"top_k": 3}]}, r"cannot vary scores: .*; scores\.top_k alone can vary"),
        ({"trainer": [1]}, r"trainer: there is no such key; did you mean train\?"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused_before_anything_starts(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bind(TINY, read_space(space))


def test_a_seed_that_draws_responses_cannot_be_searched() -> None:
    bind(PRETRAINED, read_space({"seed": [0, 1]}))
    written = PRETRAINED.model_copy(update={"responses": ResponsesConfig(writer="teacher")})
    with pytest.raises(ConfigError, match=r"cannot vary seed: .* none is fine-tuned, and none writes responses"):
        bind(written, read_space({"seed": [0, 1]}))


def test_every_section_can_be_searched_or_has_a_reason_why_not() -> None:
    assert {path.split(".")[0] for path in (*SEARCHABLE, *NOT_SEARCHABLE)} == RunConfig.model_fields.keys()
    for section in NOT_SEARCHABLE:
        with pytest.raises(ConfigError, match=rf"tune\.space cannot vary {section}: .* What can vary is seed, rollouts"):
            bind(TINY, read_space({section: [1]}))


def test_a_branch_that_the_configuration_refuses_is_found() -> None:
    with pytest.raises(ConfigError, match=r"with train\.epochs=0: .*\n  train\.epochs: .* greater than 0"):
        bind(TINY, read_space({"branches": {"good": {"train.epochs": [1]}, "bad": {"train.epochs": [0]}}}))


def test_combinations_too_many_to_try_all_are_sampled() -> None:
    keys = ("learning_rate", "warmup_ratio", "weight_decay", "clip_norm")
    many = {f"train.optimizer.{key}": {"low": 0.1, "high": 0.9} for key in keys}
    clash = {"loss.scope": ["batch", "microbatch"], "loss.split": ["uncertainty", "random"]}
    with pytest.raises(ConfigError, match="the authors' rule and has no split 'random'"):
        bind(TINY, read_space({"loss.easy_ratio": [0.5], **many, **clash, "train.epochs": [1, 2, 3]}))


def tuned(*overrides: str) -> RunConfig:
    return load_config("configs/tiny_cpu.yaml", overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tune.space=atkdd"], r"tune\.space: no space is called 'atkdd'; did you mean atkd\? There are atkd, atkd_full, losses"),
        (["tune.space={loss.easy_ratio: []}"], r"tune\.space: loss\.easy_ratio: the list is empty"),
        (["tune.space=3"], r"tune\.space: name a space, or map paths to values, .*; got 3"),
        (["tune.metric=heldout_los"], r"tune\.metric: no trial reports 'heldout_los'; did you mean heldout_loss\? There are"),
        (["tune.metric=zzz"], r"tune\.metric: no trial reports 'zzz'; there are heldout_loss, kl_to_teacher, top1_agreement"),
        (["tune.search=grid", "tune.trials=3"], r"tune: search grid tries every point, and trials is 3: set trials to null"),
        (["tune.rungs=1"], r"tune: scheduler asha stops trials between rungs, and rungs is 1: set rungs to 2 or more, or"),
        (["tune.metric=rouge_l", "tune.answers=true"], r"tune: scheduler asha stops trials by rouge_l, and answers are given at"),
        (["tune.metric=exact_match", "tune.scheduler=none"], r"metric exact_match .* and tune.answers is false; tune.answers=t"),
        (["tune.answers=true", "evaluate.generate_rows=0"], r"tune.answers is true, and evaluate.generate_rows is 0: .*=100 "),
        (["compare.answers=true", "train.sharding=fsdp"], r"compare.answers is true, and with train.sharding fsdp no worker"),
        (["tune.concurrent=many"], r"tune\.concurrent: 'many' is no number of trials; 1 or auto would do"),
        (["tune.concurrent=0"], r"tune\.concurrent: 0 is no number of trials"),
        (["tune.search=bayes"], r"tune\.search: there is no 'bayes'; there are grid, random, tpe"),
        (["tune.trails=3"], r"tune\.trails: there is no such key; did you mean trials\?"),
    ],
)
def test_a_wrong_section_tune_is_named_with_what_would_do(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tuned(*overrides)


def test_a_space_of_ones_own_survives_being_written_and_read() -> None:
    own = "tune.space={loss.easy_ratio: {low: 0.1, high: 0.9}, branches: {a: {seed: [1]}}}"
    config = tuned(own, "tune.metric=top1_agreement")
    assert validate(parse_yaml(dump_config(config), "x")) == config
    assert config.tune.searched.alternatives().keys() == {"a"} and config.tune.direction == "max"


def test_every_metric_is_one_that_evaluation_measures() -> None:
    from actors.evaluation.evaluator import Metrics

    assert METRICS.keys() <= {field.name for field in fields(Metrics)}


def test_rungs_are_spread_evenly_over_the_steps_of_a_trial() -> None:
    assert rung_steps(10, 4) == (2, 5, 7, 10)
    assert rung_steps(3, 1) == (3,)
    with pytest.raises(ValueError, match=r"tune\.rungs is 4, but a trial has 3 optimizer steps, .*: tune\.rungs=3 would do, or"):
        rung_steps(3, 4)


def test_the_number_of_draws_is_twelve_unless_said_or_there_are_fewer() -> None:
    assert [TuneConfig(**said).draws for said in ({}, {"trials": 5}, {"space": "smoke"}, {"space": "optim"})] == [12, 5, 2, 12]


def test_a_search_is_checked_against_the_rest_of_the_configuration() -> None:
    assert search_of(tuned("tune.space=smoke", "tune.search=grid")).grid() == [{"loss.easy_ratio": 0.3}, {"loss.easy_ratio": 0.7}]
    with pytest.raises(ConfigError, match=r"tune\.space: a grid needs points, and train\.optimizer\.learning_rate is a range"):
        search_of(tuned("tune.space=optim", "tune.search=grid"))
    with pytest.raises(ConfigError, match=r"tune\.trials is 3, and tune\.space has 2 points; tune\.trials=2 would do"):
        search_of(tuned("tune.space=smoke", "tune.trials=3"))
    with pytest.raises(ConfigError, match=r"grid tries every point, and tune\.space has 1,000,000; tune\.search=random would do"):
        search_of(tuned("tune.space={train.batch_rows: {low: 1, high: 1000000, integer: true}}", "tune.search=grid"))
    with pytest.raises(ConfigError, match=r"trains in one process, and workers\.count is 2: tune\.trials_in=ray_train would do"):
        search_of(tuned("tune.trials_in=reused_process", "workers.count=2"))


def test_the_spaces_of_the_documentation_can_be_searched() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", Path("docs/search.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        search_of(validate({**TINY.model_dump(mode="json"), **yaml.safe_load(block)}))


def test_the_documentation_names_every_space() -> None:
    assert all(f"| `{name}`" in Path("docs/search.md").read_text() for name in SPACES)


def test_binding_a_space_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'numpy', 'transformers'}"
    code = f"import orchestrator.search.bound_space, sys; assert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


ON_POLICY = load_config("configs/on_policy_cpu.yaml")


def test_rollouts_can_be_searched_by_key_and_as_a_section() -> None:
    section = {"student_share": 1.0, "max_new_tokens": 16, "engine": ON_POLICY.sampler_engine.model_dump(mode="json")}
    by_key = bind(ON_POLICY, read_space({"rollouts.temperature": [0.8, 1.0], "rollouts.lag": [0, 1]}))
    trials = [by_key.config_of(point).rollouts for point in by_key.grid()]
    assert [(one.temperature, one.lag) for one in trials if one] == [(0.8, 0), (0.8, 1), (1.0, 0), (1.0, 1)]
    sections = bind(ON_POLICY, read_space({"rollouts": [None, section]}))
    assert [sections.config_of(point).rollouts is None for point in sections.grid()] == [True, False]


@pytest.mark.parametrize(
    ("config", "space", "message"),
    [
        (ON_POLICY, {"rollouts.max_new_tokens": [16, 64]},
         r"rollouts.max_new_tokens is 64, but the teacher of all trials takes rows with 32, .*; that, or fewer, would do"),
        (ON_POLICY, {"rollouts": [{"max_new_tokens": 16}]}, r"rollouts.engine differs from the configuration's.*; leave it out"),
        (ON_POLICY, {"rollouts.engine.dtype": ["bfloat16"]}, r"cannot vary rollouts.engine.dtype: each trial has"),
        (ON_POLICY, {"rollouts.keep_steps": [100]}, r"cannot vary rollouts.keep_steps: it says what is kept"),
        (TINY, {"rollouts.lag": [0, 1]}, r"rollouts is None here and has no keys to search; give it as a mapping first"),
        (TINY, {"rollouts": [None, {"max_new_tokens": 8}]},
         r"rollouts is null in the configuration, .*; rollouts=\{max_new_tokens: 8\} there would do"),
    ],
)  # fmt: skip
def test_rollouts_of_trials_that_want_another_teacher_or_sampler_are_refused(
    config: RunConfig, space: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bind(config, read_space(space))


def test_a_search_whose_trials_all_write_their_rows_needs_no_scores_of_the_data() -> None:
    alone = ON_POLICY.model_copy(update={"rollouts": ON_POLICY.rollouts.model_copy(update={"student_share": 1.0})})  # type: ignore[union-attr]
    assert not some_learn_from_data(bind(alone, read_space({"rollouts.lag": [0, 1]})))
    assert some_learn_from_data(bind(alone, read_space({"rollouts.student_share": [0.5, 1.0]})))
    assert some_learn_from_data(bind(ON_POLICY, read_space({"rollouts.lag": [0, 1]})))
