"""Runs of classification from rows to a report: a tiny BERT teaches a network that reads other tokens, or a table teaches it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

from actors.models import load_model
from orchestrator.cli import main
from orchestrator.commands import comparison, run
from orchestrator.config.load import validate
from orchestrator.config.run import RunConfig
from orchestrator.data.grading import GRADES, QUESTIONS, make_graded_answers
from orchestrator.data.mixture import read_splits
from orchestrator.models.models import Models
from tests.logs import logged

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LEARN = {"batch_rows": 16, "micro_batch_rows": 16}
ENGINE = {"cpus": 1, "rows_per_call": 64}


def tiny_bert(folder: Path) -> Path:
    """A random BERT without a head, and a tokenizer of the words of the built-in answers."""
    sides = [side for question in QUESTIONS for side in (question.text, *question.first, *question.second, *question.mistakes)]
    words = sorted({word for side in sides for word in side.lower().replace("?", " ?").split()})
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=96, num_labels=len(GRADES),
    )  # fmt: skip
    config.architectures = None
    model = BertForSequenceClassification(config)
    model.bert.save_pretrained(folder)
    return folder


def grading(folder: Path) -> RunConfig:
    return validate({
        "name": "grading", "output": str(folder / "runs"), "tokenizer": {"vocab_size": 400},
        "task": {"kind": "classification", "labels": list(GRADES), "field": "grade", "ordered": True, "group": "question"},
        "data": {
            "source": {"kind": "builtin_grading", "rows": 260}, "heldout_rows": 60, "max_tokens": 96,
            "format": {"kind": "text", "text": "{{ answer }}"},
        },
        "teacher": {
            "model": {"kind": "pretrained", "name": str(tiny_bert(folder / "bert"))}, "engine": ENGINE,
            "finetune": {"train": {**LEARN, "epochs": 2, "optimizer": {"learning_rate": 5e-3}}}, "calibrate": True,
        },
        "student": {"model": {"kind": "text_cnn"}},
        "scores": {"rows_per_shard": 100, "overlap": False},
        "loss": {"kind": "coupled", "distillation_weight": 1.0, "cross_entropy_weight": 1.0},
        "train": {**LEARN, "epochs": 6, "optimizer": {"learning_rate": 1e-2}},
    })  # fmt: skip


@pytest.fixture(scope="module")
def finished(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that went from rows to its report."""
    config = grading(tmp_path_factory.mktemp("grading"))
    assert run(config) == 0
    return config


def test_the_teacher_is_calibrated_before_it_scores(finished: RunConfig) -> None:
    found = json.loads((finished.run_dir / "stages" / "calibrate.json").read_text())
    assert found["rows"] == 60 and found["after"]["heldout_loss"] < found["before"]["heldout_loss"]
    teacher = evaluation(finished, "teacher")["metrics"]
    assert teacher["heldout_loss"] == pytest.approx(found["after"]["heldout_loss"], abs=1e-5)
    assert teacher["kl_to_teacher"] < 1e-6, "its stored scores are calibrated too"
    assert "the teacher's logits are divided by" in (finished.run_dir / "report.html").read_text().replace("&#39;", "'")


