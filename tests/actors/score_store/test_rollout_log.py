"""What the student wrote in a step, and what the teacher says of it: read as it was written, and only once all of it is."""

import re
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.config.places import parent_and_name
from actors.records import Example, TeacherScores, uncertainty
from actors.score_store.identity import StoreMismatch
from actors.score_store.rollout_log import RolloutLog, Sampled
from actors.score_store.store import MOST_SHARDS, ScoringFailed
from actors.storage.folder import open_folder
from tests.fakes import FAKE_VOCAB, expected_scores, fake_examples

TOP_K, BATCH_ROWS = 6, 4
ROWS_OF = {1: 4, 2: 1, 3: 3}
"""Rows of each step: fewer in some than in others."""


def begin(folder: Path | str, steps: int = 5, **changed: Any) -> RolloutLog:
    identity = {"rollouts": True, "top_k": TOP_K, "vocab_size": FAKE_VOCAB, **changed}
    return RolloutLog.open_or_create(folder, identity, steps, BATCH_ROWS)


def rows_of(step: int, rows: int) -> tuple[list[Example], list[TeacherScores], list[Sampled]]:
    """Rows of a step, the teacher's scores of them, and what their sampler knew."""
    examples = fake_examples(rows, seed=step)
    generator = np.random.default_rng(step)
    sampled = [
        Sampled(
            -generator.exponential(2, len(example.targets)).astype(np.float32), bool(row % 2), 10 * step,
            drawn_logprobs=-generator.exponential(2, len(example.targets)).astype(np.float32) if row % 2 else None,
        )
        for row, example in enumerate(examples)
    ]  # fmt: skip
    return examples, [expected_scores(example, TOP_K) for example in examples], sampled


@pytest.fixture
def log(tmp_path: Path) -> RolloutLog:
    log = begin(tmp_path / "log")
    for step, rows in ROWS_OF.items():
        log.write(step, *rows_of(step, rows))
    return log


def test_what_was_written_is_read_by_step_and_row(log: RolloutLog, tmp_path: Path) -> None:
    require_read_as_written(RolloutLog(tmp_path / "log"), {step: rows_of(step, rows) for step, rows in ROWS_OF.items()})


