"""What a scoring engine is: how it is built, what it answers, and the environment that it needs.

T tokens of a row, N targets of it, K top-k, C candidates that a row brings, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from actors.config.models import EngineConfig, SimilarTokens
from actors.config.rollouts import Wire
from actors.environment import task_environment
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores, tail_logmass


@dataclass(frozen=True, slots=True)
class TeacherSpec:
    """All that an engine is built from."""

    engine: EngineConfig
    """How the teacher is served."""
    model: ModelSource
    """The teacher; a folder must be one that every node sees."""
    top_k: int
    """K: tokens other than the target that are kept for each target."""
    longest_row: int
    """Tokens of the longest row that will be scored."""
    ids_below: int | None = None
    """Name no token from this id on: the tokenizer or the student has none. Their mass stays in the tail. None names all."""
    wire: Wire = "top_k"
    """What scores hold besides the K most likely tokens."""
    label_words: tuple[tuple[int, ...], ...] = ()
    """Token ids of each label's word, where a causal language model tells labels apart; empty elsewhere."""
    similar_tokens: SimilarTokens | None = None
    """Where neighbours of each target are taught, and nothing that a model predicts."""
    temperature: float = 1.0
    """By what the logits of labels are divided; of language models 1."""


class TeacherEngine(Protocol):
    """Something that scores rows. Not thread-safe; one at a time in a process."""

    vocab_size: int
    """V, the width of the logits."""

    way: str
    """How it comes to its scores, in words; what is slower than it might be begins with ``slow:``."""

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        """Return the scores of each example, in their order, with exactly K tokens, below ``ids_below``, besides the target.

        Those of a row with candidates hold these too, in K + C columns (``with_candidates``).
        """
        ...

    def close(self) -> None:
        """Give the device back."""
        ...


class EngineDied(RuntimeError):
    """The engine's own process is gone while the replica lives; another replica can take over."""


EngineFactory = Callable[[TeacherSpec], TeacherEngine]


def engine_environment(engine: EngineConfig) -> dict[str, str]:
    """Return the environment variables that must be set before the process of an engine imports anything."""
    environment = {**task_environment(engine.cpus, engine.gpu), "TOKENIZERS_PARALLELISM": "false"}
    if engine.kind == "vllm":
        environment |= {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_NO_USAGE_STATS": "1"}
        if engine.tensor_parallel == 1:
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the replica's own process is enough for one device
        if not engine.gpu:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # replicas share cores; binding would stack them on the same
            environment["TORCHDYNAMO_DISABLE"] = "1"  # else the first scoring call waits for a C++ compiler
    return environment


def require_top_k(top_k: int, vocab_size: int, ids_below: int | None = None) -> None:
    """Raise if K leaves no room for the target among the tokens that are named, of a vocabulary of V."""
    vocab_size = min(vocab_size, ids_below or vocab_size)
    if top_k > vocab_size - 1:
        raise ValueError(
            f"scores.top_k {top_k} is too large: a vocabulary of {vocab_size} tokens has {vocab_size - 1} besides the target; "
            f"scores.top_k {vocab_size - 1} would do"
        )


def likeliest_asked(spec: TeacherSpec, vocab_size: int, spare: int | None = None) -> int:
    """Return how many of the most likely tokens are asked for so that K are left without the target and ids that are not named.

    ``spare`` of those that are not named are reckoned with; None reckons with all there are, and is always enough.
    """
    unnamed = max(0, vocab_size - (spec.ids_below or vocab_size))
    return spec.top_k + 1 + (unnamed if spare is None else min(unnamed, spare))


def scores_from_likeliest(
    example: Example, target_logprob: np.ndarray, likeliest_ids: np.ndarray, likeliest_logprobs: np.ndarray, spec: TeacherSpec
) -> TeacherScores | None:
    """Turn the M most likely tokens of each target's distribution into scores with exactly K non-target tokens.

    Args:
        example: the row, with N targets.
        target_logprob: [N], log-probability of each target.
        likeliest_ids: [N, M], the most likely tokens, most likely first; M above K.
        likeliest_logprobs: [N, M], their log-probabilities, descending.
        spec: K, and from which id on no token is named.

    Returns:
        The scores; None where fewer than K of those of a target can be named, so that more are to be asked for.
    """
    named = likeliest_ids != example.targets[:, None]  # [N, M]
    if spec.ids_below is not None:
        named &= likeliest_ids < spec.ids_below
    kept = named & (named.cumsum(axis=1) <= spec.top_k)  # [N, M], K True in each row
    if not (kept.sum(axis=1) == spec.top_k).all():
        return None
    target = target_logprob.astype(np.float32)
    topk_logprobs = likeliest_logprobs[kept].reshape(-1, spec.top_k).astype(np.float32)
    topk_ids = likeliest_ids[kept].reshape(-1, spec.top_k).astype(np.int32)
    return TeacherScores(example.key, target, topk_ids, topk_logprobs, tail_logmass(target, topk_logprobs))
