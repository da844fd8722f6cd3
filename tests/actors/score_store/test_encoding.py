import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.records import NO_TOKEN, TeacherScores, keep_mass
from actors.score_store.encoding import RowEncoding, decode_logprobs, encode_logprobs
from tests.fakes import FAKE_VOCAB, expected_scores, fake_examples


@given(st.lists(st.floats(-31.9375, 0.0, width=32), min_size=1))
def test_a_logprob_is_kept_to_a_quarter_of_a_milli_nat(values: list[float]) -> None:
    logprobs = np.array(values, dtype=np.float32)
    assert np.abs(decode_logprobs(encode_logprobs(logprobs)) - logprobs).max() <= 2.5e-4


def test_lower_logprobs_stay_at_the_lowest_and_rounding_above_zero_at_zero() -> None:
    decoded = decode_logprobs(encode_logprobs(np.float32([-32.5, -1000.0, 1e-6])))
    np.testing.assert_allclose(decoded, [-31.9995, -31.9995, 0.0], atol=1e-4)


def test_rows_of_language_models_are_these_bytes() -> None:
    """What stores hold that were written before: a change of one byte makes them unreadable."""
    target, tail, logprobs = [-0.5, -3.25], [-5.5, -np.inf], [[-1.1, -2.3, -40.0], [-0.1, -4.0003, -7.77]]
    floats = struct.pack("<4f", *target, *tail)
    steps = [2253, 4710, 65_535, 205, 8193, 15_913]  # of 1/2048 nat; the third is lower than the lowest
    scores = TeacherScores(
        "k", np.float32(target), np.int32([[4, 70_000, 9], [1, 2, 3]]), np.float32(logprobs), np.float32(tail)
    )
    wanted = floats + struct.pack("<6H", *steps) + struct.pack("<6H", 4, 70_000 - 65_536, 9, 1, 2, 3) + bytes([0, 1, 0, 0, 0, 0])
    assert RowEncoding(3, 152_000, ragged=False).encode(scores) == wanted
    scores.topk_ids[0], scores.topk_logprobs[0, 2] = [4, 70, NO_TOKEN], -np.inf
    wanted = floats + struct.pack("<2H", 2, 3) + struct.pack("<5H", *steps[:2], *steps[3:]) + struct.pack("<5H", 4, 70, 1, 2, 3)
    assert RowEncoding(3, 60_000, ragged=True).encode(scores) == wanted


@given(st.data(), st.integers(2, 300), st.booleans())
def test_all_labels_of_a_row_come_back_bit_for_bit(data: st.DataObject, classes: int, ragged: bool) -> None:
    unlikely = st.floats(-1000.0, 0.0, width=32) | st.sampled_from([-50.0, -31.9996, -32.0, -1e-30, 0.0])
    values = np.float32(data.draw(st.lists(unlikely, min_size=classes, max_size=classes)))
    label = data.draw(st.integers(0, classes - 1))
    others = np.array([other for other in np.argsort(-values) if other != label], dtype=np.int32)
    scores = TeacherScores("k", values[[label]], others[None], values[others][None], np.float32([-np.inf]))
    encoding = RowEncoding(classes - 1, classes, ragged, exact=True)
    found = again(encoding, scores)
    assert found.topk_logprobs.dtype == np.float32 and found.topk_logprobs.tobytes() == scores.topk_logprobs.tobytes()
    assert found.target_logprob.tobytes() == scores.target_logprob.tobytes()
    np.testing.assert_array_equal(found.topk_ids, scores.topk_ids)
    assert len(encoding.encode(scores)) == 6 * classes + 2 + 2 * ragged  # and 4 in the index


def again(encoding: RowEncoding, scores: TeacherScores) -> TeacherScores:
    return encoding.decode(encoding.encode(scores), scores.key, len(scores.target_logprob))


def test_a_row_comes_back() -> None:
    for example in fake_examples(5):
        wanted = expected_scores(example, 6)
        found = again(RowEncoding(6, FAKE_VOCAB, ragged=False), wanted)
        assert found.key == wanted.key
        np.testing.assert_array_equal(found.target_logprob, wanted.target_logprob)
        np.testing.assert_array_equal(found.tail_logmass, wanted.tail_logmass)
        np.testing.assert_array_equal(found.topk_ids, wanted.topk_ids)
        np.testing.assert_allclose(found.topk_logprobs, wanted.topk_logprobs, atol=2.5e-4)


