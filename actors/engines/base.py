"""What a scoring engine is: how it is built, what it answers, and the environment that it needs.

T tokens of a row, N targets of it, K top-k, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from actors.config.models import EngineConfig
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


class TeacherEngine(Protocol):
    """Something that scores rows. Not thread-safe; one at a time in a process."""

    vocab_size: int
    """V, the width of the logits."""

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        """Return the scores of each example, in their order, with exactly K tokens besides the target."""
        ...

    def close(self) -> None:
        """Give the device back."""
        ...


class EngineDied(RuntimeError):
    """The engine's own process is gone while the replica lives; another replica can take over."""


EngineFactory = Callable[[TeacherSpec], TeacherEngine]


def engine_environment(engine: EngineConfig) -> dict[str, str]:
    """Return the environment variables that must be set before the process of an engine imports anything."""
    environment = {"OMP_NUM_THREADS": str(max(1, int(engine.cpus))), "TOKENIZERS_PARALLELISM": "false"}
    if engine.kind == "vllm":
        environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        if engine.tensor_parallel == 1:
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the replica's own process is enough for one device
        if not engine.gpu:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # replicas share cores; binding would stack them on the same
            environment["TORCHDYNAMO_DISABLE"] = "1"  # else the first scoring call waits for a C++ compiler
    return environment


def require_top_k(top_k: int, vocab_size: int) -> None:
    """Raise if K leaves no room for the target in a vocabulary of V tokens."""
    if top_k > vocab_size - 1:
        raise ValueError(
            f"scores.top_k {top_k} is too large: a vocabulary of {vocab_size} tokens has {vocab_size - 1} besides the target; "
            f"scores.top_k {vocab_size - 1} would do"
        )


def scores_from_candidates(
    example: Example, target_logprob: np.ndarray, candidate_ids: np.ndarray, candidate_logprobs: np.ndarray
) -> TeacherScores:
    """Turn the K+1 most likely tokens of each target's distribution into scores with exactly K non-target tokens.

    The target is dropped where it is among the candidates, the least likely candidate where it is not.

    Args:
        example: the row, with N targets.
        target_logprob: [N], log-probability of each target.
        candidate_ids: [N, K+1], the most likely tokens, most likely first.
        candidate_logprobs: [N, K+1], their log-probabilities, descending.
    """
    is_target = candidate_ids == example.targets[:, None]  # [N, K+1]
    last = candidate_ids.shape[1] - 1
    dropped = np.where(is_target.any(axis=1), is_target.argmax(axis=1), last)
    kept = np.arange(last + 1) != dropped[:, None]  # [N, K+1], K True in each row
    target = target_logprob.astype(np.float32)
    topk_logprobs = candidate_logprobs[kept].reshape(-1, last).astype(np.float32)
    topk_ids = candidate_ids[kept].reshape(-1, last).astype(np.int32)
    return TeacherScores(example.key, target, topk_ids, topk_logprobs, tail_logmass(target, topk_logprobs))
