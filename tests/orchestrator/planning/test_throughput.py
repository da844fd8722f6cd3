"""The simulation of replicas that write and workers that follow, held against a plain one, second by second."""

from dataclasses import replace

import numpy as np
import pytest

from actors.config.models import ScoresConfig, TrainConfig
from losses.config import AtkdLoss, HardLabelLoss
from orchestrator.planning.shapes import Workload
from orchestrator.planning.throughput import Pipeline, Rates, pace, pipeline_of, replicas_that_feed, workers_that_are_fed

ATKD = AtkdLoss(kind="atkd")


def workload(rows: int, seed: int = 0, heldout_tokens: int = 70) -> Workload:
    lengths = np.random.default_rng(seed).integers(4, 40, rows)
    return Workload(lengths, lengths // 2, heldout_tokens, heldout_tokens // 2, int(lengths.max()), 96, "made up")


def pipeline(rows: int = 100, epochs: float = 1.0, scoring: float = 50.0, training: float = 80.0, **fields: object) -> Pipeline:
    scores = ScoresConfig.model_validate({"rows_per_shard": 16, **fields})
    train = TrainConfig(epochs=epochs, batch_rows=12)
    return pipeline_of(workload(rows), scores, train, ATKD, Rates(scoring, training, "made up"))


def simulate(work: Workload, replicas: int, workers: int, rates: Rates, rows_per_shard: int, batch_rows: int) -> float:
    """Play it, event after event: who is free takes the next shard; a step is taken when all its rows are there."""
    busy_until = [0.0] * replicas
    row_ready = []
    todo = [work.heldout_tokens]
    for start in range(0, work.rows, rows_per_shard):
        todo.append(int(work.lengths[start : start + rows_per_shard].sum()))
    for number, tokens in enumerate(todo):
        first_free = min(range(replicas), key=lambda replica: busy_until[replica])
        busy_until[first_free] += tokens / rates.scoring
        if number:
            row_ready += [busy_until[first_free]] * rows_per_shard
    now = 0.0
    for start in range(0, work.rows, batch_rows):
        rows = range(start, min(start + batch_rows, work.rows))
        now = max([now, *(row_ready[row] for row in rows)])
        most = max(len(rows[worker::workers]) for worker in range(workers))
        now += most * (sum(int(work.lengths[row]) for row in rows) / len(rows)) / rates.training
    return now


@pytest.mark.parametrize("replicas", [1, 2, 3, 9])
@pytest.mark.parametrize("workers", [1, 2, 5, 40])
def test_the_first_epoch_is_that_of_the_plain_simulation(replicas: int, workers: int) -> None:
    pipe = pipeline()
    found = pace(pipe, replicas, workers)
    assert found.first_epoch_seconds == pytest.approx(simulate(workload(100), replicas, workers, pipe.rates, 16, 12))


def test_later_epochs_wait_for_nobody() -> None:
    one, three = pace(pipeline(), 2, 3), pace(pipeline(epochs=3), 2, 3)
    assert three.seconds == pytest.approx(one.first_epoch_seconds + 2 * one.epoch_seconds)


def test_half_an_epoch_is_half_of_the_steps_but_all_is_scored() -> None:
    half = pace(pipeline(epochs=0.5, training=1e-3), 1, 1)
    assert half.first_epoch_seconds < 0.6 * half.epoch_seconds
    quick = pace(pipeline(epochs=0.5, training=1e9), 1, 1)
    assert quick.first_epoch_seconds < quick.seconds == quick.scoring_seconds


def test_without_overlap_and_without_order_the_student_begins_when_all_is_scored() -> None:
    turns = pace(pipeline(overlap=False), 1, 1)
    assert turns.first_epoch_seconds == pytest.approx(turns.scoring_seconds + turns.epoch_seconds)
    ranked = AtkdLoss(kind="atkd", scope="dataset")
    waits = pipeline_of(workload(100), ScoresConfig(overlap=False), TrainConfig(), ranked, Rates(50, 80, ""))
    permuted = pipeline_of(workload(100), ScoresConfig(), TrainConfig(first_epoch="permuted"), ATKD, Rates(50, 80, ""))
    assert not waits.follows and not permuted.follows
    assert pace(permuted, 1, 1).first_epoch_seconds == pytest.approx(waits_seconds := pace(waits, 1, 1).first_epoch_seconds)
    assert (
        waits_seconds
        > pace(pipeline_of(workload(100), ScoresConfig(), TrainConfig(), ATKD, Rates(50, 80, "")), 1, 1).epoch_seconds
    )


def test_a_loss_without_a_teacher_waits_for_none() -> None:
    hard = HardLabelLoss(kind="hard_label")
    found = pace(pipeline_of(workload(100), ScoresConfig(), TrainConfig(), hard, Rates(50, 80, "")), 1, 1)
    assert found.first_epoch_seconds == pytest.approx(found.epoch_seconds)
    assert found.scoring_seconds == pytest.approx(70 / 50), "held-out rows are scored all the same"


def test_the_bottleneck_is_who_takes_longer() -> None:
    slow_teacher, slow_student = pipeline(scoring=10.0), pipeline(scoring=1000.0)
    assert (pace(slow_teacher, 1, 1).bottleneck, pace(slow_student, 1, 1).bottleneck) == ("teacher", "student")


def test_each_side_saturates_where_it_must() -> None:
    pipe = pipeline(rows=100)
    assert pace(pipe, 7, 3).scoring_seconds >= pace(pipe, 8, 3).scoring_seconds == pace(pipe, 256, 3).scoring_seconds
    assert pace(pipe, 1, 12).epoch_seconds == pace(pipe, 1, 1024).epoch_seconds, "a step has twelve rows"
    for workers in (1, 4, 12):
        seconds = {count: pace(pipe, count, workers).first_epoch_seconds for count in (1, 2, 4, 8, 16)}
        expected = min(count for count in seconds if seconds[count] <= 1.05 * min(seconds.values()))
        assert replicas_that_feed(pipe, workers, tuple(seconds)) == expected
    assert workers_that_are_fed(replace(pipe, rates=Rates(1.0, 1e6, "")), 1) == 1, (
        "the fastest student gains nothing of a slow teacher"
    )
    fast = replace(pipe, rates=Rates(1e9, 1.0, ""))
    assert workers_that_are_fed(fast, 1) == 16, "as many as a step has rows, of the powers of two"