@pytest.mark.parametrize("ragged", [False, True])
def test_hidden_states_come_back_bit_by_bit_and_take_two_bytes_each(ragged: bool) -> None:
    generator = np.random.default_rng(0)
    for example in fake_examples(5):
        plain = expected_scores(example, 6)
        hidden = generator.integers(0, 1 << 16, (len(example.targets), 24)).astype(np.uint16)
        encoding, without = RowEncoding(6, FAKE_VOCAB, ragged, hidden_size=24), RowEncoding(6, FAKE_VOCAB, ragged)
        found = again(encoding, replace(plain, hidden=hidden))
        assert found.hidden is not None and found.hidden.dtype == np.uint16
        np.testing.assert_array_equal(found.hidden, hidden)
        np.testing.assert_array_equal(found.topk_ids, plain.topk_ids)
        assert again(without, plain).hidden is None
        assert len(encoding.encode(replace(plain, hidden=hidden))) == len(without.encode(plain)) + 48 * len(example.targets)


@pytest.mark.parametrize("vocab_size", [65_536, 65_537, 152_000, 1 << 24])
def test_the_largest_ids_of_a_vocabulary_survive(vocab_size: int) -> None:
    ids = np.array([[vocab_size - 1, 0, 65_535]], dtype=np.int32)
    logprobs = np.float32([[-1.0, -2.0, -3.0]])
    scores = TeacherScores("k", np.float32([-0.9]), ids, logprobs, np.float32([-4.0]))
    found = again(RowEncoding(3, vocab_size, ragged=False), scores)
    np.testing.assert_array_equal(found.topk_ids, ids)
    assert found.topk_ids.dtype == np.int32


@pytest.mark.parametrize(("vocab_size", "bytes_per_token"), [(65_536, 4), (65_537, 5)])
def test_a_target_takes_as_many_bytes_as_promised(vocab_size: int, bytes_per_token: int) -> None:
    targets, top_k = 4096, 64
    scores = TeacherScores(
        "k",
        np.full(targets, -1, np.float32),
        np.tile(np.arange(top_k, dtype=np.int32), (targets, 1)),
        np.tile(np.linspace(-2, -9, top_k, dtype=np.float32), (targets, 1)),
        np.full(targets, -3, np.float32),
    )
    content = RowEncoding(top_k, vocab_size, ragged=False).encode(scores)
    assert len(content) == targets * (bytes_per_token * top_k + 8)  # and 4 in the index


@pytest.mark.parametrize(("vocab_size", "bytes_per_token"), [(FAKE_VOCAB, 4), (152_000, 5)])
def test_tokens_that_are_not_kept_take_no_room_and_come_back_as_none(vocab_size: int, bytes_per_token: int) -> None:
    examples = fake_examples(40, seed=3)
    scores = [keep_mass(expected_scores(example, 20), 0.6) for example in examples]
    kept = np.concatenate([(score.topk_ids != NO_TOKEN).sum(axis=1) for score in scores])
    assert 1 <= kept.min() < kept.max() < 20
    encoding = RowEncoding(20, vocab_size, ragged=True)
    for wanted in scores:
        found = again(encoding, wanted)
        np.testing.assert_array_equal(found.topk_ids, wanted.topk_ids)
        np.testing.assert_array_equal(np.isneginf(found.topk_logprobs), wanted.topk_ids == NO_TOKEN)
        named = wanted.topk_ids != NO_TOKEN
        np.testing.assert_allclose(found.topk_logprobs[named], wanted.topk_logprobs[named], atol=2.5e-4)
        np.testing.assert_array_equal(found.tail_logmass, wanted.tail_logmass)
    size = sum(len(encoding.encode(score)) for score in scores)
    assert size == 10 * len(kept) + bytes_per_token * kept.sum()  # and 4 bytes a target in the index


def test_a_target_of_which_nothing_is_kept_comes_back_empty() -> None:
    sure = TeacherScores(
        "k", np.float32([0.0, -0.5]), np.int32([[4, 5], [6, 7]]), np.float32([[-800, -900], [-1, -4]]), np.float32([-np.inf, -5])
    )
    scores = keep_mass(sure, 0.5)
    np.testing.assert_array_equal(scores.topk_ids, [[NO_TOKEN, NO_TOKEN], [6, NO_TOKEN]])
    found = again(RowEncoding(2, 64, ragged=True), scores)
    np.testing.assert_array_equal(found.topk_ids, scores.topk_ids)