def evaluation(config: RunConfig, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((config.run_dir / "evaluation" / f"{name}.json").read_text())
    return found


def test_a_student_learns_grades_from_a_teacher_that_reads_other_tokens(finished: RunConfig) -> None:
    data = finished.run_dir / "data"
    assert (data / "teacher_train.arrow").exists() and (data / "teacher_heldout.arrow").exists()
    before, after = (evaluation(finished, f"student_{when}") for when in ("before", "after"))
    assert after["metrics"]["heldout_loss"] < before["metrics"]["heldout_loss"] - 0.05
    assert after["metrics"]["accuracy"] > 0.45  # a third by chance
    events = [json.loads(line) for line in (finished.run_dir / "events.jsonl").read_text().splitlines()]
    assert {event["reason"] for event in events if event["event"] == "not_compared"} == {
        "a classifier's engine is that pass itself"
    }
    teacher = evaluation(finished, "teacher")["metrics"]
    assert teacher["kl_to_teacher"] == pytest.approx(0, abs=1e-6) and teacher["top1_agreement"] == 1
    confusion = np.array(after["classes"]["confusion"])
    assert confusion.sum() == 60 and np.trace(confusion) / 60 == pytest.approx(after["metrics"]["accuracy"])
    assert sum(group["rows"] for group in after["classes"]["groups"].values()) == 60
    assert after["metrics"]["weighted_kappa"] is not None and after["metrics"]["bytes"] > 4 * after["metrics"]["parameters"]


def test_the_report_shows_measures_groups_and_confusions(finished: RunConfig) -> None:
    page = (finished.run_dir / "report.html").read_text()
    for words in ("quadratic weighted kappa", "Accuracy by group", "Confusion, student after", "time of one row", "Why does ice"):
        assert words in page
    rows = {row["metric"] for row in json.loads((finished.run_dir / "table.json").read_text())["rows"]}
    assert {"accuracy", "macro_f1", "weighted_kappa", "milliseconds_a_row"} <= rows and "exact_match" not in rows


def test_the_exported_folder_predicts_what_the_student_did(finished: RunConfig) -> None:
    models = Models(finished, finished.run_dir)
    tokenizer = AutoTokenizer.from_pretrained(models.student_folder)
    model = load_model(models.distilled()).eval()
    assert model.config.id2label == dict(enumerate(GRADES))
    rows = [json.loads(line) for line in (finished.run_dir / "data" / "heldout_rows.jsonl").read_text().splitlines()]
    fields = {row.number: row.fields for row in read_splits(finished.data)[1]}
    confusion = np.zeros((3, 3), dtype=int)
    for row in rows:
        asked = tokenizer(fields[row["row"]]["answer"], return_tensors="pt")
        logits = model(input_ids=asked["input_ids"], attention_mask=asked["attention_mask"]).logits
        confusion[row["label"], int(logits.argmax())] += 1
    assert confusion.tolist() == evaluation(finished, "student_after")["classes"]["confusion"]
    card = (models.student_folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "A classifier of 3 labels (wrong, partly, right)" in card
    assert AutoModelForSequenceClassification.from_pretrained(models.student_folder).config.num_labels == 3


def test_new_rows_are_labelled_as_a_plain_pass_labels_them(finished: RunConfig, tmp_path: Path) -> None:
    asked = [{"answer": row["answer"]} | ({"grade": "none of the run's"} if place % 2 else {}) for place, row in enumerate(
        make_graded_answers(30, seed=5)
    )]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    command = ["predict", str(finished.run_dir), str(tmp_path / "rows.jsonl"), "evaluate.cpus=0.5", "--batch-rows", "7"]
    with logged() as said:
        assert main(command) == 0
    assert [line for line in said if line.startswith("predict: 30 rows answered by the student in ")]
    answers = [json.loads(line) for line in (tmp_path / "rows.predicted.jsonl").read_text().splitlines()]
    assert [answer["row"] for answer in answers] == list(range(30))
    folder = finished.run_dir / "student"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for answer, row in zip(answers, asked, strict=True):
        read = tokenizer(row["answer"], return_tensors="pt")
        with torch.inference_mode():
            logits = model(input_ids=read["input_ids"], attention_mask=read["attention_mask"]).logits[0]
        assert list(answer["probabilities"]) == list(GRADES)
        assert list(answer["probabilities"].values()) == pytest.approx(logits.double().softmax(dim=0).tolist(), abs=2e-6)
        assert answer["label"] == GRADES[int(logits.argmax())]

    assert main([*command[:4], "--model", "teacher", "--output", str(tmp_path / "taught.jsonl")]) == 0
    first = json.loads((tmp_path / "taught.jsonl").read_text().splitlines()[0])
    source = Models(finished, finished.run_dir).ready("teacher").name
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForSequenceClassification.from_pretrained(source).eval()
    with torch.inference_mode():
        logits = model(**tokenizer(asked[0]["answer"], return_tensors="pt")).logits[0].double()
    temperature = json.loads((finished.run_dir / "stages" / "calibrate.json").read_text())["temperature"]
    assert list(first["probabilities"].values()) == pytest.approx((logits / temperature).softmax(dim=0).tolist(), abs=2e-6)


def test_the_same_command_again_does_nothing(finished: RunConfig) -> None:
    with logged() as said:
        assert run(finished) == 0
    done = [line for line in said if "done before" in line]
    assert len(done) >= 4 and not [line for line in said if "done in" in line]


def test_a_finished_run_gets_its_classifier_as_onnx(finished: RunConfig) -> None:
    config = finished.model_copy(update={"export": finished.export.model_copy(update={"onnx": True})})
    with logged() as said:
        assert run(config, "export") == 0
    facts = json.loads((finished.run_dir / "stages" / "onnx.json").read_text())
    assert (finished.run_dir / "student" / "model.onnx").stat().st_size == facts["bytes"]
    assert facts["largest_gap"] < 1e-4 and "export: done before" in said
    card = (finished.run_dir / "student" / "README.md").read_text()
    assert f"## As ONNX\n\nFor programs without torch: model.onnx has {facts['bytes']:,} bytes" in card
    assert [line for line in said if line.startswith("onnx: model.onnx has ")] and [
        line for line in said if line.startswith("onnx: done in")
    ]
    with logged() as said:
        assert run(config, "export") == 0
    assert "onnx: done before" in said


def blots(folder: Path) -> Path:
    """Images of 8 x 8, each with a blot: in one of two corners that are near each other, or in the third."""
    draws = np.random.default_rng(0)
    with (folder / "blots.jsonl").open("w") as file:
        for row in range(120):
            image = 0.2 * draws.random((8, 8))
            y, x = ((0, 0), (1, 1), (5, 5))[row % 3]
            image[y : y + 3, x : x + 3] += 1
            file.write(json.dumps({"image": image.round(3).tolist(), "label": row % 3}) + "\n")
    return folder / "blots.jsonl"


def images(folder: Path, **sections: Any) -> RunConfig:
    return validate({
        "name": "blots", "output": str(folder / "runs"), "task": {"kind": "classification", "labels": [0, 1, 2]},
        "data": {"source": {"kind": "files", "path": str(blots(folder))}, "format": {"kind": "image"}, "heldout_rows": 30},
        "teacher": {
            "model": {"kind": "soft_labels", "temperature": 0.2, "autoencoder": {"filters": [4, 8], "epochs": 9}},
            "engine": ENGINE,
        },
        "student": {"model": {"kind": "image_cnn", "channels": 4}},
        "scores": {"rows_per_shard": 64, "overlap": False},
        "loss": {"kind": "coupled", "divergence": {"kind": "student_tempered_kl", "temperature": 2}, "cross_entropy_weight": 0.7},
        "train": {**LEARN, "epochs": 4, "first_epoch": "permuted", "optimizer": {"learning_rate": 2e-2}},
        **sections,
    })  # fmt: skip


@pytest.mark.drill
def test_soft_labels_teach_images_without_a_teacher(local_ray: None, tmp_path: Path) -> None:
    config = images(tmp_path)
    assert run(config) == 0
    table = np.array(json.loads((config.run_dir / "stages" / "soft_labels.json").read_text())["probabilities"])
    assert table.sum(axis=1) == pytest.approx(1) and table.argmax(axis=1).tolist() == [0, 1, 2]
    assert table[0, 1] > table[0, 2], "blots that overlap are more alike"
    assert (
        evaluation(config, "student_after")["metrics"]["accuracy"] > evaluation(config, "student_before")["metrics"]["accuracy"]
    )
    page = (config.run_dir / "report.html").read_text()
    assert "Soft labels" in page and "Confusion, student after" in page
    assert "pipeline_tag: image-classification" in (config.run_dir / "student" / "README.md").read_text()


@pytest.mark.drill
def test_soft_labels_beside_label_smoothing_and_a_network(local_ray: None, tmp_path: Path) -> None:
    network = {"model": {"kind": "image_resnet", "channels": 4, "stages": 1}, "finetune": {"train": {**LEARN, "epochs": 2}}}
    labels = {str(one): {str(other): 0.8 if one == other else 0.1 for other in range(3)} for one in range(3)}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    own = {"kind": "soft_labels", "similarity": "file", "table": str(tmp_path / "labels.json")}
    smoothing = {"kind": "soft_labels", "similarity": "uniform"}
    teachers = {"table": {}, "own": {"model": own}, "smoothing": {"model": smoothing}, "network": network}
    config = images(
        tmp_path,
        compare={"arms": ["cross_entropy", "soft"], "own_arms": {"soft": {}}, "baseline": "cross_entropy", "seeds": 2, "rungs": 1,
                 "metric": "accuracy", "trials_in": "reused_process", "concurrent": 1, "teachers": teachers},
    )  # fmt: skip
    assert comparison(config) == 0
    page = (config.run_dir / config.compare.name / "report.html").read_text()
    assert "macro F1" in page
    for teacher in teachers:
        assert teacher in page
