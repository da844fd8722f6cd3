from pathlib import Path

import numpy as np
import pytest

from actors.records import Example, TeacherScores
from actors.score_store.sanity import FEWEST_ROWS, RowMeans, ScoreRange, Spread, require_rows_differ
from tests.fakes import FAKE_VOCAB, FakeTeacher, expected_scores, fake_examples, fake_logprobs, fake_spec, fake_store

TOP_K = 6
ROWS = 64


def test_means_and_quantiles_of_rows_are_those_of_their_targets() -> None:
    examples = fake_examples(21)
    scores = [expected_scores(example, FAKE_VOCAB - 1) for example in examples]
    means = RowMeans.of(scores)
    for row, example in enumerate(examples):
        logprobs = fake_logprobs(example.token_ids, FAKE_VOCAB)[example.target_positions - 1]
        gold = [line[target] for line, target in zip(logprobs, example.targets, strict=True)]
        assert means.target_logprob[row] == pytest.approx(np.mean(gold), abs=1e-5)
        assert means.entropy[row] == pytest.approx(-(np.exp(logprobs) * logprobs).sum(axis=1).mean(), abs=1e-5)
    ordered = sorted(means.entropy.tolist())
    assert means.spread("entropy") == Spread(ordered[1], ordered[10], ordered[19])


def test_an_entropy_counts_what_is_left_as_one_class() -> None:
    half = TeacherScores("", np.log(np.float32([0.5])), np.int32([[1]]), np.log(np.float32([[0.25]])), np.log(np.float32([0.25])))
    sure = TeacherScores("", np.float32([0.0]), np.int32([[1]]), np.float32([[-np.inf]]), np.float32([-np.inf]))
    np.testing.assert_allclose(RowMeans.of([half, sure]).entropy, [1.5 * np.log(2), 0.0], atol=1e-6)


def test_a_range_grows_with_each_shard() -> None:
    shards = [(Spread(-3, -2, -1), Spread(0.5, 1, 2)), (Spread(-4, -2, -1.5), Spread(0.7, 1, 3))]
    assert ScoreRange.over([]) is None
    assert ScoreRange.over(shards) == ScoreRange(2, (-4, -1), (0.5, 3))


def range_of(scores: list[TeacherScores]) -> ScoreRange:
    means = RowMeans.of(scores)
    return ScoreRange.widened(None, means.spread("target_logprob"), means.spread("entropy"))


def shifted(scores: list[TeacherScores], nats: float) -> list[TeacherScores]:
    return [
        TeacherScores(one.key, one.target_logprob - np.float32(nats), one.topk_ids, one.topk_logprobs, one.tail_logmass)
        for one in scores
    ]


def test_samples_of_one_population_pass_and_another_teacher_does_not() -> None:
    rows = fake_examples(20 * ROWS, longest=8)
    scores = [expected_scores(row, TOP_K) for row in rows]
    known = range_of(scores[:ROWS])
    for first in range(ROWS, len(rows), ROWS):
        known.require(rows[first : first + ROWS], RowMeans.of(scores[first : first + ROWS]))
    few = FEWEST_ROWS - 1
    known.require(rows[:few], RowMeans.of(shifted(scores[:few], 9.0)))  # too few to conclude anything
    with pytest.raises(ValueError) as error:
        known.require(rows[ROWS : 2 * ROWS], RowMeans.of(shifted(scores[ROWS : 2 * ROWS], 9.0)))
    message = str(error.value)
    worst = min(range(ROWS, 2 * ROWS), key=lambda row: scores[row].target_logprob.mean())
    assert f"row {rows[worst].row}: {scores[worst].target_logprob.mean() - 9:.3f}" in message
    assert "median log-probability of the target" in message and "(1 shards)" in message and "doctor" in message


