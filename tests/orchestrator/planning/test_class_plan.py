"""Plans of runs of classification: counts against the rows and models that a run makes, and what is said where nothing can be."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, BertConfig, XLNetConfig

from actors.engines.base import TeacherSpec
from actors.engines.classifier import ClassifierEngine
from actors.examples import ExampleFile
from actors.format import GIB
from actors.models import load_model
from actors.networks.classifier import SmallClassifier, SmallClassifierConfig
from actors.score_store.store import ScoreStore
from orchestrator.classification.label_words import read_asked
from orchestrator.classification.preparation import prepare_run
from orchestrator.cli import main
from orchestrator.config.run import RunConfig
from orchestrator.models.models import ROLES, Models
from orchestrator.planning.class_rows import read_class_rows
from orchestrator.planning.cluster_fit import gpu_bytes_of
from orchestrator.planning.jobs import trainings
from orchestrator.planning.plan import Plan, PlanOptions, make_plan
from orchestrator.planning.report import as_plain, time_lines
from orchestrator.run.run_dir import RunDir
from orchestrator.run.stages import rows_of
from tests.integration.test_classification import blots, tiny_bert
from tests.orchestrator.classification.test_label_words import config_of as asked_config
from tests.orchestrator.classification.test_label_words import language_model
from tests.orchestrator.config.test_classes import IMAGES, TEXTS, changed

ROWS = ("data.source.rows=200", "data.heldout_rows=50", "tokenizer.vocab_size=320")


def texts(folder: Path, *overrides: str) -> RunConfig:
    return changed(TEXTS, f"output={folder}", *ROWS, *overrides)


def images(folder: Path, *overrides: str) -> RunConfig:
    source = f"data.source={{kind: files, path: {blots(folder)}}}"
    return changed(IMAGES, f"output={folder}", "task.labels=[0, 1, 2]", source, "data.heldout_rows=30", *overrides)


def taught_by(folder: Path, finetune: str = "{train: {}}", **more: str) -> list[str]:
    """Overrides for a pretrained teacher in a folder."""
    said = "".join(f", {key}: {value}" for key, value in more.items())
    return [f"teacher={{model: {{kind: pretrained, name: {folder}}}, finetune: {finetune}{said}}}"]


def prepared(config: RunConfig) -> Models:
    """Prepare a run as the stage does, models included."""
    with RunDir.open(config) as run_dir:
        models = Models(config, run_dir.path)
        run_dir.stage("prepare", lambda: prepare_run(config, run_dir.path, models))
    return models


def planned(config: RunConfig, **asked: Any) -> Plan:
    return make_plan(config, PlanOptions(**asked))


# ---- rows


def test_rows_are_those_that_the_run_prepares_read_before_and_after(tmp_path: Path) -> None:
    config = texts(tmp_path, *taught_by(tiny_bert(tmp_path / "bert")))
    before = read_class_rows(config)
    assert not config.run_dir.exists(), "a plan leaves nothing behind"
    prepared(config)
    after = read_class_rows(config)
    assert (before.student.source, after.student.source) == (
        "the data, read for this plan", "the rows that this run has prepared",
    )  # fmt: skip
    for read in (before, after):
        for work, role in ((read.student, "student"), (read.teacher, "teacher")):
            train, heldout = (ExampleFile(rows_of(role, split, config.run_dir)) for split in ("train", "heldout"))  # type: ignore[arg-type]
            assert work.lengths.tolist() == [len(train[row].token_ids) for row in range(150)]
            assert (work.train_targets, work.heldout_targets, work.heldout_tokens) == (150, 50, heldout.tokens)
            assert work.longest == max(train.lengths.max(), heldout.lengths.max()) and work.unit == "tokens"
    assert before.student.train_tokens != before.teacher.train_tokens, "they have tokenizers of their own"
    other = config.model_copy(update={"task": config.task.model_copy(update={"group": "question"})})
    assert read_class_rows(other).student.source == "the data, read for this plan"


def test_a_language_model_reads_each_row_once_for_each_word(tmp_path: Path) -> None:
    words = [" bad", " good bad"]
    config = asked_config(tmp_path, language_model(tmp_path / "model"), words=words)
    rows = read_class_rows(config)
    prepared(config)
    asked = read_asked(config.run_dir / "data")
    file = ExampleFile(config.run_dir / "data" / "teacher_train.arrow")
    prompts = [len(file[row].token_ids) - 1 for row in range(len(file))]
    one, two = map(len, asked.token_ids)
    assert two > one and rows.words == (one, two)
    assert rows.scored.lengths.tolist() == [prompt + one + prompt + two for prompt in prompts]
    assert sorted(rows.asked.lengths.tolist()) == sorted([n + one for n in prompts] + [n + two for n in prompts])
    assert rows.asked.train_tokens == rows.scored.train_tokens and rows.scored.train_targets == (one + two) * len(prompts)
    heldout = ExampleFile(config.run_dir / "data" / "teacher_heldout.arrow")
    assert rows.scored.heldout_tokens == sum(2 * (len(heldout[row].token_ids) - 1) + one + two for row in range(len(heldout)))
    plan = planned(config)
    assert plan.estimator.shapes["teacher"].weights == sum(
        weight.numel() for weight in load_model(Models(config, config.run_dir).named("teacher")).parameters()
    )
    tokens = plan.work.train_tokens + plan.work.heldout_tokens
    assert plan.pace.scoring_seconds * plan.rates.scoring == pytest.approx(
        rows.scored.train_tokens + rows.scored.heldout_tokens
    )
    assert plan.pace.scoring_seconds * plan.rates.scoring > tokens
    assert "teacher.label_words: each row is read 2 times, once for each word" in plan.remarks


@pytest.mark.parametrize(
    ("tree", "overrides", "asked", "message"),
    [
        (TEXTS, [], {"probe": True}, "--probe measures language models, and task.kind is classification; without it the speeds"),
        (TEXTS, [], {"rows": 5}, "--rows and --row-tokens go together; say both, or none to have the data read"),
        (TEXTS, [], {"rows": 5, "row_tokens": 9.0, "row_targets": 3.0}, "--row-targets 3: a row of classification has one, its"),
        (TEXTS, [], {"rows": 0, "row_tokens": 9.0}, "--rows 0 is no number of training rows; 1 is the least"),
        (TEXTS, [], {"rows": 5, "row_tokens": 1e6}, r"--row-tokens 1e\+06 must lie between 2 and data.max_tokens"),
        (TEXTS, ["data.source={kind: hub, name: a/b}"], {}, "is on the hub and .* say --rows and --row-tokens, or run the co"),
        (IMAGES, ["data.source={kind: hub, name: a/b}"], {}, "is on the hub .* its rows are not known; run the command prepare"),
        (IMAGES, [], {"rows": 5, "row_tokens": 9.0}, "--rows and --row-tokens are for texts, and the rows are images, whose"),
    ],
)  # fmt: skip
def test_what_a_plan_of_classifiers_cannot_be_told_is_refused(
    tree: dict[str, Any], overrides: list[str], asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        planned(changed(tree, *overrides), **asked)


def test_rows_on_the_hub_may_be_said(tmp_path: Path) -> None:
    plan = planned(texts(tmp_path, "data.source={kind: hub, name: a/b}", "data.max_tokens=64"), rows=1000, row_tokens=20.0)
    assert (plan.work.rows, plan.work.train_tokens, plan.work.longest, plan.work.heldout_targets) == (1000, 20_000, 64, 50)
    assert plan.estimator.shapes["student"].weights == planned(texts(tmp_path)).estimator.shapes["student"].weights
    words = asked_config(tmp_path, language_model(tmp_path / "model"))
    said = planned(words, rows=100, row_tokens=10.0)
    assert said.estimator.scored.train_tokens == 100 * 2 * 10
    assert any("each prompt counts as long as you said of the rows, and each word as one token" in line for line in said.remarks)


# ---- models


NETWORKS = ["{kind: text_mlp}", "{kind: text_cnn, kernels: [1, 3]}", "{kind: text_rnn}"]


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_are_those_of_the_models_that_a_run_makes(network: str, tmp_path: Path) -> None:
    config = texts(tmp_path, f"student.model={network}")
    plan, models = planned(config), prepared(config)
    for role in ROLES:
        real = load_model(models.begun(role))
        assert plan.estimator.shapes[role].weights == sum(weight.numel() for weight in real.parameters())
        assert plan.memory["train" if role == "student" else "finetune_teacher"].parts["weights"] == (
            4 * plan.estimator.shapes[role].weights
        )
    assert plan.fits and plan.estimator.shapes["student"].vocab_size == 3


def test_pretrained_classifiers_are_counted_from_their_configuration_alone(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert")
    made = texts(tmp_path, *taught_by(folder, calibrate="true"))
    prepared(made)
    real = load_model(Models(made, made.run_dir).begun("teacher"))
    weights = next(folder.glob("*.safetensors"))
    weights.unlink()
    plan = planned(made.model_copy(update={"name": "other"}))
    shape = plan.estimator.shapes["teacher"]
    assert shape.weights == sum(weight.numel() for weight in real.parameters())
    assert (shape.hidden_size, shape.intermediate_size, shape.layers, shape.heads, shape.vocab_size) == (32, 64, 1, 2, 3)
    assert shape.largest_matrix == real.bert.embeddings.word_embeddings.weight.numel() and shape.token_flops is None
    assert plan.store["heldout"] == 2 * planned(texts(tmp_path / "plain")).store["heldout"], "before and after the calibration"
    assert any(line.startswith("teacher.calibrate: the held-out rows are scored and stored twice") for line in plan.remarks)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"architectures": ["BertForSequenceClassification"], "id2label": {0: "a", 1: "b"}}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"has no label 'wrong'; its labels are a, b"):
        planned(made.model_copy(update={"name": "other"}))


def test_where_activations_cannot_be_told_it_is_said(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert")
    XLNetConfig(vocab_size=400, d_model=32, n_layer=1, n_head=2, d_inner=64).save_pretrained(folder)
    plan = planned(texts(tmp_path, *taught_by(folder)))
    assert (
        "teacher: what XLNetForSequenceClassification keeps for its backward pass cannot be told without its weights, so the "
        "memory of its training lacks it; a short run would tell"
    ) in plan.remarks
    assert plan.estimator.shapes["teacher"].hidden_size == 32


# ---- the plan


def test_store_bytes_are_those_of_files(tmp_path: Path) -> None:
    config = texts(tmp_path, "scores.rows_per_shard=1000", "data.source.rows=2050")
    models = prepared(config)
    examples = ExampleFile(config.run_dir / "data" / "train.arrow")
    store = ScoreStore.open_or_create(tmp_path / "store", {"top_k": 2, "vocab_size": 3, "exact": True}, 2000, 1000)
    spec = TeacherSpec(config.teacher.engine, models.begun("teacher"), 2, int(examples.lengths.max()))
    engine = ClassifierEngine(spec)
    for shard in store.missing_shards():
        mine = [examples[position] for position in store.positions(shard)]
        store.write_shard(shard, mine, engine.score(mine))
    written = sum(path.stat().st_size for path in Path(store.place).glob("shard-*.[ar]*"))
    assert planned(config).store["train"] == pytest.approx(written, rel=0.02)


def test_a_table_needs_no_device_and_no_time(tmp_path: Path) -> None:
    plan = planned(images(tmp_path, "teacher.model.similarity=uniform"))
    assert plan.pace.scoring_seconds == 0 and plan.memory["scoring"].total == 4 * 3 * 3
    assert as_plain(plan)["tokens_per_second"]["replica"] is None, "JSON knows no infinity"
    assert time_lines(plan)[0].startswith("speed: a replica looks its table up, a worker learns ")
    assert any(line.startswith("teacher: a table of 3 x 3, label smoothing; labels are looked up") for line in plan.remarks)
    fitted = planned(images(tmp_path))
    assert any("an autoencoder is fitted to the training rows; how long that takes is in none" in line for line in fitted.remarks)
    on_gpus = planned(images(tmp_path), gpus=1, gpu_memory=80.0)
    assert any(line.startswith("the student takes no GPU") for line in on_gpus.remarks)
    assert not any(line.startswith("the teacher takes no GPU") for line in on_gpus.remarks)


def bert_on_gpus(folder: Path, *overrides: str) -> RunConfig:
    bert = tiny_bert(folder / "bert")
    BertConfig(vocab_size=30_522, max_position_embeddings=512).save_pretrained(bert)
    fit = "{workers: {gpus: 1}, train: {batch_rows: 256, micro_batch_rows: 256}}"
    own = ("workers.gpus=1", "scores.overlap=false", *overrides)
    return texts(folder, *taught_by(bert, fit, engine="{gpu: true}"), *own)


def test_a_plan_that_does_not_fit_names_the_nearest_that_does(tmp_path: Path) -> None:
    config = bert_on_gpus(tmp_path)
    plan = planned(config, gpus=1, gpu_memory=4.0)
    assert [problem.split(":")[0] for problem in plan.problems] == ["teacher.finetune.train"]
    assert plan.nearest is not None and plan.nearest.config is not None
    assert plan.nearest.overrides[0].startswith("teacher.finetune.train.micro_batch_rows=")
    job = trainings(plan.nearest.config)[0]
    before, after = plan.memory["finetune_teacher"], plan.estimator.training(job)
    assert gpu_bytes_of(after) < 4 * GIB < gpu_bytes_of(before) and after.parts["activations"] < before.parts["activations"]
    assert plan.nearest_pace is not None and plan.nearest_pace.seconds > 0
    weights = plan.estimator.shapes["teacher"].weights
    assert weights == sum(
        weight.numel() for weight in AutoModelForSequenceClassification.from_config(BertConfig(num_labels=3)).parameters()
    )
    assert planned(config, gpus=1, gpu_memory=80.0).fits


def test_an_evaluator_that_is_too_large_has_no_remedy_that_classifiers_refuse(tmp_path: Path) -> None:
    config = bert_on_gpus(tmp_path, "evaluate={gpus: 1, batch_rows: 30000}", "teacher.finetune.train.micro_batch_rows=8")
    (problem,) = planned(config, gpus=1, gpu_memory=8.0).problems
    assert problem.startswith("evaluate: the evaluator with the teacher takes ") and "evaluate.teacher" not in problem


def test_the_command_plans_the_graded_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "configs/grading_cpu.yaml", f"output={tmp_path}", *ROWS]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "150 rows" in shown and "150 targets" in shown and "verdict: fits 1 node" in shown
    assert "student: text_cnn does " in shown and "--probe" not in shown
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["data"]["rows"] == 150 and set(plan["memory_bytes"]) == {"scoring", "finetune_teacher", "train"}
    student = SmallClassifier(
        SmallClassifierConfig({"kind": "text_cnn", "width": 16, "filters": 16, "kernels": [1, 2, 3]}, 320, num_labels=3)
    )
    assert plan["models"]["student"]["weights"] == sum(weight.numel() for weight in student.parameters())
    assert plan["seconds"]["finetune_teacher"] > plan["seconds"]["epoch"] > 0 and plan["fits"]


def test_the_command_plans_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert main(["plan", "configs/digits_reffakd.yaml", f"output={tmp_path}", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["data"]["rows"] == 1797 - 500 and plan["data"]["tokens"] == 1297 * 65 and plan["data"]["longest"] == 65
    assert plan["models"]["teacher"]["weights"] == 100 and plan["tokens_per_second"]["replica"] is None
