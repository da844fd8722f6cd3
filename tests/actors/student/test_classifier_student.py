"""A classifier as student, evaluated and exported: its loss by plain arithmetic, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.config.models import EngineConfig, EvaluateConfig
from actors.dataloader.class_rows import row_logits
from actors.dataloader.collator import MicroBatch, collate
from actors.dataloader.scored_rows import FileRows
from actors.engines.base import TeacherSpec
from actors.engines.classifier import ClassifierEngine
from actors.evaluation.class_evaluator import evaluate_classifier
from actors.examples import ExampleFile, write_examples
from actors.model_source import ModelSource
from actors.models import save_model, vocab_size_of
from actors.networks.classifier import SmallClassifier, SmallClassifierConfig
from actors.records import Example
from actors.score_store.store import ScoreStore
from actors.student.causal_lm import student_of
from actors.student.model import ClassifierStudent
from losses.config import CoupledLoss
from losses.loss_state import LossState
from losses.token_weights import token_weights
from orchestrator.classification.export import check_classifier

CLASSES, ROWS = 3, 12


def network(seed: int, kind: str = "text_cnn") -> SmallClassifier:
    torch.manual_seed(seed)
    model = SmallClassifier(SmallClassifierConfig({"kind": kind, "dropout": 0.0}, 20, num_labels=CLASSES)).eval()
    for weight in model.parameters():
        weight.data *= 2
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, two networks, and a store of what one says of the rows."""
    folder, draws = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    examples = []
    for row in range(ROWS):
        tokens = draws.integers(1, 20, int(draws.integers(1, 7)))
        token_ids = np.append(tokens, row % CLASSES).astype(np.int32)
        examples.append(Example(token_ids, np.arange(len(token_ids)) == len(tokens), f"{row:032x}", row))
    write_examples(folder / "rows.arrow", examples)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"row": row, "group": "ab"[row % 2]}) + "\n" for row in range(ROWS)))
    for seed, name in enumerate(("teacher", "student")):
        save_model(network(seed), None, folder / name)
    spec = TeacherSpec(
        EngineConfig(kind="transformers", dtype="float32"), ModelSource(str(folder / "teacher"), classes=CLASSES), CLASSES - 1, 8
    )
    identity = {"top_k": CLASSES - 1, "top_mass": None, "vocab_size": CLASSES, "teacher": "network", "exact": True}
    store = ScoreStore.open_or_create(folder / "store", identity, ROWS, ROWS)
    (shard,) = store.missing_shards()
    mine = [examples[position] for position in store.positions(shard)]
    store.write_shard(shard, mine, ClassifierEngine(spec).score(mine))
    return folder


def batch_of(world: Path) -> MicroBatch:
    file, store = ExampleFile(world / "rows.arrow"), ScoreStore(world / "store")
    return collate(FileRows(file, store, CLASSES - 1, np.arange(ROWS)), range(ROWS), CLASSES)


def probabilities(model: SmallClassifier, batch: MicroBatch) -> list[list[float]]:
    """Each row's distribution, by itself: no padding, no label."""
    found = []
    for tokens, mask in zip(batch.token_ids, batch.attention_mask, strict=True):  # type: ignore[arg-type]
        logits = model(input_ids=tokens[None, : int(mask.sum()) - 1]).logits[0].tolist()
        total = sum(map(math.exp, logits))
        found.append([math.exp(logit) / total for logit in logits])
    return found


def test_the_loss_is_cross_entropy_and_lambda_times_that_to_the_teacher(world: Path) -> None:
    loss = CoupledLoss(kind="coupled", tail="renormalize", distillation_weight=0.7, cross_entropy_weight=1.0)
    student, batch = student_of(network(1), loss), batch_of(world)
    assert isinstance(student, ClassifierStudent) and student.vocab_size == vocab_size_of(student.model) == CLASSES
    assert batch.teacher is not None
    weighed = batch.weighed([token_weights(batch.teacher.uncertainty, loss)])
    found = float(student(weighed, LossState())[0].detach())
    expected = 0.0
    for p, q, label in zip(*(probabilities(network(seed), batch) for seed in (0, 1)), batch.targets.tolist(), strict=True):
        soft = -sum(a * math.log(b) for a, b in zip(p, q, strict=True))
        entropy = -sum(a * math.log(a) for a in p)
        expected += (0.7 * (soft - entropy) - math.log(q[label])) / ROWS
    assert found == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_counts_what_is_predicted(world: Path) -> None:
    found = evaluate_classifier(
        ModelSource(str(world / "student"), classes=CLASSES), str(world / "rows.arrow"), str(world / "store"),
        str(world / "rows.jsonl"), ("x", "y", "z"), True, EvaluateConfig(batch_rows=5), CLASSES - 1,
    )  # fmt: skip
    batch = batch_of(world)
    distributions, labels = probabilities(network(1), batch), batch.targets.tolist()
    predicted = [q.index(max(q)) for q in distributions]
    assert found.metrics.accuracy == pytest.approx(sum(map(int.__eq__, predicted, labels)) / ROWS)
    losses = [-math.log(q[label]) for q, label in zip(distributions, labels, strict=True)]
    assert found.metrics.heldout_loss == pytest.approx(sum(losses) / ROWS, rel=1e-5)
    assert found.metrics.bytes is not None and found.metrics.bytes > 4 * found.metrics.parameters
    assert found.classes is not None and {group: of.rows for group, of in found.classes.groups.items()} == {"a": 6, "b": 6}
    counted = np.zeros((CLASSES, CLASSES), int)
    np.add.at(counted, (labels, predicted), 1)
    assert found.classes.confusion == tuple(map(tuple, counted.tolist()))
    assert (found.metrics.milliseconds_a_row or 0) > 0 and (found.metrics.rows_per_second or 0) > 0


def test_a_model_whose_logits_are_not_finite_is_neither_measured_nor_exported(world: Path, tmp_path: Path) -> None:
    broken = network(1)
    broken.network.output.bias.data.fill_(torch.nan)
    save_model(broken, None, tmp_path / "broken")
    source = ModelSource(str(tmp_path / "broken"), classes=CLASSES)
    with pytest.raises(ValueError, match=r"broken gives logits that are not finite; its training diverged"):
        check_classifier(source, world / "rows.arrow")
    files = (str(world / "rows.arrow"), str(world / "store"), str(world / "rows.jsonl"))
    with pytest.raises(ValueError, match=r"the logits of .*broken are not finite on the held-out rows"):
        evaluate_classifier(source, *files, ("x", "y", "z"), False, EvaluateConfig(), CLASSES - 1)


def test_blocks_are_the_longest_list_and_a_network_without_any_is_refused() -> None:
    loss: Any = CoupledLoss(kind="coupled")
    cnn = network(0)
    assert list(ClassifierStudent(cnn, loss).blocks()) == list(cnn.network.filters)
    with pytest.raises(
        ValueError, match=r"fsdp and train\.compile find no blocks in SmallClassifier; replicate and false would do"
    ):
        ClassifierStudent(network(0, "text_mlp"), loss).blocks()


def test_a_batch_is_read_without_its_labels(world: Path) -> None:
    batch, model = batch_of(world), network(1)
    expected = torch.tensor(probabilities(model, batch))
    torch.testing.assert_close(row_logits(model, batch).softmax(dim=1), expected, atol=1e-5, rtol=1e-4)
