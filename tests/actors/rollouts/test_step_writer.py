"""Who writes the rows of which step by which weights, in which order, and what is left when it ends before its end."""

import math
import threading
from pathlib import Path

import numpy as np
import pytest

from actors.dataloader.row_sources import weights_step, written_by_student
from actors.dataloader.sampler import StepSampler
from actors.model_source import ModelSource
from actors.records import TeacherScores
from actors.rollouts.base import Prompt, Response, written_row
from actors.rollouts.step_writer import MOST_UNSCORED, numbers_of
from tests.actors.rollouts.step_world import (
    ALL_AT_ONCE,
    BATCH,
    FIRST,
    PATIENCE_SECONDS,
    ROWS,
    SEED,
    STEPS,
    TOP_K,
    Samplers,
    Teacher,
    answer,
    conversations,
    proof_of,
    with_rows,
    world_in,
)
from tests.fakes import expected_scores, keys_of

# ---- what is asked for


def test_prompts_are_the_last_of_the_rows_that_the_student_writes(tmp_path: Path) -> None:
    plan, examples = world_in(tmp_path, share=0.5).plan, conversations(ROWS)
    seen = 0
    for step in range(1, STEPS + 1):
        positions = StepSampler(ROWS, BATCH, SEED, store_order_first=False).positions(step)
        mask = written_by_student(SEED, step, len(positions), 0.5)
        wanted = [examples[position] for position, written in zip(positions, mask, strict=True) if written]
        prompts = plan.prompts(step)
        assert [(prompt.row, prompt.step, prompt.sample) for prompt in prompts] == [(one.row, step, 0) for one in wanted]
        for prompt, example in zip(prompts, wanted, strict=True):
            answered = 9 + (example.row - 100) % 3
            assert np.array_equal(prompt.token_ids, example.token_ids[:answered])
        seen += len(prompts)
    assert 0 < seen < sum(len(plan.sampler.positions(step)) for step in range(1, STEPS + 1))


def test_a_student_that_writes_all_answers_each_row_of_an_epoch(tmp_path: Path) -> None:
    plan = world_in(tmp_path, share=1.0).plan
    assert sorted(prompt.row for step in (1, 2, 3) for prompt in plan.prompts(step)) == list(range(100, 100 + ROWS))


# ---- what is written


@pytest.mark.parametrize(("refresh_steps", "lag"), [(1, 0), (2, 0), (1, 1), (2, 2), (3, 1), (ALL_AT_ONCE, 0)])
def test_all_steps_are_written_in_order_by_the_weights_that_are_theirs(tmp_path: Path, refresh_steps: int, lag: int) -> None:
    world, samplers, teacher = world_in(tmp_path, refresh_steps, lag), Samplers(), Teacher()
    assert world.missing() == with_rows(world.plan) == list(range(1, STEPS + 1))
    with world.running(samplers, teacher):
        world.train()
    assert samplers.steps == world.there() == [facts.step for facts in world.facts] == list(range(1, STEPS + 1))
    for step, (weights, prompts), keys, facts in zip(
        range(1, STEPS + 1), samplers.calls, teacher.calls, world.facts, strict=True
    ):
        assert weights.step == weights_step(step, refresh_steps, lag)
        if weights.step == 0:
            assert weights.model == FIRST and weights.proof is None
        else:
            assert weights.model == ModelSource(world.folders.place(weights.step), None, True)
            assert weights.proof is not None
            assert np.array_equal(weights.proof.logprobs, proof_of(weights.step).logprobs)
        rows = [written_row(prompt, answer(prompt, weights.step)) for prompt in world.plan.prompts(step)]
        assert [prompt.row for prompt in prompts] == [row.row for row in rows]
        found = world.log.examples(step)
        assert keys == keys_of(found) == [row.key for row in rows] and found.rows.tolist() == [row.row for row in rows]
        for row, (prompt, sampled) in enumerate(zip(prompts, world.log.sampled(step), strict=True)):
            response = answer(prompt, weights.step)
            assert np.array_equal(sampled.logprobs, response.logprobs)
            assert (sampled.ended, sampled.weights_step) == (response.ended, weights.step)
            assert world.log.scores(step, row).key == rows[row].key
        assert facts.numbers["rows"] == len(rows) and facts.numbers["staleness_steps"] == step - 1 - weights.step
        assert {name: facts.numbers[name] for name in ("sample_seconds", "hand_over_seconds", "hand_over_gap")} == {
            "sample_seconds": 0.25, "hand_over_seconds": 0.5, "hand_over_gap": 0.001,
        }  # fmt: skip
        assert facts.numbers["hand_over_largest_gap"] == 0.002
    assert not [step for step in range(STEPS) if world.folders.is_there(step)], "nobody needs them any more"
    assert world.missing() == []


def test_steps_in_which_the_student_writes_no_row_are_left_out(tmp_path: Path) -> None:
    world, samplers, teacher = world_in(tmp_path, ALL_AT_ONCE, share=0.15, steps=30), Samplers(), Teacher()
    expected = with_rows(world.plan)
    assert 0 < len(expected) < 30
    world.run(samplers, teacher)
    assert samplers.steps == world.there() == expected
    assert world.missing() == []


def test_a_step_waits_for_its_weights_and_goes_on_when_they_come(tmp_path: Path) -> None:
    world, samplers = world_in(tmp_path, steps=3), Samplers()
    with world.running(samplers, Teacher()):
        for step in (1, 2, 3):
            world.log.wait_for(step, PATIENCE_SECONDS)
            assert samplers.steps == list(range(1, step + 1)), "the next one needs weights that are not there"
            if step < 3:
                threading.Thread(target=world.publish, args=(step,)).start()
    assert world.there() == [1, 2, 3]


