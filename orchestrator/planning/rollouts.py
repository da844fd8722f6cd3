"""What a step takes whose rows the student writes: sampling, scoring and training, who is waited for, and how many keep up.

By arithmetic. A token is drawn when all weights were read once from memory and multiplied, and the host has had its turn; all
rows that are sampled together share reading and turn. How long responses become nobody knows before: each counts as long as it
may become.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from actors.config.models import EngineConfig
from actors.format import plural
from actors.monitors.flops import blocks_flops, head_flops
from orchestrator.config.run import RunConfig
from orchestrator.models.models import Role
from orchestrator.planning.memory import SIZES
from orchestrator.planning.shapes import ModelShape
from orchestrator.planning.throughput import SCORING_SHARE, Rates, cpus_flops, gpu_speed

GPU_BYTES_A_SECOND, CPU_BYTES_A_SECOND = 2.0e12, 10e9
"""Assumed of a GPU's memory (an A100 of 80 GiB) and of one CPU's."""
BANDWIDTH_SHARE = 0.6
"""Assumed share of it that is used."""
TURN_SECONDS = 0.005
"""Assumed of the host for each token, however many rows there are; vLLM took about 10 ms for a tiny model beside other work."""


@dataclass(frozen=True, slots=True)
class RolloutPace:
    """Seconds of one optimizer step, by part; those of sampling and scoring at most, and shared by all steps on the same rows."""

    samplers: int
    replicas: int
    workers: int
    lag: int
    sampling_seconds: float
    """By all samplers together; where the teacher draws some tokens, its after the student's, without the turns between them."""
    scoring_seconds: float
    """By all replicas of the teacher."""
    training_seconds: float
    """By all workers, without waiting."""

    @property
    def seconds(self) -> float:
        """Of a step: one part after the other, or with a lag the slowest."""
        parts = (self.sampling_seconds, self.scoring_seconds, self.training_seconds)
        return max(parts) if self.lag else sum(parts)

    @property
    def slowest(self) -> str:
        """Which part takes longest: ``sampling``, ``scoring`` or ``training``."""
        parts = {"sampling": self.sampling_seconds, "scoring": self.scoring_seconds, "training": self.training_seconds}
        return max(parts, key=lambda part: parts[part])

    def lines(self) -> tuple[str, ...]:
        """Return it in words."""
        samplers = math.ceil(self.samplers * self.sampling_seconds / self.training_seconds)
        replicas = math.ceil(self.replicas * self.scoring_seconds / self.training_seconds)
        together = "the slowest of them with its lag" if self.lag else "one after the other without a lag"
        return (
            f"rollouts: a step takes at most {self.sampling_seconds:.3g} s to sample, {self.scoring_seconds:.3g} s to score and "
            f"{self.training_seconds:.3g} s to train, {self.seconds:.3g} s in all ({together}); {self.slowest} takes longest",
            f"rollouts: {plural(max(1, samplers), 'sampler')} and {plural(max(1, replicas), 'replica')} keep up with "
            f"{plural(self.workers, 'worker')} where the lag is 1; the other hours here are those of rows that all stay as the "
            "data has them",
        )


def rollout_pace(
    config: RunConfig, shapes: Mapping[Role, ModelShape], row_tokens: float, rates: Rates, replicas: int, gpu_flops: float
) -> RolloutPace:
    """Return what a step of a run with rollouts takes.

    Args:
        config: of the run; its rollouts are set.
        shapes: of student and teacher, who sample.
        row_tokens: mean tokens of a row as the data has it, prompt and response.
        rates: of one replica that scores and one worker that learns.
        replicas: of the teacher.
        gpu_flops: operations a second of a GPU in 16 bits.
    """
    rollouts, engine = config.rollouts, config.sampler_engine
    assert rollouts is not None
    samplers, rows = int(engine.replicas), config.train.batch_rows
    written = rows * rollouts.student_share
    at_once = min(engine.rows_per_call, max(1.0, written / samplers))
    tokens, context = written * rollouts.max_new_tokens, rollouts.max_new_tokens
    rate = samplers * sampling_rate(shapes["student"], engine, at_once, context, gpu_flops)
    sampling_seconds = (1 - rollouts.teacher_share) * tokens / rate
    if (drawing := config.teacher_sampler_engine) is not None:
        drawers = int(drawing.replicas)
        at_once = min(drawing.rows_per_call, max(1.0, written / drawers))
        rate = drawers * sampling_rate(shapes["teacher"], drawing, at_once, context, gpu_flops)
        sampling_seconds += rollouts.teacher_share * tokens / rate
    read = written * (row_tokens + rollouts.max_new_tokens)  # no more of a prompt than of a whole row
    return RolloutPace(
        samplers=samplers,
        replicas=replicas,
        workers=config.workers.count,
        lag=rollouts.lag,
        sampling_seconds=sampling_seconds / rollouts.inner_epochs,
        scoring_seconds=read / (replicas * rates.scoring) / rollouts.inner_epochs,
        training_seconds=(read + (rows - written) * row_tokens) / (config.workers.count * rates.training),
    )


def sampling_rate(shape: ModelShape, engine: EngineConfig, rows: float, context: float, gpu_flops: float) -> float:
    """Return the tokens a second that one sampler is assumed to draw, ``rows`` at a time, in texts of ``context`` tokens."""
    devices = engine.tensor_parallel if engine.gpu else max(1, int(engine.cpus))
    bandwidth = devices * BANDWIDTH_SHARE * (GPU_BYTES_A_SECOND if engine.gpu else CPU_BYTES_A_SECOND)
    speed = devices * gpu_speed(engine.dtype, gpu_flops) * SCORING_SHARE if engine.gpu else cpus_flops(engine.cpus)
    reading = SIZES[engine.dtype] * shape.weights / bandwidth
    computing = rows * (blocks_flops(shape, context) + head_flops(shape)) / speed
    return rows / max(reading, computing, TURN_SECONDS)
