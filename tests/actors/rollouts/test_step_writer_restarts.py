"""A writer that begins again: what is missing it writes, what is there or gone it does not."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from actors.dataloader.row_sources import weights_step
from actors.score_store.rollout_log import RolloutLog
from tests.actors.rollouts.step_world import (
    ALL_AT_ONCE,
    PATIENCE_SECONDS,
    STEPS,
    Samplers,
    Teacher,
    with_rows,
    world_in,
)


def test_a_second_writer_writes_what_is_missing_and_nothing_twice(tmp_path: Path) -> None:
    world = world_in(tmp_path, ALL_AT_ONCE)
    with pytest.raises(RuntimeError, match="fails on call 4"):
        world.run(Samplers(), Teacher(fails_on_call=4))
    there = world.there()
    assert there == [1, 2, 3]
    before = {step: world.log.examples(step).hash for step in there}
    samplers, teacher = Samplers(), Teacher()
    again = replace(world, log=RolloutLog(tmp_path / "log"), facts=[])
    missing = again.missing()
    assert missing == [step for step in range(1, STEPS + 1) if step not in there]
    again.run(samplers, teacher)
    assert samplers.steps == [facts.step for facts in again.facts] == missing and len(teacher.calls) == len(missing)
    assert again.there() == list(range(1, STEPS + 1))
    assert {step: again.log.examples(step).hash for step in there} == before
    third = Samplers()
    again.run(third, Teacher())
    assert third.calls == []


def test_a_step_that_failed_leaves_no_gap_that_would_pass_for_steps_that_are_gone(tmp_path: Path) -> None:
    world, third = world_in(tmp_path, ALL_AT_ONCE), threading.Event()

    def note(step: int) -> None:
        if step == 3:
            third.set()

    def slow(call: int) -> None:
        assert third.wait(PATIENCE_SECONDS)

    with pytest.raises(RuntimeError, match="fails on call 1"):
        world.run(samplers := Samplers(note), Teacher(fails_on_call=1, before=slow))
    assert samplers.steps[:3] == [1, 2, 3], "two steps were written when the first one failed"
    assert world.there() == [] and world.missing() == list(range(1, STEPS + 1))


def test_weights_stay_until_what_they_wrote_is_in_the_log(tmp_path: Path) -> None:
    """A student that resumes after them does not leave them again."""
    world, written = world_in(tmp_path, lag=1), threading.Event()
    for weights in (1, 2, 3):
        world.publish(weights)

    def note(step: int) -> None:
        if step == 5:
            written.set()

    def slow(call: int) -> None:
        assert call < 3 or written.wait(PATIENCE_SECONDS)

    with pytest.raises(RuntimeError, match="fails on call 3"):
        world.run(Samplers(note), Teacher(fails_on_call=3, before=slow))
    missing = world.missing()
    assert missing[0] == 3 and world.folders.is_there(weights_step(3, 1, 1))
    for weights in range(4, STEPS - 1):
        world.publish(weights)
    world.run(samplers := Samplers(), Teacher())
    assert samplers.steps == missing
    assert world.there() == list(range(1, STEPS + 1))


# ---- what is kept


def test_only_the_latest_steps_are_kept(tmp_path: Path) -> None:
    world = world_in(tmp_path, ALL_AT_ONCE, keep_steps=3)
    world.run(Samplers(), Teacher())
    assert world.there() == [STEPS - 2, STEPS - 1, STEPS]
    assert {path.name for path in (tmp_path / "log").glob("written-*")} == {f"written-{step - 1:05d}.arrow" for step in (6, 7, 8)}


def test_a_writer_does_not_begin_again_with_steps_that_are_gone(tmp_path: Path) -> None:
    world = world_in(tmp_path, ALL_AT_ONCE, keep_steps=2)
    with pytest.raises(RuntimeError, match="fails on call 6"):
        world.run(Samplers(), Teacher(fails_on_call=6))
    assert world.there() == [4, 5]
    assert world.missing() == [6, 7, 8]
    world.run(samplers := Samplers(), Teacher())
    assert samplers.steps == [6, 7, 8] and world.there() == [7, 8]
    assert world.missing() == []


def test_steps_without_rows_of_the_students_leave_nothing_that_is_to_be_discarded(tmp_path: Path) -> None:
    world = world_in(tmp_path, ALL_AT_ONCE, share=0.2, keep_steps=2, steps=40)
    expected = with_rows(world.plan)
    assert any(step + 1 not in expected for step in expected)
    world.run(Samplers(), Teacher())
    assert world.there() == [step for step in expected if step > expected[-1] - 2]
    assert world.missing() == []


def test_where_fewer_steps_are_kept_from_now_on_the_others_go(tmp_path: Path) -> None:
    world = world_in(tmp_path, ALL_AT_ONCE)
    with pytest.raises(RuntimeError, match="fails on call 7"):
        world.run(Samplers(), Teacher(fails_on_call=7))
    fewer = replace(world, plan=replace(world.plan, keep_steps=2))
    fewer.run(samplers := Samplers(), Teacher())
    assert samplers.steps[0] == 7
    assert fewer.there() == [7, 8] and fewer.missing() == []


def test_a_step_that_the_student_has_passed_is_not_waited_for(tmp_path: Path) -> None:
    """Its rows were deleted; the student resumes after it, and leaves later weights only."""
    world = world_in(tmp_path)
    for weights in range(1, 5):
        world.publish(weights)
    with pytest.raises(RuntimeError, match="fails on call 6"), world.running(Samplers(), Teacher(fails_on_call=6)):
        world.publish(5)
    assert world.there() == [1, 2, 3, 4, 5]
    world.log.discard(2)
    with world.running(samplers := Samplers(), Teacher()):
        world.publish(6)
        world.publish(7)
    assert samplers.steps == [6, 7, 8] and world.missing() == [2]