def test_a_log_in_object_storage_is_followed_by_nodes_with_disks_of_their_own(
    anywhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, written = begin(anywhere), {step: rows_of(step, rows) for step, rows in ROWS_OF.items()}
    for step, of_step in written.items():
        log.write(step, *of_step)
    monkeypatch.setenv("ATKD_CACHE", str(tmp_path / "other"))
    follower = RolloutLog(anywhere)
    require_read_as_written(follower, written)
    assert follower.steps_there() == {1, 2, 3} and follower.first_kept == 1
    log.keep_from(3)
    again = RolloutLog(anywhere)
    assert (again.steps_there(), again.first_kept) == ({3}, 3) and not again.is_there(2)
    names = {name for name in open_folder(anywhere).names() if "0000" in name}
    assert names == {"written-00002.arrow", "sampled-00002.arrow", *(f"shard-00002.{kind}" for kind in ("arrow", "rows", "json"))}
    require_read_as_written(again, {3: written[3]})


def test_a_log_that_takes_the_place_of_another_is_read_as_it_is(anywhere: str) -> None:
    log = begin(anywhere)
    log.write(1, *rows_of(1, 4))
    require_read_as_written(RolloutLog(anywhere), {1: rows_of(1, 4)})
    parent, name = parent_and_name(anywhere)
    open_folder(parent).remove_folder(name)
    begin(anywhere).write(1, *rows_of(11, 4))
    require_read_as_written(RolloutLog(anywhere), {1: rows_of(11, 4)})


def require_read_as_written(
    follower: RolloutLog, written: Mapping[int, tuple[list[Example], list[TeacherScores], list[Sampled]]]
) -> None:
    for step, (examples, scores, sampled) in written.items():
        found = follower.examples(step)
        assert len(found) == len(examples) and found.rows.tolist() == [example.row for example in examples]
        for row, (example, score) in enumerate(zip(examples, scores, strict=True)):
            np.testing.assert_array_equal(found[row].token_ids, example.token_ids)
            np.testing.assert_array_equal(found[row].loss_mask, example.loss_mask)
            again = follower.scores(step, row)
            assert found[row].key == again.key == example.key
            np.testing.assert_array_equal(again.target_logprob, score.target_logprob)
            np.testing.assert_array_equal(again.topk_ids, score.topk_ids)
            np.testing.assert_allclose(again.topk_logprobs, score.topk_logprobs, atol=2.5e-4)
            np.testing.assert_array_equal(follower.scores(step, row, top_k=2).topk_ids, score.topk_ids[:, :2])
            np.testing.assert_array_equal(follower.uncertainty(step, row), uncertainty(score))
            np.testing.assert_array_equal(follower.teacher_logprobs(step, row), score.target_logprob)
            assert follower.teacher_loss(step, row) == pytest.approx(-score.target_logprob.astype(float).mean(), rel=1e-6)
        for mine, theirs in zip(sampled, follower.sampled(step), strict=True):
            np.testing.assert_array_equal(mine.logprobs, theirs.logprobs)
            np.testing.assert_array_equal(mine.drawn_logprobs, theirs.drawn_logprobs)
            assert (mine.ended, mine.weights_step) == (theirs.ended, theirs.weights_step)
            assert theirs.logprobs.dtype == np.float32


def test_a_step_is_there_once_all_of_it_is(log: RolloutLog, tmp_path: Path) -> None:
    assert [step for step in range(1, 6) if RolloutLog(tmp_path / "log").is_there(step)] == [1, 2, 3]
    (tmp_path / "log" / "shard-00001.json").unlink()  # the last that is renamed into its place
    assert [step for step in range(1, 6) if RolloutLog(tmp_path / "log").is_there(step)] == [1, 3]
    log = RolloutLog(tmp_path / "log")
    log.write(2, *rows_of(2, 3))  # by a sampler that began anew
    assert log.is_there(2) and len(log.examples(2)) == len(log.sampled(2)) == 3


def test_a_follower_waits_for_a_step(tmp_path: Path) -> None:
    log = begin(tmp_path / "log")
    writer = threading.Timer(0.1, log.write, (2, *rows_of(2, 3)))
    writer.start()
    follower = RolloutLog(tmp_path / "log")
    assert follower.wait_for(2, timeout_seconds=30) > 0
    assert follower.scores(2, 1).key == follower.examples(2)[1].key
    writer.join()


def test_a_follower_does_not_wait_for_ever(log: RolloutLog) -> None:
    log.wait_for(3, timeout_seconds=0)
    with pytest.raises(TimeoutError, match="shard 3 of .* did not come within 0 s"):
        log.wait_for(4, timeout_seconds=0.02)


def test_a_follower_stops_with_the_error_of_who_writes(log: RolloutLog, tmp_path: Path) -> None:
    log.declare_failed("a sampler died 4 times")
    follower = RolloutLog(tmp_path / "log")
    follower.wait_for(3, timeout_seconds=30)  # what is there is there
    with pytest.raises(ScoringFailed, match="^a sampler died 4 times$"):
        follower.wait_for(4, timeout_seconds=30)
    log.clear_failure()
    with pytest.raises(TimeoutError, match="did not come"):
        follower.wait_for(4, timeout_seconds=0.02)
    log.clear_failure()  # of none


def test_a_discarded_step_leaves_nothing(log: RolloutLog, tmp_path: Path) -> None:
    log.discard(2)
    assert [step for step in range(1, 6) if log.is_there(step)] == [1, 3]
    assert not [path.name for path in (tmp_path / "log").iterdir() if "00001" in path.name]
    assert log.scores(3, 2).key == log.examples(3)[2].key
    log.discard(2)  # a step that is not there


def test_another_identity_is_refused(log: RolloutLog, tmp_path: Path) -> None:
    assert begin(tmp_path / "log").is_there(1)
    assert begin(tmp_path / "log", top_k=3).scores(1, 0, top_k=3).topk_ids.shape[1] == 3
    with pytest.raises(StoreMismatch, match="(?s)holds other scores than these.*ids_below: wanted 50, the store has None"):
        begin(tmp_path / "log", ids_below=50)


def test_a_training_may_have_more_steps_than_a_store_has_shards(tmp_path: Path) -> None:
    steps = 10 * MOST_SHARDS + 7
    log = begin(tmp_path / "log", steps=steps)
    log.write(steps, *rows_of(1, BATCH_ROWS))
    assert log.is_there(steps) and not log.is_there(steps - 1)
    assert log.scores(steps, 3).key == log.examples(steps)[3].key


def damaged(scores: TeacherScores, value: float) -> TeacherScores:
    target_logprob = scores.target_logprob.copy()
    target_logprob[-1] = value
    return replace(scores, target_logprob=target_logprob)


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "target_logprob holds nan; the teacher's scores must be finite"), (0.5, "target_logprob holds 0.5; a log-")],
)
def test_a_damaged_score_is_refused_by_name(log: RolloutLog, value: float, message: str) -> None:
    examples, scores, sampled = rows_of(4, 3)
    scores[1] = damaged(scores[1], value)
    with pytest.raises(ValueError, match=rf"^row {examples[1].row} \(key {examples[1].key[:12]}\): {re.escape(message)}"):
        log.write(4, examples, scores, sampled)
    assert not log.is_there(4)


def test_scores_in_another_order_are_refused_by_name(log: RolloutLog) -> None:
    examples, scores, sampled = rows_of(4, 3)
    with pytest.raises(ValueError, match="^row 0 .*: the scores carry key .*, those of another row$"):
        log.write(4, examples, scores[::-1], sampled)
    assert not log.is_there(4)
