"""What a user may write, and what a user is told."""

import copy
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.config.load import (
    ConfigError,
    apply_override,
    config_difference,
    dump_config,
    load_config,
    parse_yaml,
    validate,
)
from orchestrator.config.run import RunConfig

CONFIGS = sorted(Path("configs").glob("*.yaml"))

SMALL: dict[str, Any] = {
    "name": "small",
    "tokenizer": {"vocab_size": 400},
    "teacher": {"model": {"kind": "scratch", "hidden_size": 64, "layers": 2, "heads": 2}, "finetune": {"train": {}}},
    "student": {"model": {"kind": "scratch", "hidden_size": 32, "layers": 1, "heads": 2}},
}


def changed(*overrides: str) -> RunConfig:
    tree = copy.deepcopy(SMALL)
    for override in overrides:
        apply_override(tree, override)
    return validate(tree)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads_and_survives_being_written_and_read(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


def test_there_are_configs_for_a_laptop_and_for_clusters() -> None:
    laptops = {"tiny_cpu", "teacher_written_cpu", "gsm8k_cpu"}
    assert laptops | {"qwen_7b_to_0.5b_one_node", "qwen_7b_to_0.5b_cluster"} <= {path.stem for path in CONFIGS}


def test_overrides_are_read_as_yaml() -> None:
    config = changed("loss.kind=atkd", "loss.easy_ratio=0.3", "student.lora={rank: 4}", "train.optimizer.clip_norm=null")
    assert config.loss.easy_ratio == 0.3  # type: ignore[union-attr]
    assert config.student.lora is not None and config.student.lora.rank == 4
    assert config.train.optimizer.clip_norm is None


def test_the_defaults_are_the_papers() -> None:
    loss = changed().loss
    assert (loss.kind, loss.easy_ratio, loss.easy_weight, loss.scope) == ("atkd", 0.5, 0.2, "batch")  # type: ignore[union-attr]


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        changed().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.kind=atkd", "loss.easy_ration=0.3"], r"loss\.easy_ration: there is no such key; did you mean easy_ratio\?"),
        (["loss.kind=coupled", "loss.easy_ratio=0.3"], r"loss\.easy_ratio: does not go with coupled"),
        (["loss.kind=atkd", "loss.easy_ratio=3"], r"loss\.easy_ratio: Input should be less than or equal to 1; got 3"),
        (["loss.kind=atdk"], r"loss\.kind: there is no 'atdk'; did you mean atkd\? there are atkd, coupled, decoupled, "),
        (["loss.kind=3"], r"loss\.kind: there is no '3'; there are atkd, coupled, "),
        (["loss={kind: atkd, divergence: foward_kl}"], r"loss\.divergence\.kind: .* did you mean forward_kl\? there are "),
        (["loss={kind: atkd, tail: buckt}"], r"loss\.tail: there is no 'buckt'; did you mean bucket\? there are bucket, "),
        (["data.source.kind=filez"], r"data\.source\.kind: there is no 'filez'; did you mean files\? there are builtin, bui"),
        (["data.format={kind: Chat}"], r"data\.format\.kind: there is no 'Chat'; did you mean chat\? there are instruction, "),
        (["teacher.model.kind=pretraned"], r"teacher\.model\.kind: there is no 'pretraned'; did you mean pretrained\? there "),
        (["teacher.engine.kind=vlm"], r"teacher\.engine\.kind: there is no 'vlm'; did you mean vllm\? there are vllm, trans"),
        (["teacher.engine.kind=[1]"], r"teacher\.engine\.kind: there is no \[1\]; there are vllm, transformers$"),
        (["teacher.engine.dtype=bf16"], r"teacher\.engine\.dtype: there is no 'bf16'; .*there are float32, bfloat16, float16$"),
        (["tune.search=gird"], r"tune\.search: there is no 'gird'; did you mean grid\? there are grid, random, tpe$"),
        (["data.source=hub"], r"data\.source: is a section of keys, such as data\.source\.kind; got 'hub'$"),
        (["teacher.engine=3"], r"teacher\.engine: is a section of keys, such as teacher\.engine\.kind; got 3$"),
        (["loss=null"], r"loss: is a section of keys, such as loss\.kind; got None$"),
        (["train.learning_rate=1"], r"train\.learning_rate: there is no such key; there is train\.optimizer\.learning_rate"),
        (["loss.teaching=atkd"], r"loss\.teaching: is now loss\.kind$"),
        (["loss={teaching: atkd, easy_ratio: 0.3}"], r"loss\.teaching: is now loss\.kind$"),
        (["teacher.fit={train: {}}"], r"teacher\.fit: is now teacher\.finetune$"),
        (["student.fit=null"], r"student\.fit: is now student\.finetune$"),
        (["bogus=1"], r"bogus: there is no such key; there are checkpoints, compare, data, evaluate, "),
        (["data.source={kind: files}"], r"data\.source\.path: is missing"),
        (["data.source.rows=50"], r"data\.source: needs 'kind', which says what it is; got \{'rows': 50\}"),
        (["data.source={kind: builtin, tasks: [sing]}"], r"data\.source.*no task is called 'sing'; there are add,"),
        (["data.source={kind: builtin, tasks: []}"], r"data\.source.*tasks is empty; name at least one"),
        (["data.max_tokens=abc"], r"data\.max_tokens: Input should be a valid integer.*got 'abc'"),
        (["name=../x"], r"name: String should match pattern"),
        (["teacher.finetune=null"], r"teacher\.model is scratch but teacher\.finetune is null.*add teacher\.finetune"),
        (["seed=4294967296"], r"seed: Input should be less than or equal to 4294967295; got 4294967296"),
        (["data.seed=-1"], r"data\.seed: Input should be greater than or equal to 0; got -1"),
        (["tune.seed=1e10"], r"tune\.seed: Input should be"),
        (["tokenizer=null"], r"both models are scratch and tokenizer is null: add a tokenizer section"),
        (["teacher.model={kind: pretrained, name: gpt2}"], r"tokenizer is trained only where both .*set tokenizer to null"),
        (["teacher.model.heads=4"], r"heads of size 16 .* vLLM on CPUs serves the sizes 32, 64.*: hidden_size 128 would do"),
        (["student.model.hidden_size=33"], r"hidden_size 33 must be an even multiple of heads 2; hidden_size 32 would do"),
        (["student.model.kv_heads=3"], r"heads 2 must be a multiple of kv_heads 3; kv_heads 1 would do"),
        (["teacher.engine.tensor_parallel=2"], r"tensor_parallel 2 needs gpu: true; without GPUs 1 would do"),
        (
            ["teacher.engine={kind: transformers, gpu: true, tensor_parallel: 2}"],
            r"tensor_parallel 2 needs kind: vllm; for transformers 1 would do",
        ),
        (["scores={root: a, path: b}"], r"root and path exclude each other"),
        (["loss={kind: atkd, scope: dataset}"], r"loss\.scope dataset .* set scores\.overlap to false"),
        (["rollouts={student_shar: 0.5}"], r"rollouts\.student_shar: there is no such key; did you mean student_share\?"),
        (["rollouts={student_share: 0}"], r"rollouts\.student_share: Input should be greater than 0; got 0"),
        (["rollouts={student_share: 1.5}"], r"rollouts\.student_share: Input should be less than or equal to 1; got 1\.5"),
        (["rollouts={max_new_tokens: 0}"], r"rollouts\.max_new_tokens: Input should be greater than or equal to 1; got 0"),
        (["rollouts={temperature: -1}"], r"rollouts\.temperature: Input should be greater than or equal to 0; got -1"),
        (
            ["loss={kind: coupled, divergence: sampled_reverse_kl}"],
            r"sampled_reverse_kl takes all targets for tokens that the student drew .* but rollouts is null; "
            r"rollouts=\{student_share: 1\.0\} .* would do, or loss\.divergence=reverse_kl",
        ),
        (
            ["loss={kind: coupled, divergence: sampled_reverse_kl}", "rollouts={top_p: 0.9}", "student.model.hidden_size=64"],
            r"but rollouts\.student_share is 0\.5, rollouts\.top_p is 0\.9; ",
        ),
        (["rollouts={temperature: 0.005}"], r"temperature 0\.005 lies between 0 and 0\.01, where vLLM samples at 0\.01"),
        (["rollouts={top_p: 0}"], r"rollouts\.top_p: Input should be greater than 0; got 0"),
        (["rollouts={top_p: 1.1}"], r"rollouts\.top_p: Input should be less than or equal to 1; got 1\.1"),
        (["rollouts={refresh_steps: 0}"], r"rollouts\.refresh_steps: Input should be greater than or equal to 1; got 0"),
        (["rollouts={lag: -1}"], r"rollouts\.lag: Input should be greater than or equal to 0; got -1"),
        (["rollouts={keep_steps: 0}"], r"rollouts\.keep_steps: Input should be greater than or equal to 1; got 0"),
        (["rollouts={wire: candidate}"], r"rollouts\.wire: there is no 'candidate'; did you mean candidates\?"),
        (
            ["rollouts={wire: hidden, student_share: 0.4}"],
            r"rollouts: wire is hidden, but student_share is 0\.4, .*; student_share=1\.0 without .* wire=candidates$",
        ),
        (
            ["rollouts={wire: hidden, student_share: 1.0, adaptive_share: {every_steps: 10}}"],
            r"rollouts: wire is hidden, but adaptive_share begins lower, and of rows that stay .* would do, or wire=candidates$",
        ),
        (
            ["rollouts={engine: {replicas: auto}}"],
            r"rollouts: engine\.replicas is auto, but samplers stand beside teacher and student; 1 would do$",
        ),
        (
            ["rollouts={}", "student.model.hidden_size=64", "loss={kind: hard_label}"],
            r"loss\.kind hard_label learns from the rows as they are, and with rollouts the student would learn its own tokens; "
            r"loss\.kind=atkd would do, or rollouts=null",
        ),
        (
            ["rollouts={}", "student.model.hidden_size=64", "loss={kind: atkd, scope: dataset}", "scores.overlap=false"],
            r"loss\.scope dataset ranks tokens over all rows before the training, but with rollouts rows are written on the way; "
            r"loss\.scope=batch would do",
        ),
        (
            ["rollouts={}", "student.model.hidden_size=16"],
            r"student\.model has heads of size 8 .* vLLM on CPUs serves the sizes 32, 64.*: hidden_size 64 would do",
        ),
        (["loss={kind: atkd, scope: microbatch, split: random}"], r"the authors' rule and has no split 'random'"),
        (["responses={writer: judge}"], r"responses\.writer: there is no 'judge'; .*there are teacher, student$"),
        (["responses={temperature: 1}"], r"responses\.writer: is missing"),
        (
            ["responses={writer: teacher, samples_per_prompt: 4, temperature: 0}"],
            r"samples_per_prompt 4 with temperature 0 writes each .*; samples_per_prompt 1, or temperature 1\.0, would do",
        ),
        (
            ["responses={writer: teacher, temperature: 0.005}"],
            r"temperature 0\.005 lies between 0 and 0\.01, where vLLM samples at 0\.01; temperature 0, .* would do",
        ),
        (["responses={writer: teacher, temperature: 2.5}"], r"responses\.temperature: Input should be less than or equal to 2"),
        (["responses={writer: teacher, top_p: 0}"], r"responses\.top_p: Input should be greater than 0; got 0"),
        (
            ["responses={writer: teacher}", "compare.teachers={one: {}, other: {finetune: null}}"],
            r"compare\.teachers compares teachers on the same rows, but responses has them written: responses=null would do",
        ),
        (
            ["responses={writer: student}", "student.model.heads=1", "student.model.hidden_size=40"],
            r"student\.model has heads of size 40 .* hidden_size 32 would do",
        ),
        (
            ["teacher.engine.kind=transformers", "teacher.model.heads=4", "responses={writer: teacher, engine: {kind: vllm}}"],
            r"teacher\.model has heads of size 16 .* hidden_size 128 would do",
        ),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_one_that_would_do(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(*overrides)


def test_the_writer_of_responses_is_served_as_the_teacher_unless_an_engine_is_given() -> None:
    assert changed().writer_engine is None and list(changed().engines) == ["teacher.engine"]
    served = changed("responses={writer: teacher}", "teacher.engine.cpus=3")
    assert served.writer_engine is served.teacher.engine and list(served.engines) == ["teacher.engine"]
    own = changed("responses={writer: student, engine: {kind: transformers, cpus: 2}}")
    assert own.responses is not None and own.writer_engine is own.responses.engine
    assert list(own.engines) == ["teacher.engine", "responses.engine"]
    small = "student.model={kind: scratch, hidden_size: 20, layers: 1, heads: 1}"
    assert changed(small, "responses={writer: student, engine: {kind: transformers}}").responses is not None


def test_models_made_from_scratch_have_room_for_the_longest_text() -> None:
    sizes = ["data.max_tokens=100", "evaluate.max_new_tokens=30"]
    assert changed(*sizes).longest_text == 130
    assert changed(*sizes, "responses={writer: teacher, max_new_tokens: 20}").longest_text == 130
    assert changed(*sizes, "responses={writer: teacher, max_new_tokens: 50}").longest_text == 151


def test_a_loss_that_learns_from_rows_alone_goes_without_rollouts() -> None:
    assert changed("rollouts=null", "loss={kind: hard_label}").rollouts is None


def test_dataset_scope_without_overlap_is_accepted() -> None:
    assert changed("loss={kind: atkd, scope: dataset}", "scores.overlap=false").loss.scope == "dataset"  # type: ignore[union-attr]


@pytest.mark.parametrize(("refresh_steps", "lag", "least"), [(1, 0, 31), (4, 0, 34), (4, 2, 42)])
def test_as_many_steps_are_kept_as_a_training_that_resumes_reads_again(refresh_steps: int, lag: int, least: int) -> None:
    others = "train={keep_checkpoints: 3, checkpoint_every_steps: 10}", "student.model.hidden_size=64"
    rollouts = f"refresh_steps: {refresh_steps}, lag: {lag}"
    with pytest.raises(
        ConfigError,
        match=rf"rollouts\.keep_steps is {least - 1}, but a training that resumes from the oldest of train\.keep_checkpoints 3 "
        rf"checkpoints reads up to {least} steps again; rollouts\.keep_steps={least} would do",
    ):
        changed(*others, f"rollouts={{{rollouts}, keep_steps: {least - 1}}}")
    for keep_steps in (least, least + 1, None):
        kept = changed(*others, f"rollouts={{{rollouts}, keep_steps: {'null' if keep_steps is None else keep_steps}}}").rollouts
        assert kept is not None and kept.keep_steps == keep_steps


def test_samplers_are_served_as_the_teacher_is_by_one_replica_unless_they_have_an_engine() -> None:
    teacher = "teacher.engine={kind: transformers, dtype: float32, replicas: auto, cpus: 2}"
    engine = changed(teacher, "rollouts={}").sampler_engine
    assert (engine.kind, engine.dtype, engine.replicas, engine.cpus) == ("transformers", "float32", 1, 2)
    own = changed(teacher, "rollouts={engine: {kind: transformers, dtype: bfloat16, replicas: 3}}").sampler_engine
    assert (own.dtype, own.replicas, own.cpus) == ("bfloat16", 3, 1)


@pytest.mark.parametrize(
    ("overrides", "learns"), [([], True), (["rollouts={}"], True), (["rollouts={student_share: 1.0}"], False)]
)
def test_rows_are_learned_from_as_they_are_unless_the_student_writes_all(overrides: list[str], learns: bool) -> None:
    assert changed("student.model.hidden_size=64", *overrides).learns_from_data is learns


def test_a_missing_file_points_to_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"no configuration file at configs/tiny_cpuu\.yaml; did you mean configs/tiny_cpu\.yaml\?"
    ):
        load_config("configs/tiny_cpuu.yaml")
    with pytest.raises(ConfigError, match=r"there are configs/digits_reffakd\.yaml, "):
        load_config("zzz")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "x.yaml is not YAML"), ("- 1", "must hold a mapping.*it holds list"), ("", "it holds NoneType"),
     ("a: 1\na: 2", "key 'a' stands twice")],
)  # fmt: skip
def test_a_text_that_is_no_mapping_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "x.yaml")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"aaa.* cannot be read: .*File name too long"):
        load_config(tmp_path / ("a" * 300))


@pytest.mark.parametrize("key", ["output", "scores.root", "scores.path", "data.source.path"])
def test_a_path_below_a_home_that_nobody_knows_is_refused(key: str) -> None:
    overrides = ["data.source={kind: files, path: rows.jsonl}", f"{key}=~nobody-of-that-name/runs"]
    with pytest.raises(ConfigError, match=rf"{key} '~nobody-of-that-name/runs': there is no such home folder; a whole path"):
        load_config("configs/tiny_cpu.yaml", overrides)


def test_the_difference_of_two_configs_names_each_key() -> None:
    ours, theirs = changed().model_dump(mode="json"), changed("seed=3", "teacher.engine.dtype=float32").model_dump(mode="json")
    assert config_difference(ours, theirs) == ["seed: 0 here, 3 there", "teacher.engine.dtype: 'bfloat16' here, 'float32' there"]


def test_what_a_whole_variant_refuses_is_told_of_its_section() -> None:
    with pytest.raises(ConfigError, match=r"\n  loss: divergence jensen_shannon does not fall into a target and a diversity"):
        load_config("configs/tiny_cpu.yaml", ["loss.divergence=jensen_shannon"])