def test_few_steps_wait_for_the_teacher_at_one_time(tmp_path: Path) -> None:
    world, third, unscored = world_in(tmp_path, ALL_AT_ONCE), threading.Event(), []

    def note(step: int) -> None:
        unscored.append(step - 1 - len(world.there()))
        if step == MOST_UNSCORED + 1:
            third.set()

    def slow(call: int) -> None:
        assert third.wait(PATIENCE_SECONDS), "samplers write on while the teacher scores"

    world.run(Samplers(note), Teacher(before=slow))
    assert max(unscored) == MOST_UNSCORED
    assert world.there() == list(range(1, STEPS + 1))


def test_weights_go_once_what_they_wrote_is_scored(tmp_path: Path) -> None:
    world, scored_for_sure = world_in(tmp_path), MOST_UNSCORED + 1
    for weights in range(1, STEPS + 1):
        world.publish(weights)
    left: dict[int, list[int]] = {}

    def note(step: int) -> None:
        left[step] = [weights for weights in range(1, STEPS + 1) if world.folders.is_there(weights)]

    world.run(Samplers(note), Teacher())
    for step in range(scored_for_sure + 1, STEPS + 1):
        assert weights_step(step, 1, 0) in left[step]
        assert min(left[step]) >= weights_step(step - scored_for_sure, 1, 0)
    assert [weights for weights in range(1, STEPS + 1) if world.folders.is_there(weights)] == [STEPS]


# ---- how it ends before its end


def test_a_teacher_that_fails_ends_it_while_it_waits_for_weights(tmp_path: Path) -> None:
    world, samplers = world_in(tmp_path), Samplers()
    with pytest.raises(RuntimeError, match="^the teacher fails on call 1$"):
        world.run(samplers, Teacher(fails_on_call=1))
    assert samplers.steps == [1] and world.there() == []


@pytest.mark.parametrize("call", [1, STEPS - 1, STEPS])
def test_a_teacher_that_fails_ends_it_wherever_it_is(tmp_path: Path, call: int) -> None:
    world = world_in(tmp_path, ALL_AT_ONCE)
    with pytest.raises(RuntimeError, match=f"^the teacher fails on call {call}$"):
        world.run(Samplers(), Teacher(fails_on_call=call))
    assert not world.log.is_there(call)


def test_samplers_that_fail_end_it_and_what_they_wrote_before_is_kept(tmp_path: Path) -> None:
    world = world_in(tmp_path, ALL_AT_ONCE)

    def die(step: int) -> None:
        if step == 4:
            raise RuntimeError("a sampler died 4 times")

    with pytest.raises(RuntimeError, match="^a sampler died 4 times$"):
        world.run(Samplers(die), Teacher())
    assert world.there() == [1, 2, 3]


def test_it_ends_early_once_nobody_needs_rows(tmp_path: Path) -> None:
    world, samplers = world_in(tmp_path), Samplers()
    with world.running(samplers, Teacher()) as over:
        world.log.wait_for(1, PATIENCE_SECONDS)
        over.set()
    assert samplers.steps == [1] and world.there() == [1]


def test_what_is_written_when_it_ends_early_is_still_scored(tmp_path: Path) -> None:
    world, ended = world_in(tmp_path), threading.Event()

    def slow(call: int) -> None:
        assert ended.wait(PATIENCE_SECONDS)

    with world.running(samplers := Samplers(), Teacher(before=slow)) as over:
        over.set()
        ended.set()
    assert samplers.steps == world.there() == [1]


# ---- what is recorded


def test_numbers_of_a_step_by_hand() -> None:
    def response(tokens: list[int], logprobs: list[float], ended: bool) -> Response:
        return Response(np.array(tokens, np.int32), np.array(logprobs, np.float32), ended)

    def scores(target_logprob: list[float]) -> TeacherScores:
        gold, count = np.array(target_logprob, np.float32), len(target_logprob)
        return TeacherScores("", gold, np.zeros((count, 1), np.int32), np.zeros((count, 1), np.float32), np.zeros(count))

    responses = [
        response([0], [-0.5], True),  # its end and nothing else
        response([5, 5, 5, 5, 5, 5], [-1.0, -2.0, -3.0, -0.5, -0.5, -0.5], False),  # three runs of four, all the same
        response([1, 2, 0], [-1.0, -1.0, 0.0], True),  # too short for a run
    ]
    teacher = [scores([-1.0]), scores([-2.0, -2.0, -1.0, -1.0, -0.5, -0.5]), scores([-3.0, -1.0, 0.0])]
    certainty = [math.exp(value) for value in (-1, -2, -2, -1, -1, -0.5, -0.5, -3, -1, 0)]
    assert numbers_of(responses, teacher) == {
        "rows": 3.0,
        "tokens": 10.0,
        "mean_length": pytest.approx(10 / 3),
        "longest": 6.0,
        "ended": pytest.approx(2 / 3),
        "empty": pytest.approx(1 / 3),
        "repeated": pytest.approx(2 / 9),
        "student_entropy": pytest.approx(1.0),
        "teacher_loss": pytest.approx(1.2),
        "reverse_kl": pytest.approx(0.2),
        "uncertainty": pytest.approx(1 - sum(certainty) / 10),
    }


def test_a_response_that_was_cut_after_one_token_is_not_empty() -> None:
    one = Response(np.array([7], np.int32), np.array([-1.0], np.float32), False)
    scores = expected_scores(written_row(Prompt(np.array([1, 2], np.int32), 0), one), TOP_K)
    found = numbers_of([one], [scores])
    assert (found["empty"], found["ended"], found["longest"]) == (0.0, 0.0, 1.0)