@pytest.mark.parametrize(("shift", "side"), [(5.0, "argmax"), (-5.0, "argmin")])
def test_an_entropy_out_of_range_names_the_row_farthest_off(shift: float, side: str) -> None:
    rows, values = fake_examples(FEWEST_ROWS), np.linspace(1.0, 2.0, FEWEST_ROWS)
    known = ScoreRange(3, (-9.0, 0.0), (1.0, 2.0))
    known.require(rows, RowMeans(-values, values))
    moved = values + shift
    row = rows[int(getattr(moved, side)())].row
    with pytest.raises(ValueError, match=rf"median entropy of {moved.mean():.3f} nats \(row {row}: .*between 1.000 and 2.000"):
        known.require(rows, RowMeans(-values, moved))


def constant_scores(rows: list[Example]) -> list[TeacherScores]:
    engine = FakeTeacher(returns="constant")(fake_spec(TOP_K))
    return engine.score(rows)


def test_a_teacher_that_does_not_read_its_input_is_refused() -> None:
    rows = fake_examples(5)
    with pytest.raises(ValueError, match=r"rows 0 to 4: the same distribution .* though \d+ different texts come before them"):
        require_rows_differ(rows, constant_scores(rows))
    require_rows_differ(rows, [expected_scores(row, TOP_K) for row in rows])


def test_equal_distributions_after_equal_texts_are_right() -> None:
    token_ids = np.array([5, 6, 7], dtype=np.int32)
    mask = np.array([False, False, True])
    rows = [Example(token_ids, mask, "same", row) for row in range(4)]
    require_rows_differ(rows, constant_scores(rows))


def test_a_teacher_that_is_sure_of_other_tokens_each_time_is_right() -> None:
    rows = fake_examples(4)
    sure = [
        TeacherScores(
            row.key, np.zeros(len(row.targets), np.float32), np.zeros((len(row.targets), 1), np.int32),
            np.full((len(row.targets), 1), -30, np.float32), np.full(len(row.targets), -np.inf, np.float32),
        )
        for row in rows
    ]  # fmt: skip
    require_rows_differ(rows, sure)


@pytest.mark.parametrize(("unlikely", "alike"), [((1e-6, 2e-6, 1e-5), False), ((1e-6, 1e-6, 1e-6), True)])
def test_a_teacher_of_two_labels_is_judged_by_both(unlikely: tuple[float, ...], alike: bool) -> None:
    rows = fake_examples(3)
    sure = [
        TeacherScores(
            row.key, np.full(1, np.log1p(-mass), np.float32), np.ones((1, 1), np.int32),
            np.full((1, 1), np.log(mass), np.float32), np.full(1, -np.inf, np.float32),
        )
        for row, mass in zip(rows, unlikely, strict=True)
    ]  # fmt: skip
    labelled = [Example(np.array([row.row, 0], np.int32), np.array([False, True]), row.key, row.row) for row in rows]
    if alike:
        with pytest.raises(ValueError, match="the teacher does not read its input"):
            require_rows_differ(labelled, sure)
    else:
        require_rows_differ(labelled, sure)


def test_a_store_writes_nothing_of_a_shard_that_is_off(tmp_path: Path) -> None:
    rows = fake_examples(3 * ROWS, longest=8)
    _, store = fake_store(tmp_path, rows, ROWS, TOP_K)
    assert store.known_range() is None
    store.write_shard(0, rows[:ROWS], [expected_scores(row, TOP_K) for row in rows[:ROWS]])
    known = store.known_range()
    assert known is not None and known.shards == 1
    flat = FakeTeacher(returns="flat")(fake_spec(TOP_K))
    with pytest.raises(ValueError, match="what scores now is not what scored then"):
        store.write_shard(1, rows[ROWS : 2 * ROWS], flat.score(rows[ROWS : 2 * ROWS]), known)
    with pytest.raises(ValueError, match="the teacher does not read its input"):
        store.write_shard(1, rows[ROWS : 2 * ROWS], constant_scores(rows[ROWS : 2 * ROWS]))
    assert store.missing_shards() == [1, 2]
    store.write_shard(1, rows[ROWS : 2 * ROWS], [expected_scores(row, TOP_K) for row in rows[ROWS : 2 * ROWS]], known)
