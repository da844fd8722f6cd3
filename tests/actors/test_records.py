import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import losses.topk_teacher
from actors.records import (
    NO_TOKEN,
    Example,
    TeacherScores,
    check_scores,
    example_key,
    keep_mass,
    tail_logmass,
    truncate_scores,
    uncertainty,
    with_candidates,
)
from losses.topk_teacher import TopkTeacher
from tests.fakes import FAKE_VOCAB, expected_scores, fake_examples, fake_logprobs


def test_a_key_names_token_ids_and_mask_whatever_their_types() -> None:
    token_ids, mask = np.array([5, 6, 7]), np.array([False, True, True])
    key = example_key(token_ids, mask)
    assert len(key) == 32
    assert key == example_key(token_ids.astype(np.int32), mask.astype(np.uint8))
    assert key != example_key(np.array([5, 6, 8]), mask)
    assert key != example_key(token_ids, np.array([False, False, True]))


def test_targets_are_where_the_mask_is_true() -> None:
    mask = np.array([False, False, True, False, True])
    example = Example(np.array([9, 8, 7, 6, 5], dtype=np.int32), mask, "", 0)
    assert example.target_positions.tolist() == [2, 4]
    assert example.targets.tolist() == [7, 5]


def test_uncertainty_and_tail_of_a_hand_made_distribution() -> None:
    target, topk = np.log(np.float32([0.5])), np.log(np.float32([[0.25, 0.125]]))
    scores = TeacherScores("", target, np.array([[1, 2]]), topk, tail_logmass(target, topk))
    assert uncertainty(scores)[0] == pytest.approx(0.5, abs=1e-6)
    assert math.exp(scores.tail_logmass[0]) == pytest.approx(0.125, abs=1e-6)


def test_nothing_is_left_where_target_and_top_k_hold_all_mass() -> None:
    target, topk = np.zeros(1, np.float32), np.float32([[-20.0]])
    assert tail_logmass(target, topk)[0] == -np.inf
    scores = TeacherScores("", target, np.array([[1]]), topk, np.float32([-np.inf]))
    assert uncertainty(scores)[0] == pytest.approx(math.exp(-20), rel=1e-5)  # 1 - p would be 0


@pytest.mark.parametrize("top_k", [1, 4, FAKE_VOCAB - 1])
def test_the_masses_of_target_top_k_and_tail_sum_to_one(top_k: int) -> None:
    for example in fake_examples(5):
        scores = expected_scores(example, top_k)
        mass = np.exp(scores.target_logprob) + np.exp(scores.topk_logprobs).sum(axis=1) + np.exp(scores.tail_logmass)
        np.testing.assert_allclose(mass, 1.0, atol=1e-5)


def test_truncated_scores_are_those_made_with_a_smaller_k() -> None:
    for example in fake_examples(5):
        truncated, made = truncate_scores(expected_scores(example, 12), 4), expected_scores(example, 4)
        np.testing.assert_array_equal(truncated.topk_ids, made.topk_ids)
        np.testing.assert_array_equal(truncated.topk_logprobs, made.topk_logprobs)
        np.testing.assert_allclose(truncated.tail_logmass, made.tail_logmass, atol=1e-5)


def test_truncating_to_a_larger_k_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k 6 exceeds the K=5 of the scores"):
        truncate_scores(expected_scores(fake_examples(1)[0], 5), 6)


def test_right_scores_pass() -> None:
    for example in fake_examples(5):
        check_scores(example, expected_scores(example, 5), FAKE_VOCAB)


def _with(values: np.ndarray, index: tuple[int, ...], value: float) -> np.ndarray:
    changed = values.copy()
    changed[index] = value
    return changed


def test_wrong_scores_are_refused_with_the_row_and_the_number() -> None:
    example = replace(fake_examples(1, seed=3)[0], row=41)
    good = expected_scores(example, 5)
    targets = len(example.targets)
    cases = {
        "the scores carry key 0000": replace(good, key="0000"),
        f"has {targets} targets, but its scores have the shapes": replace(good, target_logprob=good.target_logprob[1:]),
        "target_logprob holds nan": replace(good, target_logprob=_with(good.target_logprob, (0,), np.nan)),
        "topk_logprobs holds -inf": replace(good, topk_logprobs=_with(good.topk_logprobs, (0, 4), -np.inf)),
        "topk_logprobs holds 0.25; a log-probability is never above 0": replace(
            good, topk_logprobs=_with(good.topk_logprobs, (1, 0), 0.25)
        ),
        "hold a mass of": replace(good, target_logprob=_with(good.target_logprob, (0,), -1e-6)),
        "topk_ids holds 64; .* below 64": replace(good, topk_ids=_with(good.topk_ids, (0, 0), FAKE_VOCAB)),
        "are uniform": replace(good, topk_logprobs=np.full_like(good.topk_logprobs, -np.log(FAKE_VOCAB))),
    }
    for message, scores in cases.items():
        with pytest.raises(ValueError, match=f"row 41 .*{message}"):
            check_scores(example, scores, FAKE_VOCAB)


