"""Who writes the rows of which step by which weights, in which order, and what is left when it ends before its end."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from actors.dataloader.rollout_rows import written_by_student
from actors.dataloader.sampler import StepSampler
from actors.examples import ExampleFile, write_examples
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores, example_key
from actors.rollouts.base import Prompt, Response, written_row
from actors.rollouts.step_writer import MOST_UNSCORED, RolloutPlan, StepFacts, StepWriter, numbers_of
from actors.rollouts.weights import Proof, WeightFolders, steps_written_by, weights_step
from actors.rollouts.workers import HandOver, Weights, Written
from actors.score_store.rollout_log import RolloutLog
from tests.fakes import FAKE_VOCAB, expected_scores

ROWS, BATCH, STEPS, TOP_K, SEED = 10, 4, 8, 5, 2
IDENTITY = {"top_k": TOP_K, "vocab_size": FAKE_VOCAB}
FIRST = ModelSource("the-student-as-it-begins", None, False)
PATIENCE_SECONDS = 120.0
ALL_AT_ONCE = 1000
"""Steps of a window that is longer than the training, so that nobody waits for weights."""


def conversations(rows: int) -> list[Example]:
    """Rows of which every second has two answers."""
    generator, examples = np.random.default_rng(0), []
    for row in range(rows):
        token_ids = generator.integers(0, FAKE_VOCAB, 14).astype(np.int32)
        mask = np.arange(14) >= 9 + row % 3
        if row % 2:
            mask[2:5] = True
        examples.append(Example(token_ids, mask, example_key(token_ids, mask), 100 + row))
    return examples


def answer(prompt: Prompt, weights: int) -> Response:
    """What the fake samplers write, by these weights, to a prompt."""
    generator = np.random.default_rng([prompt.step, prompt.row, weights])
    count = int(generator.integers(1, 6))
    logprobs = -generator.exponential(2, count).astype(np.float32)
    return Response(generator.integers(0, FAKE_VOCAB, count).astype(np.int32), logprobs, bool(count % 2))


@dataclass
class Samplers:
    """Answers at once; stands where ``RolloutWorkers`` do."""

    on_write: Callable[[int], None] = lambda step: None
    calls: list[tuple[Weights, list[Prompt]]] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        return [prompts[0].step for _, prompts in self.calls]

    def write(self, weights: Weights, prompts: Sequence[Prompt]) -> Written:
        assert len({prompt.step for prompt in prompts}) == 1
        self.on_write(prompts[0].step)
        self.calls.append((weights, list(prompts)))
        return Written([answer(prompt, weights.step) for prompt in prompts], 0.25, HandOver(0.5, 0.001, 0.002))


@dataclass
class Teacher:
    """Scores rows as they come; fails at the call that it is told to."""

    fails_on_call: int = 0
    before: Callable[[int], None] = lambda call: None
    calls: list[list[str]] = field(default_factory=list)

    def score(self, examples: Sequence[Example]) -> dict[str, TeacherScores]:
        self.calls.append([example.key for example in examples])
        self.before(len(self.calls))
        if len(self.calls) == self.fails_on_call:
            raise RuntimeError(f"the teacher fails on call {self.fails_on_call}")
        return {example.key: expected_scores(example, TOP_K) for example in examples}


@dataclass
class World:
    """A training of some steps, its log and its weights."""

    plan: RolloutPlan
    log: RolloutLog
    folders: WeightFolders
    facts: list[StepFacts] = field(default_factory=list)

    def writer(self, samplers: Samplers, teacher: Teacher) -> StepWriter:
        return StepWriter(self.plan, self.log, self.folders, samplers, teacher, self.facts.append)  # type: ignore[arg-type]

    def run(self, samplers: Samplers, teacher: Teacher) -> None:
        with self.running(samplers, teacher):
            pass

    @contextmanager
    def running(self, samplers: Samplers, teacher: Teacher) -> Iterator[threading.Event]:
        """Run a writer beside the body; leave, with its error, once it has ended."""
        over, writer = threading.Event(), self.writer(samplers, teacher)
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(writer.run, over)
            try:
                yield over
                running.result(PATIENCE_SECONDS)
            finally:
                over.set()

    def publish(self, weights: int) -> None:
        """Leave the weights after a step, as the student does."""
        unfinished = self.folders.path(weights).with_suffix(".unfinished")
        unfinished.mkdir(parents=True)
        proof_of(weights).write(unfinished)
        unfinished.rename(self.folders.path(weights))

    def train(self) -> None:
        """Follow the log as a student does, and publish the weights that somebody waits for."""
        for step in range(1, self.plan.total_steps + 1):
            if self.plan.prompts(step):
                self.log.wait_for(step, PATIENCE_SECONDS)
            if steps_written_by(step, self.plan.refresh_steps, self.plan.lag, self.plan.total_steps):
                self.publish(step)

    def there(self) -> list[int]:
        return [step for step in range(1, self.plan.total_steps + 1) if self.log.is_there(step)]

    def missing(self) -> list[int]:
        return StepWriter.missing_steps(self.log, self.plan)


def proof_of(weights: int) -> Proof:
    return Proof(np.arange(3, dtype=np.int32), np.full(2, -weights, np.float32))


def world_in(
    folder: Path, refresh_steps: int = 1, lag: int = 0, share: float = 0.9, keep_steps: int | None = None, steps: int = STEPS
) -> World:
    write_examples(folder / "train.arrow", conversations(ROWS))
    plan = RolloutPlan(
        examples=ExampleFile(folder / "train.arrow"),
        sampler=StepSampler(ROWS, BATCH, SEED, store_order_first=False),
        total_steps=steps,
        seed=SEED,
        student_share=share,
        refresh_steps=refresh_steps,
        lag=lag,
        keep_steps=keep_steps,
        first_model=FIRST,
        trust_remote_code=True,
    )
    return World(plan, RolloutLog.open_or_create(folder / "log", IDENTITY, steps, BATCH), WeightFolders(folder / "weights"))


def with_rows(plan: RolloutPlan) -> list[int]:
    """Steps in which the student writes a row."""
    rows = [len(plan.sampler.positions(step)) for step in range(1, plan.total_steps + 1)]
    return [
        step for step, count in enumerate(rows, start=1) if written_by_student(plan.seed, step, count, plan.student_share).any()
    ]


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
            assert weights.model == ModelSource(str(world.folders.path(weights.step)), None, True)
            assert weights.proof is not None
            assert np.array_equal(weights.proof.logprobs, proof_of(weights.step).logprobs)
        rows = [written_row(prompt, answer(prompt, weights.step)) for prompt in world.plan.prompts(step)]
        assert [prompt.row for prompt in prompts] == [row.row for row in rows]
        found = world.log.examples(step)
        assert keys == found.keys == [row.key for row in rows] and found.rows == [row.row for row in rows]
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


# ---- and begins anew


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
