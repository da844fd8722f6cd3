"""What a user may say of a run of classification, what follows from its labels, and what a user is told."""

import copy
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.load import ConfigError, apply_override, dump_config, load_config, validate
from orchestrator.config.run import RunConfig
from tests.orchestrator.config.test_run import changed as language_models

TEXTS: dict[str, Any] = {
    "name": "grades",
    "task": {"kind": "classification", "labels": ["wrong", "partly", "right"], "field": "grade"},
    "tokenizer": {"vocab_size": 400},
    "data": {"source": {"kind": "builtin_grading"}, "format": {"kind": "text", "text": "{{ answer }}"}},
    "teacher": {"model": {"kind": "text_cnn"}, "finetune": {"train": {}}},
    "student": {"model": {"kind": "text_mlp"}},
    "loss": {"kind": "coupled"},
}
IMAGES: dict[str, Any] = {
    "name": "digits",
    "task": {"kind": "classification", "labels": list(range(10))},
    "data": {"source": {"kind": "digits"}, "format": {"kind": "image", "divide_by": 16}},
    "teacher": {"model": {"kind": "soft_labels"}},
    "student": {"model": {"kind": "image_cnn"}},
}
PACKED = "train={micro_batch_tokens: 64, packing: true}"


def changed(tree: dict[str, Any], *overrides: str) -> RunConfig:
    tree = copy.deepcopy(tree)
    for override in overrides:
        apply_override(tree, override)
    return validate(tree)


def test_k_the_engine_and_the_tail_follow_from_the_labels() -> None:
    config = changed(TEXTS)
    assert config.classes == 3 and config.scores.top_k == 2
    assert (config.teacher.engine.kind, config.teacher.engine.dtype) == ("transformers", "float32")
    assert config.loss.tail == "renormalize"  # type: ignore[union-attr]
    assert changed(IMAGES).scores.top_k == 9 and language_models().classes == 0


def test_what_is_said_of_them_stays_as_it_is_said() -> None:
    config = changed(TEXTS, "scores.top_k=2", "teacher.engine.dtype=bfloat16", "loss.tail=bucket")
    assert config.teacher.engine.dtype == "bfloat16" and config.loss.tail == "bucket"  # type: ignore[union-attr]
    assert changed(TEXTS, "loss.kind=hard_label").loss.kind == "hard_label"


@pytest.mark.parametrize("said", ["0", "null"])
def test_that_no_row_is_answered_may_be_said(said: str, tmp_path: Path) -> None:
    config = changed(TEXTS, f"evaluate.generate_rows={said}")
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml", ["evaluate.batch_rows=3"]).evaluate.generate_rows == config.evaluate.generate_rows
    with pytest.raises(ConfigError, match=r"evaluate\.generate_rows is for language models"):
        load_config(tmp_path / "again.yaml", ["evaluate.generate_rows=3"])
    with pytest.raises(ConfigError, match=r"evaluate\.generate_rows"):
        language_models("evaluate.generate_rows=null")


