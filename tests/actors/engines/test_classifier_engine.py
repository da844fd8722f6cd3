"""Teachers that classify: their scores against a plain forward pass of each row, and which pretrained models will do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
)

from actors.config.models import EngineConfig
from actors.engines.base import TeacherSpec
from actors.engines.build import build_engine
from actors.engines.classifier import ClassifierEngine
from actors.model_source import ModelSource
from actors.records import Example
from orchestrator.config.load import validate
from orchestrator.config.task import ClassificationTask
from orchestrator.models.classifiers import make_classifiers, require_windows
from orchestrator.models.models import Models
from tests.worlds import word_tokenizer

LABELS = ["wrong", "partly", "right"]
ROWS = [([5, 9, 30, 41], 2), ([7], 0), ([12, 88, 3, 4, 5, 6], 1)]
SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "initializer_range": 0.5,
}  # fmt: skip


def bert(folder: Path, labels: list[str] | None) -> Path:
    """A random BERT with a head of so many labels, named or not."""
    torch.manual_seed(0)
    config = BertConfig(**SHAPE, max_position_embeddings=32, num_labels=len(labels or LABELS))
    if labels is not None:
        config.id2label, config.label2id = dict(enumerate(labels)), {name: index for index, name in enumerate(labels)}
    BertForSequenceClassification(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def roberta(folder: Path) -> Path:
    """A random RoBERTa that has learned to fill gaps and has no head for labels; its positions begin behind that of padding."""
    torch.manual_seed(1)
    config = RobertaConfig(**SHAPE, max_position_embeddings=34, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    RobertaForMaskedLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def examples() -> list[Example]:
    return [
        Example(np.array([*row, label], np.int32), np.arange(len(row) + 1) == len(row), f"{place:032x}", place)
        for place, (row, label) in enumerate(ROWS)
    ]


def models_of(folder: Path, name: Path) -> Models:
    """Models of a run whose teacher is pretrained."""
    tree = {
        "name": "run", "output": str(folder), "task": {"kind": "classification", "labels": LABELS},
        "tokenizer": {"vocab_size": 400}, "data": {"format": {"kind": "text"}},
        "teacher": {"model": {"kind": "pretrained", "name": str(name)}}, "student": {"model": {"kind": "text_mlp"}},
    }  # fmt: skip
    return Models(validate(tree), folder / "run")


def made(models: Models) -> list[str]:
    task = models.config.task
    assert isinstance(task, ClassificationTask)
    return make_classifiers(models, task, {"teacher": word_tokenizer(), "student": word_tokenizer()}, ())


def require_scores_of(source: ModelSource) -> None:
    """Compare the engine's scores of a batch with a plain pass over each row by itself, its label left out."""
    spec = TeacherSpec(EngineConfig(kind="transformers", dtype="float32"), source, top_k=2, longest_row=7)
    engine = build_engine(spec)
    assert isinstance(engine, ClassifierEngine) and engine.vocab_size == 3 and "3 classes" in engine.way
    plain = AutoModelForSequenceClassification.from_pretrained(source.name).eval()
    for (row, label), scores in zip(ROWS, engine.score(examples()), strict=True):
        with torch.no_grad():
            logprobs = plain(input_ids=torch.tensor([row])).logits[0].double().log_softmax(0).tolist()
        others = sorted((index for index in range(3) if index != label), key=lambda index: -logprobs[index])
        assert scores.target_logprob.tolist() == pytest.approx([logprobs[label]], abs=1e-5)
        assert scores.topk_ids.tolist() == [others]
        assert scores.topk_logprobs[0].tolist() == pytest.approx([logprobs[index] for index in others], abs=1e-5)
    engine.close()


@pytest.mark.parametrize("labels", [LABELS, None], ids=["named", "unnamed"])
def test_a_classifier_of_the_labels_is_served_as_it_is(tmp_path: Path, labels: list[str] | None) -> None:
    models = models_of(tmp_path, bert(tmp_path / "bert", labels))
    assert made(models) == [] and models.begun("teacher").name == str(tmp_path / "bert")
    require_scores_of(models.begun("teacher"))


def test_a_model_without_a_head_gets_one_of_the_labels(tmp_path: Path) -> None:
    models = models_of(tmp_path, roberta(tmp_path / "roberta"))
    (remark,) = made(models)
    assert remark.startswith("teacher: ") and remark.endswith(
        "has no head for these labels and gets a new one, which knows nothing yet"
    )
    assert made(models) == []  # once
    source = models.begun("teacher")
    loaded = AutoModelForSequenceClassification.from_pretrained(source.name)
    assert loaded.config.id2label == dict(enumerate(LABELS)) and source.name.endswith("teacher_scratch")
    embeddings = RobertaForMaskedLM.from_pretrained(tmp_path / "roberta").get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, embeddings)
    require_scores_of(source)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ["right", "partly", "wrong"],
            r"task\.labels \['wrong', .*\] are those of teacher\.model\.name .* in another order; \['ri",
        ),
        (
            ["bad", "fair", "good"],
            r"teacher\.model\.name .* has no label 'wrong'; its labels are bad, fair, good: a model without",
        ),
        (["wrong", "partly"], r"teacher\.model\.name .* has no label 'right'; its labels are wrong, partly: a model without"),
        ([*LABELS, "unread"], r"teacher\.model\.name .* has 4 labels, not 3; its labels are wrong, partly, right, unread"),
    ],
)
def test_a_classifier_of_other_labels_is_refused(tmp_path: Path, labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(models_of(tmp_path, bert(tmp_path / "bert", labels)))


def test_rows_longer_than_a_models_window_are_refused(tmp_path: Path) -> None:
    for name, make in (("bert", lambda folder: bert(folder, LABELS)), ("roberta", roberta)):
        models = models_of(tmp_path, make(tmp_path / name))
        require_windows(models, {"teacher": 32, "student": 500})
        message = (
            rf"longest row has 33 tokens, and teacher\.model\.name .*{name}' reads 32; data\.max_tokens=33 would do, of which"
        )
        with pytest.raises(ValueError, match=message):
            require_windows(models, {"teacher": 33, "student": 500})
