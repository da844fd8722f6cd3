"""The temperature of a teacher, against a search over many."""

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.examples import ExampleFile, write_examples
from actors.records import Example, example_key
from actors.score_store.store import ScoreStore
from orchestrator.classification.calibration import COLDEST, HOTTEST, calibration_of, fit_temperature, in_words
from tests.worlds import scores_from_logits

ROWS, CLASSES = 200, 4


def drawn(temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, C] of a teacher, and labels [B] that are drawn with its logits divided by ``temperature``."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(ROWS, CLASSES))
    chances = np.exp(logits / temperature)
    chances /= chances.sum(axis=1, keepdims=True)
    return logits, np.array([generator.choice(CLASSES, p=row) for row in chances])


def log_loss(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    z = logits / temperature
    return float(np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(labels)), labels]))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_no_temperature_of_many_gives_a_lower_loss(temperature: float) -> None:
    logits, labels = drawn(temperature)
    found = fit_temperature(torch.tensor(logits).log_softmax(dim=1), torch.tensor(labels))
    assert found == pytest.approx(temperature, rel=0.3)
    tried = np.geomspace(COLDEST, HOTTEST, 400)
    assert log_loss(logits, labels, found) <= min(log_loss(logits, labels, one) for one in tried[10:]) + 1e-9


def test_a_teacher_that_is_always_right_or_never_ends_at_the_bounds() -> None:
    logits, _ = drawn(1.0)
    right, wrong = torch.tensor(logits.argmax(axis=1)), torch.tensor(logits.argmin(axis=1))
    assert fit_temperature(torch.tensor(logits), right) == pytest.approx(COLDEST)
    assert fit_temperature(torch.tensor(logits), wrong) == pytest.approx(HOTTEST)
    measured = {"heldout_loss": 1.0, "calibration_error": 0.5}
    words = {"rows": 3, "before": measured, "after": measured}
    assert "no temperature makes the teacher better" in in_words({**words, "temperature": HOTTEST})[1]
    assert "right about every held-out row" in in_words({**words, "temperature": COLDEST})[1]


@pytest.mark.parametrize("scale", [1, 14])
def test_stored_scores_are_measured_before_and_after(scale: int, tmp_path: Path) -> None:
    """With labels of -50 nats too, which count once they are divided by 42."""
    logits, labels = drawn(3.0)
    logits *= scale
    mask, examples = np.array([False, True]), []
    for row, label in enumerate(labels):
        token_ids = np.array([row, label], dtype=np.int32)
        examples.append(Example(token_ids, mask, example_key(token_ids, mask), row))
    write_examples(tmp_path / "rows.arrow", examples)
    identity = {"top_k": CLASSES - 1, "top_mass": None, "vocab_size": CLASSES, "exact": True}
    store = ScoreStore.open_or_create(tmp_path / "store", identity, ROWS, ROWS)
    scores = [scores_from_logits(one, np.tile(logits[row], (2, 1)), CLASSES - 1) for row, one in enumerate(examples)]
    store.write_shard(0, examples, scores)
    found = calibration_of(ExampleFile(tmp_path / "rows.arrow"), store)
    exact = torch.tensor(logits).log_softmax(dim=1)
    assert found["rows"] == ROWS and (float(exact.min()) < -50) == (scale > 1)
    assert found["temperature"] == pytest.approx(fit_temperature(exact, torch.tensor(labels)), rel=1e-5)
    for when, temperature in (("before", 1.0), ("after", found["temperature"])):
        assert found[when]["heldout_loss"] == pytest.approx(log_loss(logits, labels, temperature), rel=1e-5)
    assert found["after"]["heldout_loss"] < found["before"]["heldout_loss"]
    assert found["after"]["calibration_error"] < found["before"]["calibration_error"]
    assert in_words(found)[0].startswith(f"the teacher's logits are divided by {found['temperature']:.3g}: on 200 ")
