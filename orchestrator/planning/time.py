"""Seconds: what a replica and a worker manage, by arithmetic and an assumed share of a device's speed, or as measured.

V vocabulary, H hidden size.
"""

from dataclasses import dataclass

from actors.config.models import EngineConfig, TrainConfig
from actors.config.workers import WorkersConfig
from orchestrator.planning.shapes import ModelShape, Workload

CPU_FLOPS = 80e9
"""Assumed of one CPU: float32 operations a second at most."""
GPU_FLOPS = 312e12
"""Assumed of one GPU unless said: 16-bit operations a second at most, those of an A100."""
GPU_FLOAT32 = 1 / 16
"""What of that remains in float32, without tensor cores."""
CPU_SHARE = 0.45
"""Assumed share of a CPU's speed that is used."""
SCORING_SHARE, TRAINING_SHARE = 0.40, 0.35
"""Assumed shares of a GPU's speed that scoring and training use."""


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
    head = 2 * shape.head_weights * (work.train_targets / work.train_tokens if head_on_targets else 1.0)
    return _blocks_flops(shape, work) + head


def training_flops(shape: ModelShape, work: Workload, train: TrainConfig) -> float:
    """Return the operations of forward and backward pass for one token.

    Backwards each weight is met twice, for its own gradient and for that of its input; a frozen one once. Gradient
    checkpointing runs the blocks once more.
    """
    blocks = _blocks_flops(shape, work)
    head = forward_flops(shape, work, head_on_targets=True) - blocks
    frozen = shape.trained < shape.weights / 2
    again = blocks if train.gradient_checkpointing else 0.0
    return blocks * (2 if frozen else 3) + head * (3 if shape.trains_head else 2) + again


def _blocks_flops(shape: ModelShape, work: Workload) -> float:
    """Of the decoder's blocks: products with weights, and attention over, on average, half a row."""
    mean_length = float((work.lengths.astype(float) ** 2).sum() / work.train_tokens)  # a token's own row
    return shape.layers * (2 * shape.layer_weights + 4 * shape.hidden_size * mean_length / 2)


def scoring_rate(shape: ModelShape, work: Workload, engine: EngineConfig, gpu_flops: float = GPU_FLOPS) -> float:
    """Return the tokens a second that a replica is assumed to score."""
    speed = engine.tensor_parallel * _gpu_speed(engine.dtype, gpu_flops) * SCORING_SHARE if engine.gpu else _cpus(engine.cpus)
    return speed / forward_flops(shape, work, head_on_targets=engine.kind == "vllm")


def training_rate(
    shape: ModelShape, work: Workload, train: TrainConfig, workers: WorkersConfig, padding: float, gpu_flops: float = GPU_FLOPS
) -> float:
    """Return the tokens a second that a worker is assumed to learn; exchanging gradients costs nothing here."""
    speed = _gpu_speed(train.precision, gpu_flops) * TRAINING_SHARE if workers.gpus else _cpus(workers.cpus)
    return speed / training_flops(shape, work, train) / padding


def _gpu_speed(dtype: str, gpu_flops: float) -> float:
    return gpu_flops * (GPU_FLOAT32 if dtype == "float32" else 1.0)


def _cpus(cpus: float) -> float:
    return CPU_FLOPS * max(1, int(cpus)) * CPU_SHARE


def assumptions(gpu_flops: float) -> tuple[str, ...]:
    """Say what the hours rest on where nothing was measured."""
    return (
        f"a GPU does {gpu_flops / 1e12:g} TFLOP/s in 16 bits, {gpu_flops * GPU_FLOAT32 / 1e12:g} in float32; scoring uses "
        f"{SCORING_SHARE:.0%} of it, training {TRAINING_SHARE:.0%}; a CPU does {CPU_FLOPS / 1e9:g} GFLOP/s, "
        f"{CPU_SHARE:.0%} of it used",
        "exchanging gradients, starting processes, loading, evaluating and writing take no time",
    )
