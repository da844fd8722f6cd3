"""A teacher of labels measured by its stored scores alone, against what plain arithmetic makes of the same logits."""

import json
from pathlib import Path

import numpy as np
import pytest

from actors.evaluation.class_evaluator import classes_from_scores
from actors.examples import write_examples
from actors.records import Example, example_key
from actors.score_store.store import ScoreStore
from tests.worlds import scores_from_logits

ROWS, CLASSES = 60, 3


def test_a_teacher_of_labels_is_measured_by_its_scores(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    logits, labels = generator.normal(size=(ROWS, CLASSES)), generator.integers(0, CLASSES, ROWS)
    mask, examples = np.array([False, False, True]), []
    for row, label in enumerate(labels):
        token_ids = np.array([row, 7, label], dtype=np.int32)
        examples.append(Example(token_ids, mask, example_key(token_ids, mask), row))
    write_examples(tmp_path / "rows.arrow", examples)
    groups = ["even", "odd"] * (ROWS // 2)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"group": group}) + "\n" for group in groups))
    identity = {"top_k": CLASSES - 1, "top_mass": None, "vocab_size": CLASSES, "exact": True}
    store = ScoreStore.open_or_create(tmp_path / "store", identity, ROWS, ROWS)
    scores = [scores_from_logits(one, np.tile(logits[row], (3, 1)), CLASSES - 1) for row, one in enumerate(examples)]
    store.write_shard(0, examples, scores)

    paths = (str(tmp_path / name) for name in ("rows.arrow", "store", "rows.jsonl"))
    found = classes_from_scores(*paths, ("a", "b", "c"), True, CLASSES - 1, 17)
    predicted, chances = logits.argmax(axis=1), np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert found.metrics.accuracy == pytest.approx(np.mean(predicted == labels))
    counts = [((labels == one) & (predicted == one), predicted == one, labels == one) for one in range(CLASSES)]
    hits = [(both.sum() / said.sum(), both.sum() / there.sum()) for both, said, there in counts]
    assert found.metrics.macro_f1 == pytest.approx(np.mean([2 / (1 / precision + 1 / recall) for precision, recall in hits]))
    by_chance = ((labels[:, None] - predicted[None]) ** 2).mean()  # every label met with every prediction
    assert found.metrics.weighted_kappa == pytest.approx(1 - ((labels - predicted) ** 2).mean() / by_chance)
    assert found.metrics.heldout_loss == pytest.approx(-np.log(chances[np.arange(ROWS), labels]).mean(), abs=1e-5)
    assert (found.metrics.parameters, found.metrics.top1_agreement, found.metrics.kl_to_teacher) == (17, 1.0, 0.0)
    assert found.classes is not None
    assert found.classes.groups["odd"].accuracy == pytest.approx(np.mean((predicted == labels)[1::2]))
