"""Stores of classes: every log-probability comes back as it was given, and what is looked at in any store is looked at here."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.records import Example, TeacherScores, example_key, uncertainty
from actors.score_store.identity import StoreMismatch
from actors.score_store.store import ScoreStore

MASK = np.array([False, False, True])


def labelled(labels: np.ndarray) -> list[Example]:
    """Rows of two tokens with their label behind them."""
    rows = []
    for row, label in enumerate(labels.tolist()):
        token_ids = np.array([7, row, label], dtype=np.int32)
        rows.append(Example(token_ids, MASK, example_key(token_ids, MASK), row))
    return rows


def scores_of(row: Example, logprobs: np.ndarray) -> TeacherScores:
    """What a teacher says of a row that gives labels these log-probabilities, float32 [C]."""
    label = int(row.targets[0])
    others = np.array([other for other in np.argsort(-logprobs, kind="stable") if other != label], dtype=np.int32)
    return TeacherScores(row.key, logprobs[[label]], others[None], logprobs[others][None], np.float32([-np.inf]))


def distributions(generator: np.random.Generator, rows: int, classes: int, scale: float) -> np.ndarray:
    """Log-probabilities float32 [rows, C]; at a scale of 30 labels of -50 nats are common."""
    logits = scale * generator.normal(size=(rows, classes))
    return (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)


def store_in(folder: Path, rows: int, rows_per_shard: int, classes: int) -> ScoreStore:
    identity = {"top_k": classes - 1, "top_mass": None, "vocab_size": classes, "exact": True}
    return ScoreStore.open_or_create(folder / "store", identity, rows, rows_per_shard)


@given(st.integers(0, 1 << 32), st.integers(3, 200), st.sampled_from([0.01, 1.0, 30.0, 300.0]))
def test_what_a_store_of_classes_returns_is_what_it_was_given(seed: int, classes: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    rows = labelled(generator.integers(0, classes, 5))
    given_scores = [scores_of(row, one) for row, one in zip(rows, distributions(generator, 5, classes, scale), strict=True)]
    with TemporaryDirectory() as folder:
        store = store_in(Path(folder), 5, 3, classes)
        store.write_shard(0, rows[:3], given_scores[:3])
        store.write_shard(1, rows[3:], given_scores[3:])
        again = ScoreStore(store.place)
        again.verify()
        assert again.exact and again.complete
        for position, wanted in enumerate(given_scores):
            found = again.scores_at(position)
            assert found.key == wanted.key and found.topk_logprobs.dtype == np.float32
            assert found.topk_logprobs.tobytes() == wanted.topk_logprobs.tobytes()
            assert found.target_logprob.tobytes() == wanted.target_logprob.tobytes()
            np.testing.assert_array_equal(found.topk_ids, wanted.topk_ids)
            np.testing.assert_array_equal(again.uncertainty_at(position), uncertainty(wanted))


def test_a_label_of_minus_fifty_nats_stays_one(tmp_path: Path) -> None:
    (row,) = labelled(np.array([1]))
    store = store_in(tmp_path, 1, 1, 3)
    store.write_shard(0, [row], [scores_of(row, np.float32([-50.0, -1.2345678, -0.34329998]))])
    assert store.scores_at(0).topk_logprobs.tolist() == [[float(np.float32(-0.34329998)), -50.0]]


def test_a_byte_that_is_not_what_was_written_is_found(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = labelled(np.array([0, 1, 2]))
    store = store_in(tmp_path, 3, 3, 3)
    store.write_shard(0, rows, [scores_of(row, one) for row, one in zip(rows, distributions(generator, 3, 3, 1.0), strict=True)])
    path = tmp_path / "store" / "shard-00000.rows"
    content = bytearray(path.read_bytes())
    content[9] ^= 1  # the lowest bit of another label's log-probability
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00000.rows is damaged: the checksum of its row 0"):
        ScoreStore(store.place).verify()


def test_a_teacher_that_is_not_sound_is_refused_here_too(tmp_path: Path) -> None:
    rows, generator = labelled(np.arange(200) % 3), np.random.default_rng(0)
    store = store_in(tmp_path, 200, 100, 3)
    logprobs = distributions(generator, 200, 3, 2.0)
    same = [scores_of(row, logprobs[0]) for row in rows[:100]]
    with pytest.raises(ValueError, match="the same distribution .* the teacher does not read its input"):
        store.write_shard(0, rows[:100], same)
    too_much = scores_of(rows[0], np.float32([-0.1, -0.2, -3.0]))
    with pytest.raises(ValueError, match="target and top-K hold a mass of 1.7"):
        store.write_shard(0, rows[:1], [too_much])
    store.write_shard(0, rows[:100], [scores_of(row, one) for row, one in zip(rows, logprobs[:100], strict=False)])
    surer = distributions(generator, 100, 3, 200.0)
    with pytest.raises(ValueError, match="what scores now is not what scored then"):
        store.write_shard(1, rows[100:], [scores_of(row, one) for row, one in zip(rows[100:], surer, strict=True)],
                          store.known_range())  # fmt: skip
    sound = [scores_of(row, one) for row, one in zip(rows[100:], logprobs[100:], strict=True)]
    store.write_shard(1, rows[100:], sound, store.known_range())
    assert store.complete


def test_a_store_that_rounds_is_not_taken_for_one_that_does_not(tmp_path: Path) -> None:
    rounded = {"top_k": 2, "top_mass": None, "vocab_size": 3}
    ScoreStore.open_or_create(tmp_path / "store", rounded, 4, 4)
    message = r"exact: wanted True, the store has None \(one keeps log-probabilities in float32, the other rounds them\)"
    with pytest.raises(StoreMismatch, match=message):
        store_in(tmp_path, 4, 4, 3)


def test_the_manifest_of_a_language_model_is_this_one(tmp_path: Path) -> None:
    identity = {"teacher": {"name": "t", "revision": "r"}, "top_k": 3, "top_mass": None, "vocab_size": 64}
    store = ScoreStore.open_or_create(tmp_path / "store", identity, 10, 4)
    assert not store.exact
    assert (tmp_path / "store" / "manifest.json").read_text() == """{
 "format": 3,
 "identity": {
  "teacher": {
   "name": "t",
   "revision": "r"
  },
  "top_k": 3,
  "top_mass": null,
  "vocab_size": 64
 },
 "rows": 10,
 "rows_per_shard": 4,
 "sha256": "d1181a699fd325bba0e630d81fb9445d1b271d4315d87e8b522d596ff35f4490"
}"""
