"""The doctor of runs of classification: sound teachers pass, and what serves other scores is found."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertForSequenceClassification

from actors.config.models import EngineConfig
from actors.engines.base import EngineFactory, TeacherSpec
from actors.engines.build import build_engine
from actors.engines.classifier import ClassifierEngine
from actors.examples import ExampleFile, write_examples
from actors.model_source import ModelSource
from actors.models import save_model
from actors.networks.classifier import SmallClassifier, SmallClassifierConfig
from actors.records import Example, TeacherScores
from actors.score_store.store import ScoreStore
from actors.teacher.class_parity import ClassParity, measure_classes
from actors.teacher.replica import TeacherReplica
from orchestrator.classification.preparation import prepare_run
from orchestrator.classification.rows import read_counts
from orchestrator.cli import main
from orchestrator.config.run import RunConfig
from orchestrator.data.grading import GRADES, make_graded_answers
from orchestrator.doctor.class_checks import check_class_scores
from orchestrator.doctor.class_doctor import check_class_rows, spread_over_labels
from orchestrator.doctor.doctor import diagnose
from orchestrator.models.models import Models
from orchestrator.run.run_dir import RunDir
from orchestrator.run.score_parity import Finding
from tests.faulty_engines import CrowdedLabels, HotLabels, RolledLabels, SwappedLabels
from tests.integration.test_classification import tiny_bert
from tests.integration.test_label_words import language_model
from tests.orchestrator.config.test_classes import TEXTS, changed

CLASSES = 4
ENGINE = EngineConfig(kind="transformers", dtype="float32")


def rows_of_labels(count: int, features: Any) -> list[Example]:
    """Rows that have their labels behind their features."""
    rows = []
    for row in range(count):
        token_ids = np.append(features(row), row % CLASSES).astype(np.int32)
        rows.append(Example(token_ids, np.arange(len(token_ids)) == len(token_ids) - 1, f"{row:032x}", row))
    return rows


def network(folder: Path, kind: str, scale: float = 1.0) -> TeacherSpec:
    """A network, or a table, in a folder, and how it is served."""
    torch.manual_seed(1)
    shape = (1, 4, 4) if kind.startswith("image") else ()
    settings = {"kind": kind} if kind == "label_table" else {"kind": kind, "dropout": 0.0} if not shape else {"kind": kind}
    model = SmallClassifier(SmallClassifierConfig(settings, 20, shape, num_labels=CLASSES)).eval()
    for weight in model.parameters():
        weight.data = (scale * torch.randn(CLASSES, CLASSES)).log_softmax(dim=1) if kind == "label_table" else 2 * weight.data
    save_model(model, None, folder / kind)
    return TeacherSpec(ENGINE, ModelSource(str(folder / kind), classes=CLASSES), CLASSES - 1, 20)


def rows_for(kind: str) -> list[Example]:
    draws = np.random.default_rng(0)
    if kind.startswith("image"):
        return rows_of_labels(8, lambda row: draws.random(16, dtype=np.float32).view(np.int32))
    return rows_of_labels(8, lambda row: draws.integers(1, 20, 3 + row))


def measured(spec: TeacherSpec, rows: list[Example], folder: Path, engine_factory: EngineFactory = build_engine) -> ClassParity:
    """What the doctor does with a few rows, in this process."""
    write_examples(folder / "rows.arrow", rows)
    classes = spec.top_k + 1
    for name, rows_per_shard in (("alone", 1), ("together", len(rows))):
        identity = {"top_k": spec.top_k, "vocab_size": classes, "exact": True}
        store = ScoreStore.open_or_create(folder / name, identity, len(rows), rows_per_shard)
        replica = TeacherReplica(spec, engine_factory)
        replica.start()
        for shard in store.missing_shards():
            replica.score_shard(folder / "rows.arrow", Path(store.place), shard)
    stores = str(folder / "alone"), str(folder / "together")
    return measure_classes(spec.model, spec.label_words, str(folder / "rows.arrow"), *stores)


def judged(found: ClassParity, of_words: bool = False) -> dict[str, Finding]:
    findings = check_class_scores(found, "float32", CLASSES, of_words=of_words, of_table=False)
    return {finding.check: finding for finding in findings}


@pytest.mark.parametrize("kind", ["text_mlp", "text_cnn", "text_rnn", "image_cnn", "image_resnet", "label_table"])
def test_what_is_served_of_labels_is_a_plain_forward_pass(kind: str, tmp_path: Path) -> None:
    found = measured(network(tmp_path, kind), rows_for(kind), tmp_path)
    assert {judged(found)[name].state for name in ("batch", "raw", "served")} == {"ok"}
    assert found.largest_target_error < 1e-5 and found.others_error < 1e-5 and abs(found.slope - 1) < 1e-4
    assert found.rows == 8 and found.spread > 0.05


def test_what_is_served_of_words_is_a_plain_forward_pass(tmp_path: Path) -> None:
    source = ModelSource(str(language_model(tmp_path / "model")))
    model = sharpen(source)
    words = ((30,), (40, 41), (50,), (61, 60))
    spec = TeacherSpec(ENGINE, source, CLASSES - 1, 20, label_words=words)
    rows = rows_of_labels(8, lambda row: np.arange(20, 23 + row))
    found = measured(spec, rows, tmp_path)
    assert {finding.state for name, finding in judged(found, of_words=True).items() if name != "teacher"} == {"ok"}
    sums = []
    for word in words:  # the same by hand, for the first row
        ids = [*rows[0].token_ids[:-1].tolist(), *word]
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].detach().double().log_softmax(dim=1)
        sums.append(sum(float(logprobs[len(ids) - len(word) + place - 1, token]) for place, token in enumerate(word)))
    expected = np.array(sums) - np.log(np.exp(sums).sum())
    served = ScoreStore(str(tmp_path / "alone")).scores_at(0)
    assert float(served.target_logprob[0]) == pytest.approx(expected[0], abs=1e-5)


def sharpen(source: ModelSource) -> torch.nn.Module:
    """Make a model's predictions differ more, write it again, and return it."""
    model = AutoModelForCausalLM.from_pretrained(source.name)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    model.save_pretrained(source.name)
    return model.eval()


