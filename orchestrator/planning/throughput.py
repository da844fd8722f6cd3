"""Seconds: what a replica and a worker manage, and when shards are scored and steps taken.

The first by arithmetic and an assumed share of a device's speed, or as measured; the second by a simulation of replicas that
write a store and workers that follow it. V vocabulary, H hidden size.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.config.models import EngineConfig, ScoresConfig, TrainConfig, needs_complete_store, needs_teacher
from actors.config.workers import WorkersConfig
from actors.monitors.flops import blocks_flops, head_flops, learning_flops, mean_context
from losses.config import LossConfig
from orchestrator.planning.shapes import ModelShape, Passes, Workload

CPU_FLOPS = 80e9
"""Assumed of one CPU: float32 operations a second at most."""
GPU_FLOPS = 312e12
"""Assumed of one GPU by default: 16-bit operations a second at most, those of an A100."""
GPU_FLOAT32 = 1 / 16
"""What of that remains in float32, without tensor cores."""
CPU_SHARE = 0.45
"""Assumed share of a CPU's speed that is used."""
SCORING_SHARE, TRAINING_SHARE = 0.40, 0.35
"""Assumed shares of a GPU's speed that scoring and training use."""
STUDENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
REPLICAS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
HARDLY = 0.05
"""A gain below this share counts as none."""


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast one replica and one worker are, in tokens of rows, prompts included and padding not."""

    scoring: float
    """Tokens a second of one replica."""
    training: float
    """Tokens a second of one worker of the distillation."""
    source: str
    """Where the numbers come from."""


def forward_flops(shape: ModelShape, work: Workload, head_on_targets: bool) -> float:
    """Return the operations of a forward pass for one token: two for each weight of the blocks, attention, and the head.

    Args:
        head_on_targets: whether the output head is multiplied by the targets alone, not by every token.
    """
    if shape.token_flops is not None:
        return shape.token_flops
    share = work.train_targets / work.train_tokens if head_on_targets else 1.0
    return blocks_flops(shape, mean_context(work.lengths)) + head_flops(shape, share)


def training_flops(shape: ModelShape, work: Workload, train: TrainConfig, context: float) -> float:
    """Return the operations of forward and backward pass for one token; gradient checkpointing runs the blocks once more.

    ``context`` are the tokens over which attention is computed (``Passes``).
    """
    if shape.token_flops is not None:
        return 3 * shape.token_flops
    again = blocks_flops(shape, context) if train.gradient_checkpointing else 0.0
    return learning_flops(shape, context, work.train_targets / work.train_tokens) + again


def scoring_rate(shape: ModelShape, work: Workload, engine: EngineConfig, gpu_flops: float = GPU_FLOPS) -> float:
    """Return the tokens a second that a replica is assumed to score; infinite where nothing is computed."""
    flops = forward_flops(shape, work, head_on_targets=engine.kind == "vllm")
    speed = engine.tensor_parallel * gpu_speed(engine.dtype, gpu_flops) * SCORING_SHARE if engine.gpu else cpus_flops(engine.cpus)
    return speed / flops if flops else math.inf


def training_rate(
    shape: ModelShape, work: Workload, train: TrainConfig, workers: WorkersConfig, passes: Passes, gpu_flops: float = GPU_FLOPS
) -> float:
    """Return the tokens a second that a worker is assumed to learn; exchanging gradients costs nothing here."""
    speed = gpu_speed(train.precision, gpu_flops) * TRAINING_SHARE if workers.gpus else cpus_flops(workers.cpus)
    return speed / training_flops(shape, work, train, passes.context) / passes.padding


def gpu_speed(dtype: str, gpu_flops: float) -> float:
    """Return the operations a second of a GPU in a type, of which it does ``gpu_flops`` in 16 bits."""
    return gpu_flops * (GPU_FLOAT32 if dtype == "float32" else 1.0)


def cpus_flops(cpus: float) -> float:
    """Return the operations a second that are assumed of so many CPUs."""
    return CPU_FLOPS * max(1, int(cpus)) * CPU_SHARE


def assumptions(gpu_flops: float) -> tuple[str, ...]:
    """Return what the hours assume where nothing was measured."""
    return (
        f"a GPU does {gpu_flops / 1e12:g} TFLOP/s in 16 bits, {gpu_flops * GPU_FLOAT32 / 1e12:g} in float32; scoring uses "
        f"{SCORING_SHARE:.0%} of it, training {TRAINING_SHARE:.0%}; a CPU does {CPU_FLOPS / 1e9:g} GFLOP/s, "
        f"{CPU_SHARE:.0%} of it used",
        "exchanging gradients, starting processes, loading, evaluating and writing take no time",
    )


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


def pipeline_of(
    work: Workload, scores: ScoresConfig, train: TrainConfig, loss: LossConfig, rates: Rates, scored: Workload | None = None
) -> Pipeline:
    """Cut the rows as scoring and training do; ``scored`` are the rows as the teacher reads them, where that is otherwise."""
    scored = scored or work
    ends = np.minimum(np.arange(1, -(-work.rows // train.batch_rows) + 1) * train.batch_rows, work.rows)
    shard_starts = np.arange(0, work.rows, scores.rows_per_shard)
    step_starts = np.arange(0, work.rows, train.batch_rows)
    taught = needs_teacher(loss)
    return Pipeline(
        shard_tokens=np.add.reduceat(scored.lengths, shard_starts) if taught else np.zeros(0, dtype=np.int64),
        heldout_tokens=scored.heldout_tokens,
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
