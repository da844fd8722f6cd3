"""What vLLM does not serve, known before it is imported. Imports neither torch nor vLLM."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of attention heads that its kernels for CPUs have."""


def require_cpu_head_size(hidden_size: int, heads: int) -> None:
    """Raise if vLLM has no kernel on CPUs for a teacher made from scratch.

    Raises:
        ValueError: naming the sizes there are and a width that would do.
    """
    if hidden_size // heads not in CPU_HEAD_SIZES:
        raise ValueError(
            f"teacher.model has heads of size {hidden_size // heads} (hidden_size / heads); vLLM on CPUs serves the sizes "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}: hidden_size {32 * heads} would do"
        )