@pytest.mark.parametrize(
    ("fault", "check", "said"),
    [
        (RolledLabels, "served", "is not what the teacher's own forward pass says"),
        (SwappedLabels, "served", "other labels differ by at most"),
        (HotLabels, "raw", "slope 0.80"),
        (CrowdedLabels, "batch", "scores depend on the rows beside them"),
    ],
)
def test_a_fault_fails_the_check_that_is_there_for_it(fault: Any, check: str, said: str, tmp_path: Path) -> None:
    found = judged(measured(network(tmp_path, "text_cnn"), rows_for("text_cnn"), tmp_path, fault))
    assert [name for name, finding in found.items() if finding.state == "FAILED"] == [check]
    assert said in found[check].line()


def test_differences_smaller_than_a_step_of_other_stores_are_measured(tmp_path: Path) -> None:
    """The others' log-probabilities are not rounded, and nothing is taken off for it."""

    class Trembling(ClassifierEngine):
        def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
            off = np.float32(1e-4 if len(examples) == 1 else -2e-4)
            return [replace(one, topk_logprobs=one.topk_logprobs + off) for one in super().score(examples)]

    found = measured(network(tmp_path, "text_cnn"), rows_for("text_cnn"), tmp_path, Trembling)
    assert found.others_error == pytest.approx(1e-4, abs=1e-5) and found.batch_error == pytest.approx(3e-4, abs=1e-5)


def test_a_temperature_is_told_of_a_table_that_is_nearly_uniform(tmp_path: Path) -> None:
    spec = network(tmp_path, "label_table", scale=3e-3)
    found = measured(spec, rows_for("label_table"), tmp_path)
    assert 1e-3 < found.spread < 5e-3 and judged(found)["raw"].state == "ok" and abs(found.slope - 1) < 1e-3
    (tmp_path / "hot").mkdir()
    hot = judged(measured(spec, rows_for("label_table"), tmp_path / "hot", HotLabels))["raw"]
    assert hot.state == "FAILED" and "slope 0.80" in hot.numbers


def test_the_rows_that_are_tried_are_of_all_labels(tmp_path: Path) -> None:
    write_examples(tmp_path / "rows.arrow", rows_of_labels(40, lambda row: np.ones(1 + row % 7)))
    rows = spread_over_labels(ExampleFile(tmp_path / "rows.arrow"), 8)
    labels = [int(row.targets[0]) for row in rows]
    assert labels == sorted(labels) and set(labels) == set(range(CLASSES)) and len({len(row.token_ids) for row in rows}) > 2
    write_examples(tmp_path / "few.arrow", rows[:3])
    assert len(spread_over_labels(ExampleFile(tmp_path / "few.arrow"), 8)) == 3


# ---- rows


def graded(folder: Path, rows: Sequence[dict[str, str]], **data: Any) -> RunConfig:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"data.source={{kind: files, path: {folder / 'rows.jsonl'}}}"
    more = [f"data.{key}={value}" for key, value in data.items()]
    return changed(TEXTS, f"output={folder / 'runs'}", source, "tokenizer.vocab_size=300", "data.heldout_rows=6", *more)


def prepared(config: RunConfig) -> None:
    with RunDir.open(config) as run_dir:
        models = Models(config, run_dir.path)
        run_dir.stage("prepare", lambda: prepare_run(config, run_dir.path, models))


