"""Rows scored on demand: by key, from several callers at once, through deaths, errors and too many questions."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from actors.records import Example, TeacherScores
from actors.teacher.pool import TeacherPool
from actors.teacher.router import RowFailed
from actors.teacher.service import ScoreService
from tests.fakes import FAKE_VOCAB, FakeTeacher, expected_scores, fake_examples, fake_spec

TOP_K = 5
pytestmark = pytest.mark.ray


def assert_right(found: dict[str, TeacherScores], examples: Sequence[Example]) -> None:
    assert set(found) == {example.key for example in examples}
    for example in examples:
        wanted = expected_scores(example, TOP_K)
        np.testing.assert_array_equal(found[example.key].target_logprob, wanted.target_logprob)
        np.testing.assert_array_equal(found[example.key].topk_ids, wanted.topk_ids)
        np.testing.assert_allclose(found[example.key].topk_logprobs, wanted.topk_logprobs, atol=1e-6)


@ray.remote(num_cpus=0)
def ask(service: ScoreService, examples: list[Example]) -> dict[str, TeacherScores]:
    return service.score(examples, timeout_seconds=60)


def counts(service: ScoreService) -> dict[str, int]:
    return ray.get(service.router.counts.remote())


def test_many_callers_get_their_rows_by_key_and_each_row_is_scored_once(local_ray: None, tmp_path: Path) -> None:
    examples, log = fake_examples(60), tmp_path / "scored"
    teacher = FakeTeacher(log=log, seconds_per_call=0.1)

    async def ask_three_times(service: ScoreService) -> list[dict[str, TeacherScores]]:
        return await asyncio.gather(*(service.score_async(examples[:6]) for _ in range(3)))

    with TeacherPool(fake_spec(TOP_K, replicas=2), engine_factory=teacher) as pool:
        with pool.serving(most_rows=16) as service:
            for answer in asyncio.run(ask_three_times(service)):
                assert_right(answer, examples[:6])
            assert sorted(log.read_text().split()) == sorted(example.key for example in examples[:6])
            shares = [examples[first : first + 20] for first in (0, 10, 20, 30, 40)]
            for share, answer in zip(shares, ray.get([ask.remote(service, share) for share in shares]), strict=True):
                assert_right(answer, share)
            assert counts(service)["most_asked"] <= 16  # who asked for more had to wait
            assert counts(service) | {"most_asked": 0} == {"waiting": 0, "held": 0, "most_asked": 0, "replicas": 2}
            assert set(log.read_text().split()) == {example.key for example in examples}
            assert service.score([]) == {}
        with pytest.raises(RowFailed, match="the score service is gone: ActorDiedError"):
            service.score(examples[:1])


def test_a_row_is_scored_again_for_who_names_other_candidates(local_ray: None, tmp_path: Path) -> None:
    (example,), log = fake_examples(1), tmp_path / "scored"
    first, second = (replace(example, candidates=np.full((len(example.targets), 1), token, np.int32)) for token in (3, 4))

    async def ask_all(service: ScoreService) -> None:
        await asyncio.gather(*(service.score_async([one]) for one in (example, first, first, second)))

    teacher = FakeTeacher(log=log, seconds_per_call=0.2)
    with TeacherPool(fake_spec(TOP_K), engine_factory=teacher) as pool, pool.serving() as service:
        asyncio.run(ask_all(service))
    assert log.read_text().split() == [example.key] * 3


@pytest.mark.parametrize("way", ["engine_dies_on_call", pytest.param("hangs_on_call", marks=pytest.mark.drill)])
def test_rows_of_a_replica_that_is_lost_are_scored_by_another(local_ray: None, tmp_path: Path, way: str) -> None:
    examples = fake_examples(24)
    teacher = replace(FakeTeacher(only_once=tmp_path / "lost", seconds_per_call=0.02), **{way: 2})
    with (
        TeacherPool(fake_spec(TOP_K, replicas=2), engine_factory=teacher) as pool,
        pool.serving(answer_seconds=3.0) as service,
    ):
        assert_right(service.score(examples, timeout_seconds=60), examples)
        assert (tmp_path / "lost").exists()
        until = time.monotonic() + 30
        while counts(service)["replicas"] < 2 and time.monotonic() < until:
            time.sleep(0.1)
        assert counts(service)["replicas"] == 2  # another stands in its place


@pytest.mark.drill
def test_a_row_that_ends_every_replica_or_raises_fails_alone(local_ray: None, tmp_path: Path) -> None:
    examples, log = fake_examples(9), tmp_path / "log"
    teacher = FakeTeacher(poison_key=examples[4].key, fails_on_key=examples[2].key, log=log)
    with TeacherPool(fake_spec(TOP_K, max_restarts=4), engine_factory=teacher) as pool, pool.serving() as service:
        answers = [ask.remote(service, [example]) for example in examples]
        for row, answer in enumerate(answers):
            if row == 4:
                with pytest.raises(RowFailed, match=r"3 replicas died on row 4 \(key .*\), the last with: ActorDiedError"):
                    ray.get(answer)
            elif row == 2:
                with pytest.raises(RowFailed, match=r"row 2 \(key .*\): RuntimeError: the fake teacher fails on this row"):
                    ray.get(answer)
            else:
                assert_right(ray.get(answer), [examples[row]])
    assert log.read_text().split().count("poison") == 3


def test_scores_that_cannot_be_are_not_handed_out(local_ray: None) -> None:
    with (
        TeacherPool(fake_spec(TOP_K), engine_factory=FakeTeacher(returns="nan")) as pool,
        pool.serving() as service,
        pytest.raises(RowFailed, match=r"row 0 .*ValueError: row 0 .*must be finite"),
    ):
        service.score(fake_examples(1))


def test_when_no_replica_comes_any_more_all_who_wait_hear_it(local_ray: None) -> None:
    teacher = FakeTeacher(dies_on_call=1)
    with TeacherPool(fake_spec(TOP_K, max_restarts=0), engine_factory=teacher) as pool, pool.serving() as service:
        for _ in range(2):  # those who wait, and those who ask later
            with pytest.raises(RowFailed, match="teacher replica 0 died 1 times in a row and is not started again"):
                service.score(fake_examples(30), timeout_seconds=60)


def test_questions_that_cannot_be_answered_are_refused_by_row(local_ray: None) -> None:
    good = fake_examples(1)[0]
    long = np.zeros(65, dtype=np.int32)
    nothing = np.zeros(4, dtype=bool)
    cases = [
        (Example(long, long == 0, "long", 7), "row 7 .* has 65 tokens; this teacher was started for rows of at most 64"),
        (Example(long[:4], nothing, "none", 8), "row 8 .* has no target"),
        (Example(long[:4], ~nothing, "first", 9), "row 9 .* has a target at position 0"),
        (replace(good, token_ids=good.token_ids + FAKE_VOCAB), r"row 0 .* holds token id \d+; the teacher's ids are 0 to 63"),
    ]  # fmt: skip
    teacher = FakeTeacher(seconds_per_call=2.0)
    with TeacherPool(fake_spec(TOP_K), engine_factory=teacher) as pool, pool.serving() as service:
        for example, message in cases:
            with pytest.raises(ValueError, match=message):
                service.score([example])
        with pytest.raises(TimeoutError, match="the scores of 1 rows did not come within 1 s; ask for fewer at once"):
            service.score([good], timeout_seconds=1.0)
        with pytest.raises(TimeoutError, match="the scores of 1 rows did not come within 0 s"):
            asyncio.run(service.score_async([good], timeout_seconds=0.2))
        assert_right(service.score([good], timeout_seconds=60), [good])  # who went away did no harm
