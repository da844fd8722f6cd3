"""Over how many GPUs a model's attention can be cut: whole heads on each, as vLLM has it."""


def require_whole_heads(
    parallel: int, heads: int, kv_heads: int, section: str = "teacher.engine", role: str = "teacher"
) -> None:
    """Raise if a model's heads do not go evenly onto the GPUs of a replica; ``section`` says how many those are.

    Raises:
        ValueError: naming the key, the heads, and a number that would do.
    """
    if not divides(parallel, heads, kv_heads):
        fitting = next(count for count in range(parallel - 1, 0, -1) if divides(count, heads, kv_heads))
        raise ValueError(
            f"{section}.tensor_parallel {parallel} does not divide the {role}'s {heads} attention heads with {kv_heads} "
            f"heads of keys and values; tensor_parallel {fitting} would do"
        )


def divides(parallel: int, heads: int, kv_heads: int) -> bool:
    """Whether each GPU gets as many heads; heads of keys and values are shared out, or each is kept by as many GPUs."""
    return heads % parallel == 0 and (kv_heads % parallel == 0 if kv_heads >= parallel else parallel % kv_heads == 0)