def test_rows_are_prepared_again_and_their_lengths_told(tmp_path: Path) -> None:
    answers = make_graded_answers(60, 0)
    config = graded(tmp_path, [*answers, *answers], max_tokens=30, too_long="truncate")
    prepared(config)
    found = check_class_rows(config, config.run_dir, read_counts(config.run_dir / "data"))
    beginning = "120 rows, prepared twice, are the same tokens; longest for the teacher 29, longest for the student 29; "
    assert found.state == "ok" and found.numbers.startswith(beginning)
    assert " of 6 held out are among the training rows; " in found.numbers and found.numbers.endswith(" cut as too long")
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace(" the ", " a "))
    found = check_class_rows(config, config.run_dir, read_counts(config.run_dir / "data"))
    assert found.state == "FAILED" and "heldout.arrow" in found.numbers and "train.arrow" in found.numbers


# ---- the command


def classifier(folder: Path) -> Path:
    """A BERT of the run's labels whose predictions differ."""
    tiny_bert(folder)
    settings = AutoConfig.from_pretrained(folder)
    settings.id2label, settings.initializer_range = dict(enumerate(GRADES)), 0.5
    torch.manual_seed(3)
    model = BertForSequenceClassification(settings)
    model.classifier.weight.data *= 3
    model.save_pretrained(folder)
    return folder


class Refused(ClassifierEngine):
    """Serves what is no number."""

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        return [replace(one, target_logprob=np.full_like(one.target_logprob, np.nan)) for one in super().score(examples)]


@pytest.mark.ray
@pytest.mark.slow
def test_a_classifier_that_is_served_as_it_is_passes_and_others_do_not(local_ray: None, tmp_path: Path) -> None:
    folder = classifier(tmp_path / "bert")
    config = changed(
        TEXTS, f"output={tmp_path}", "data.source.rows=90", "data.heldout_rows=30", "tokenizer.vocab_size=320",
        f"teacher={{model: {{kind: pretrained, name: {folder}}}, engine: {{cpus: 1}}}}",
    )  # fmt: skip
    found = {finding.check: finding for finding in diagnose(config)}
    assert list(found) == ["devices", "rows", "labels", "export", "batch", "raw", "served", "teacher"]
    assert {finding.state for name, finding in found.items() if name != "teacher"} == {"ok"}
    assert " of 96, longest for the student " in found["rows"].numbers
    assert not (config.run_dir / "scores.json").exists() and not list(config.run_dir.glob("doctor-*"))
    broken = {finding.check: finding for finding in diagnose(config, RolledLabels)}
    assert broken["served"].state == "FAILED" and "raw" in broken
    refused = diagnose(config, Refused)
    assert [finding.check for finding in refused] == ["devices", "rows", "labels", "scores"]
    assert "target_logprob holds nan; the teacher's scores must be finite" in refused[-1].line()


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.split()[0] in ("ok", "FAILED", "unclear")]


@pytest.mark.ray
@pytest.mark.slow
def test_the_doctor_passes_the_graded_answers(local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        f"output={tmp_path}", "data.source.rows=200", "data.heldout_rows=50", "tokenizer.vocab_size=320",
        "teacher.model={kind: text_cnn}", "teacher.finetune.workers.cpus=1", "teacher.finetune.train.epochs=3",
    ]  # fmt: skip
    assert main(["doctor", "configs/grading_cpu.yaml", *overrides]) == 0
    lines = lines_of(capsys)
    assert [line.split()[1] for line in lines] == [
        "devices:", "rows:", "labels:", "export:", "batch:", "raw:", "served:", "teacher:",
    ]  # fmt: skip
    assert {line.split()[0] for line in lines[:-1]} == {"ok"}


@pytest.mark.ray
@pytest.mark.slow
def test_the_doctor_looks_at_words(local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = language_model(tmp_path / "model")
    sharpen(ModelSource(str(model)))
    overrides = [f"output={tmp_path}", f"teacher.model.name={model}", "data.source.rows=60", "data.heldout_rows=20",
                 "tokenizer.vocab_size=320", "student.model={kind: text_mlp}"]  # fmt: skip
    assert main(["doctor", "configs/grading_lm_cpu.yaml", *overrides]) == 0
    found = {line.split()[1]: line for line in lines_of(capsys)}
    assert "none begins another" in found["words:"] and " of 256" in found["words:"]
    assert {found[name].split()[0] for name in ("batch:", "raw:", "served:", "export:")} == {"ok"}


@pytest.mark.ray
@pytest.mark.slow
def test_the_doctor_looks_at_tables(local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    overrides = [f"output={tmp_path}", "teacher.model.autoencoder.epochs=1", "data.heldout_rows=1600"]
    assert main(["doctor", "configs/digits_reffakd.yaml", *overrides]) == 0
    found = {line.split()[1]: line for line in lines_of(capsys)}
    assert found["table:"].startswith("unclear table: 10 distributions over 10 labels, mass off by at most ")
    assert "nearly uniform" in found["table:"] and "teacher:" not in found and found["served:"].startswith("ok")