def test_the_fake_distribution_of_a_prefix_does_not_look_ahead() -> None:
    token_ids = fake_examples(1)[0].token_ids
    np.testing.assert_allclose(fake_logprobs(token_ids, 9)[:3], fake_logprobs(token_ids[:3], 9))


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_the_shortest_run_that_holds_the_share_is_kept_as_the_losses_have_it(share: float) -> None:
    for example in fake_examples(6, seed=5):
        scores = expected_scores(example, 12)
        kept = keep_mass(scores, share)
        off_target = 1 - np.exp(scores.target_logprob.astype(np.float64))
        for row, (ids, logprobs) in enumerate(zip(kept.topk_ids, kept.topk_logprobs, strict=True)):
            held, length = 0.0, 0
            while length < 12 and held < share * off_target[row]:
                held += math.exp(scores.topk_logprobs[row, length])
                length += 1
            assert ids.tolist() == scores.topk_ids[row, :length].tolist() + [NO_TOKEN] * (12 - length)
            assert np.isneginf(logprobs[length:]).all()
            assert math.exp(kept.tail_logmass[row]) == pytest.approx(off_target[row] - held, abs=1e-6)
        support = TopkTeacher(
            torch.from_numpy(scores.target_logprob), torch.from_numpy(scores.topk_ids).long(),
            torch.from_numpy(scores.topk_logprobs), torch.from_numpy(scores.tail_logmass),
        ).keep_mass(share)  # fmt: skip
        np.testing.assert_array_equal(kept.topk_ids, support.topk_ids)
        np.testing.assert_allclose(kept.tail_logmass, support.tail_logmass, atol=1e-5)
    assert NO_TOKEN == losses.topk_teacher.NO_TOKEN


def test_scores_that_keep_a_share_are_truncated_as_all_scores_are() -> None:
    for example in fake_examples(5):
        first, then = keep_mass(expected_scores(example, 12), 0.8), keep_mass(expected_scores(example, 4), 0.8)
        np.testing.assert_array_equal(truncate_scores(first, 4).topk_ids, then.topk_ids)
        np.testing.assert_allclose(truncate_scores(first, 4).tail_logmass, then.tail_logmass, atol=1e-5)


# ---- unions of the teacher's tokens and a row's own


def rows_with_candidates(count: int, seed: int) -> list[Example]:
    generator, rows = np.random.default_rng(seed), []
    for example in fake_examples(4, seed=seed):
        candidates = np.stack([generator.permutation(FAKE_VOCAB)[:count] for _ in example.targets]).astype(np.int32)
        candidates[generator.random(candidates.shape) < 0.2] = NO_TOKEN
        rows.append(replace(example, candidates=candidates))
    return rows


@pytest.mark.parametrize(("top_k", "count"), [(4, 5), (1, 1), (12, 40), (1, FAKE_VOCAB)])
def test_a_union_has_each_token_once_with_what_the_teacher_gives_it(top_k: int, count: int) -> None:
    for example in rows_with_candidates(count, seed=top_k):
        own = expected_scores(example, top_k)
        logprobs = fake_logprobs(example.token_ids, FAKE_VOCAB)[example.target_positions - 1]
        assert example.candidates is not None
        union = with_candidates(example, own, np.take_along_axis(logprobs, example.candidates, axis=1))
        check_scores(example, union, FAKE_VOCAB)
        assert union.topk_ids.shape == (len(example.targets), top_k + count) and union.topk_logprobs.dtype == np.float32
        for row, (target, here) in enumerate(zip(example.targets.tolist(), logprobs, strict=True)):
            wanted = {*own.topk_ids[row].tolist(), *example.candidates[row].tolist()} - {target, NO_TOKEN}
            order = sorted(wanted, key=lambda token: -here[token])
            assert union.topk_ids[row].tolist() == order + [NO_TOKEN] * (top_k + count - len(order))
            np.testing.assert_allclose(union.topk_logprobs[row, : len(order)], here[order], atol=1e-5)
            left = math.fsum(math.exp(one) for token, one in enumerate(here) if token not in {*order, target})
            assert math.exp(union.tail_logmass[row]) == pytest.approx(left, abs=1e-6)
        np.testing.assert_array_equal(truncate_scores(union, top_k).topk_ids, own.topk_ids)
        np.testing.assert_allclose(uncertainty(union), uncertainty(own), atol=1e-6)


def test_a_candidate_that_the_teacher_excludes_stays_finite() -> None:
    example = replace(fake_examples(1)[0])
    example = replace(example, candidates=np.full((len(example.targets), 1), 3, np.int32))
    union = with_candidates(example, expected_scores(example, 2), np.full((len(example.targets), 1), -np.inf))
    there = (union.topk_ids == 3) & (union.topk_logprobs < -30)
    assert there.any() and np.isfinite(union.topk_logprobs[there]).all()
    check_scores(example, union, FAKE_VOCAB)


def test_a_wrong_number_of_a_candidate_is_refused() -> None:
    example = rows_with_candidates(5, seed=2)[0]
    union = with_candidates(example, expected_scores(example, 3), np.full((len(example.targets), 5), np.nan))
    with pytest.raises(ValueError, match="topk_logprobs holds nan; the teacher's scores must be finite"):
        check_scores(example, union, FAKE_VOCAB)


def test_rows_of_which_a_target_names_one_token_are_not_taken_for_uniform() -> None:
    example = fake_examples(1)[0]
    count = len(example.targets)
    own = expected_scores(example, 1)
    example = replace(example, candidates=own.topk_ids)
    check_scores(example, with_candidates(example, own, own.topk_logprobs), FAKE_VOCAB)
    assert count > 1
