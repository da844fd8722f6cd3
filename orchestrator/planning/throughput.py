"""When shards are scored and steps taken: a simulation of replicas that write a store and workers that follow it."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.config.models import ScoresConfig, TrainConfig, needs_complete_store, needs_teacher
from losses.config import LossConfig
from orchestrator.planning.shapes import Workload
from orchestrator.planning.time import Rates

STUDENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
REPLICAS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
HARDLY = 0.05
"""A gain below this share counts as none."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long scoring and training take with so many replicas and workers."""

    replicas: int
    workers: int
    scoring_seconds: float
    """Until the last shard is written, held-out rows included."""
    epoch_seconds: float
    """Of one pass over the rows that waits for nobody."""
    first_epoch_seconds: float
    """From the start of scoring until every row was taught once."""
    seconds: float
    """From the start of scoring until the training is over."""

    @property
    def bottleneck(self) -> str:
        """Who is waited for in the first epoch: ``teacher`` or ``student``."""
        return "teacher" if self.scoring_seconds > self.epoch_seconds else "student"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The rows, cut into shards and steps, and how fast each side is."""

    shard_tokens: np.ndarray
    """int64 [shards], tokens of each shard of the training rows."""
    heldout_tokens: int
    """Tokens of the held-out rows; they are scored as one shard, before the others."""
    step_tokens: np.ndarray
    """int64 [steps of an epoch], tokens of each optimizer step in the order of the store."""
    step_rows: np.ndarray
    """int64 [steps of an epoch], rows of each."""
    step_shard: np.ndarray
    """int64 [steps of an epoch], the last shard each step reads."""
    epochs: float
    """Passes over the rows."""
    follows: bool
    """Whether the first epoch reads shards as they come; otherwise training begins with the complete store."""
    beside: bool
    """Whether training may run at the same time as scoring at all."""
    rates: Rates
    """Of one replica and of one worker."""


def pipeline_of(work: Workload, scores: ScoresConfig, train: TrainConfig, loss: LossConfig, rates: Rates) -> Pipeline:
    """Cut the rows as scoring and training do."""
    ends = np.minimum(np.arange(1, -(-work.rows // train.batch_rows) + 1) * train.batch_rows, work.rows)
    shard_starts = np.arange(0, work.rows, scores.rows_per_shard)
    step_starts = np.arange(0, work.rows, train.batch_rows)
    taught = needs_teacher(loss)
    return Pipeline(
        shard_tokens=np.add.reduceat(work.lengths, shard_starts) if taught else np.zeros(0, dtype=np.int64),
        heldout_tokens=work.heldout_tokens,
        step_tokens=np.add.reduceat(work.lengths, step_starts),
        step_rows=np.diff(np.concatenate([[0], ends])),
        step_shard=(ends - 1) // scores.rows_per_shard,
        epochs=train.epochs,
        follows=scores.overlap and train.first_epoch == "store_order" and not needs_complete_store(loss),
        beside=scores.overlap,
        rates=rates,
    )


def pace(pipe: Pipeline, replicas: int, workers: int) -> Pace:
    """Simulate one pair. Replicas take shards in order, each the next when it is free; steps wait for the shards they read.

    A worker has a whole number of rows of a step, so more workers than rows of a batch gain nothing.
    """
    ready = shards_ready(pipe.shard_tokens, pipe.heldout_tokens, pipe.rates.scoring, replicas)
    scored = float(ready.max())
    ready = np.maximum.accumulate(ready[1:])
    shares = np.ceil(pipe.step_rows / workers) / pipe.step_rows  # of a step, what the worker with most rows takes
    step_seconds = pipe.step_tokens * shares / pipe.rates.training
    epoch = float(step_seconds.sum())
    first_share = min(1.0, pipe.epochs)
    if not len(ready) and pipe.beside:
        first = epoch * first_share
    elif pipe.follows:
        taught = max(1, int(np.ceil(len(step_seconds) * first_share)))
        first = follow(ready[pipe.step_shard[:taught]], step_seconds[:taught])
    else:
        first = scored + epoch * first_share
    return Pace(replicas, workers, scored, epoch, first, max(scored, first + epoch * max(0.0, pipe.epochs - 1)))


def shards_ready(shard_tokens: Sequence[int] | np.ndarray, heldout_tokens: int, rate: float, replicas: int) -> np.ndarray:
    """Return float64 [1 + shards]: when the held-out rows and each shard are scored."""
    free, ready = [0.0] * replicas, []
    for tokens in [heldout_tokens, *shard_tokens]:
        done = heapq.heappop(free) + tokens / rate
        heapq.heappush(free, done)
        ready.append(done)
    return np.array(ready)


def follow(ready: np.ndarray, step_seconds: np.ndarray) -> float:
    """Return when the last step is done, if each begins after the one before and not before its scores are ready."""
    done = np.cumsum(step_seconds)
    begun = done - step_seconds
    return float(done[-1] + max(0.0, (ready - begun).max()))


def replicas_that_feed(pipe: Pipeline, workers: int, choices: Sequence[int] = REPLICAS) -> int:
    """Return the fewest replicas with which the first epoch is hardly longer than with the most."""
    seconds = {count: pace(pipe, count, workers).first_epoch_seconds for count in choices}
    return next(count for count in choices if seconds[count] <= min(seconds.values()) * (1 + HARDLY))


def workers_that_are_fed(pipe: Pipeline, replicas: int, choices: Sequence[int] = STUDENTS) -> int:
    """Return the fewest workers with which the first epoch is hardly longer than with the most."""
    seconds = {count: pace(pipe, replicas, count).first_epoch_seconds for count in choices}
    return next(count for count in choices if seconds[count] <= min(seconds.values()) * (1 + HARDLY))