@pytest.mark.parametrize("tree", [TEXTS, IMAGES], ids=["texts", "images"])
def test_a_configuration_survives_being_written_and_read(tree: dict[str, Any], tmp_path: Path) -> None:
    config = changed(tree)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.labels=[a, b, a]"], r"labels has 'a' twice; once would do"),
        (["task.labels=[1, '1']"], r"labels has '1' twice"),
        (["task.labels=[yes, no]"], r"task\.labels: has True, which YAML makes of words such as yes, .*\['yes', 'no'\] would do"),
        (["task.labels=[0.5, 1]"], r"task\.labels: has 0\.5, neither a text nor a whole number; '0\.5' or 0 would do"),
        (
            ["task.ordered=false", "compare.metric=weighted_kappa"],
            r"compare\.metric weighted_kappa is measured of grades, and task\.ordered is false; .*metric=accuracy would do",
        ),
        (["task.labels=[]"], r"labels is empty; two are the least"),
        (["task.labels=[a]"], r"labels has 'a' alone; two are the least"),
        (["scores.top_k=5"], r"scores\.top_k is 5, but of 3 labels all 2 besides a row's own are kept; scores\.top_k=2 would do"),
        (["teacher.engine.kind=vllm"], r"teacher\.engine\.kind vllm serves language models, .*kind=transformers would do"),
        (["student.lora={rank: 4}"], r"student\.lora is for language models, .*; student\.lora=null would do"),
        (["responses={writer: teacher}"], r"responses is for language models, .*; responses=null would do"),
        (["rollouts={student_share: 0.5}"], r"rollouts is for language models, .*; rollouts=null would do"),
        (["evaluate.judge={model: judge}"], r"evaluate\.judge is for language models, .*; evaluate\.judge=null would do"),
        (["evaluate.benchmarks={tasks: [arc_easy]}"], r"evaluate\.benchmarks is for .*; evaluate\.benchmarks=null would do"),
        (["evaluate.teacher=scores"], r"evaluate\.teacher is for language models, .*; evaluate\.teacher=model would do"),
        (["evaluate.max_new_tokens=8"], r"evaluate\.max_new_tokens is for .*; evaluate\.max_new_tokens=64 would do"),
        (["evaluate.generate_rows=100"], r"evaluate\.generate_rows is for .*; evaluate\.generate_rows=0 would do"),
        (["evaluate.generate_rows=7"], r"evaluate\.generate_rows is for language models, and the task is classification"),
        (["evaluate.answer_pattern=(x)"], r"evaluate\.answer_pattern is for .*; evaluate\.answer_pattern=null would do"),
        (["scores.top_mass=0.9"], r"scores\.top_mass is for language models, .*; scores\.top_mass=null would do"),
        (["data.without_answer=drop"], r"data\.without_answer is for .*; data\.without_answer=refuse would do"),
        (["data.processes=2"], r"data\.processes is for language models, .*; data\.processes=1 would do"),
        (["data.special_tokens=strip"], r"data\.special_tokens is for .*; data\.special_tokens=split would do"),
        ([PACKED], r"train\.packing is for language models, and the task is classification; train\.packing=false would do"),
        ([f"teacher.finetune.{PACKED}"], r"teacher\.finetune\.train\.packing is for language models, .*=false would do"),
        ([f"student.finetune={{train: {PACKED[6:]}}}"], r"student\.finetune\.train\.packing is for language models"),
        (["data.format={kind: chat}"], r"the format of data\.source is chat, of language models, .*kind: text.* would do, or"),
        (["data.format={kind: image}"], r"teacher\.model\.kind text_cnn does not read images; teacher\.model\.kind=image_cnn wo"),
        (["student.model.kind=image_cnn"], r"student\.model\.kind image_cnn does not read texts; .*kind=text_cnn would do"),
        (["student.model={kind: scratch, layers: 1, heads: 1, hidden_size: 8}"], r"student\.model\.kind scratch is a language m"),
        (["student.model={kind: cut, layers: 1}"], r"student\.model\.kind cut is a language model, .*; text_cnn would do, or pr"),
        (["tokenizer=null"], r"student\.model text_mlp has no tokenizer of its own, .*tokenizer=\{vocab_size: 1000\} would do"),
        (["student.model={kind: pretrained, name: a/b}"], r"tokenizer is trained .*this one brings its own; tokenizer=null woul"),
        (["teacher.finetune=null"], r"teacher\.model is text_cnn with random weights, and teacher\.finetune is null: it has not"),
        (
            ["teacher={model: {kind: soft_labels}, calibrate: true}"],
            r"teacher\.model soft_labels is a table that knows each row's label, .*; teacher\.calibrate=false would do",
        ),
        (["teacher.similar_tokens={}"], r"teacher\.similar_tokens is for language models, .*similar_tokens=null would do"),
        (["teacher.model={kind: soft_labels}"], r"soft_labels is a table, .*; teacher\.finetune=null would do"),
        (["student.model={kind: text_cnn, kernels: []}"], r"kernels \[\] must be widths of at least one token; \[1, 2, 3\] woul"),
        (["student.model={kind: text_cnn, kernels: [0]}"], r"kernels \[0\] must be widths of at least one token"),
        (
            ["data={sources: [{source: {kind: builtin_grading}}, {source: {kind: digits}, format: {kind: image}}],"
             " format: {kind: text}}"],
            r"data has texts and images, and a classifier reads one of them; data\.format\.kind=text in all would do",
        ),
    ],
)  # fmt: skip
def test_what_texts_do_not_go_with_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(TEXTS, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer={vocab_size: 400}"], r"tokenizer is trained .*this one sees images; tokenizer=null would do"),
        (
            ["student.model={kind: pretrained, name: a/b}"],
            r"student\.model\.kind pretrained reads texts, and the rows are images",
        ),
        (["teacher.model={kind: text_cnn}"], r"teacher\.model\.kind text_cnn does not read images"),
        (["teacher.model.autoencoder={filters: []}"], r"filters \[\] must be numbers of at least 1; \[12, 24, 48\] are the"),
        (["teacher.model.autoencoder={filters: [4, 0]}"], r"filters \[4, 0\] must be numbers of at least 1"),
        (
            ["teacher.model.smoothing=0.3"],
            r"smoothing 0\.3 acts with similarity uniform alone; leave it out, or uniform would do",
        ),
        (
            ["teacher.model={kind: soft_labels, similarity: uniform, temperature: 2}"],
            r"temperature 2\.0 acts with similarity auto",
        ),
        (
            ["teacher.model={kind: soft_labels, similarity: uniform, diagonal_boost: 1}"],
            r"diagonal_boost 1\.0 acts with similarity autoencoder alone",
        ),
        (["teacher.model.similarity=file"], r"similarity file reads .* from table, which is null; table=labels\.json would do"),
        (["teacher.model.table=a.json"], r"table a\.json is read with similarity file alone; leave it out, or file would do"),
    ],
)
def test_what_images_and_soft_labels_do_not_go_with_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(IMAGES, *overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "student.model={kind: text_cnn}",
            r"student\.model\.kind text_cnn tells labels apart, .*, labels: \[\.\.\.\]\} would do",
        ),
        ("teacher.model={kind: image_cnn}", r"teacher\.model\.kind image_cnn tells labels apart"),
        ("teacher.model={kind: soft_labels}", r"teacher\.model\.kind soft_labels tells labels apart"),
        ("teacher.calibrate=true", r"teacher\.calibrate is for classifiers, .*; teacher\.calibrate=false would do"),
        ("tune.metric=accuracy", r"tune\.metric accuracy is measured of classifiers, .*; tune\.metric=top1_agreement would do"),
        ("data.format={kind: text}", r"the format of data\.source is text, of rows that are classified, .*such as instruction"),
        ("data.format={kind: image}", r"the format of data\.source is image, of rows that are classified"),
    ],
)
def test_language_models_have_no_classifiers_and_no_labels(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        language_models(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.gradient_checkpointing=true", r"train\.gradient_checkpointing true .* text_mlp has none .*=false would do"),
        ("train.sharding=fsdp", r"train\.sharding fsdp .* text_mlp has no blocks; train\.sharding=replicate would do"),
        ("train.compile=true", r"train\.compile true .* text_mlp has no blocks; train\.compile=false would do"),
        ("teacher.finetune.train.gradient_checkpointing=true", r"teacher\.finetune\.train\.gradient_check.* true .* text_cnn"),
    ],
)
def test_a_network_without_blocks_is_not_trained_by_blocks(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(TEXTS, override)
    changed(TEXTS, "teacher.finetune.train.sharding=fsdp")  # a text_cnn has blocks
