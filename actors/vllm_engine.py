"""vLLM as a scoring engine; the only file that imports it. L tokens of a prompt, N targets, K top-k.

Prompt log-probabilities are asked for K+1 tokens: vLLM computes an array [L-1, K+2] with the prompt's own next token in
column 0 and the K+1 most likely ones after it; row i speaks of token i+1. Left alone it then turns each entry into a Python
object. ``_keep_arrays`` replaces that one step; where the installed version does not have it in the expected form (the form
of 0.9 to 0.32), or a probe comes out differently, the public ``flat_logprobs`` results (0.15 and later) are read instead.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import vllm
from vllm import LLM, SamplingParams
from vllm.v1.engine import logprobs as vllm_logprobs
from vllm.v1.engine.exceptions import EngineDeadError

from actors.records import Example, TeacherScores
from actors.teacher import EngineDied, TeacherSpec, require_top_k, scores_from_candidates

TOKENS_PER_STEP = 8192
PROBE_TOKENS = 5


@dataclass(frozen=True, slots=True)
class PromptArrays:
    """The prompt log-probabilities of one prompt as the engine computed them."""

    token_ids: np.ndarray
    """int [L-1, K+2], column 0 the prompt's own next token."""

    logprobs: np.ndarray
    """float32 [L-1, K+2]."""


class VllmEngine:
    """Scores rows through the prompt log-probabilities of one in-process vLLM engine.

    ``engine_environment`` must be in the environment before this module is imported.
    """

    def __init__(self, spec: TeacherSpec) -> None:
        engine = spec.engine
        device_arguments: dict[str, Any] = (
            {"tensor_parallel_size": engine.tensor_parallel, "gpu_memory_utilization": engine.gpu_memory_utilization}
            if engine.gpu
            else {"kv_cache_memory_bytes": engine.kv_cache_mib << 20, "enforce_eager": True}
        )
        if engine.tensor_parallel > 1:
            device_arguments["distributed_executor_backend"] = "mp"  # the replica holds all devices of one node itself
        self._llm = LLM(
            model=spec.model.name,
            revision=spec.model.revision,
            trust_remote_code=spec.model.trust_remote_code,
            dtype=engine.dtype,
            max_model_len=spec.longest_row + 1,  # vLLM always generates one token
            max_num_batched_tokens=max(TOKENS_PER_STEP, spec.longest_row + 1),
            max_num_seqs=engine.rows_per_call,
            max_logprobs=spec.top_k + 1,
            logprobs_mode="raw_logprobs",
            enable_prefix_caching=False,  # log-probabilities of cached positions are never computed
            skip_tokenizer_init=True,
            seed=0,
            **device_arguments,
        )
        self.vocab_size: int = self._llm.llm_engine.model_config.get_vocab_size()
        require_top_k(spec.top_k, self.vocab_size)
        self._top_k = spec.top_k
        self.reads_arrays = False
        """Whether results come as the engine's arrays; otherwise through the public flat_logprobs."""
        self.reads_arrays = _keep_arrays() and self._probe(min(PROBE_TOKENS, spec.longest_row))

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        """Return the scores of each example, in their order."""
        results = self._prompt_arrays([example.token_ids.tolist() for example in examples])
        return [self._scores(example, arrays) for example, arrays in zip(examples, results, strict=True)]

    def close(self) -> None:
        """Shut the engine down and give its memory back."""
        self._llm.llm_engine.engine_core.shutdown()

    def _scores(self, example: Example, arrays: PromptArrays) -> TeacherScores:
        rows = example.target_positions - 1
        token_ids, logprobs = arrays.token_ids[rows], arrays.logprobs[rows]  # [N, K+2]
        if not np.array_equal(token_ids[:, 0], example.targets):
            raise RuntimeError(
                f"row {example.row}: vLLM {vllm.__version__} returned log-probabilities of other tokens than the prompt's; "
                "use a version from 0.15 to 0.32, or teacher.engine.kind transformers"
            )
        return scores_from_candidates(example, logprobs[:, 0], token_ids[:, 1:], logprobs[:, 1:])

    def _prompt_arrays(self, prompts: Sequence[list[int]]) -> list[PromptArrays]:
        parameters = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            prompt_logprobs=self._top_k + 1,
            flat_logprobs=not self.reads_arrays,
        )
        try:
            outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        except EngineDeadError as error:
            raise EngineDied(f"the vLLM engine died: {error}") from error
        return [self._read(output.prompt_logprobs) for output in outputs]

    def _read(self, result: Any) -> PromptArrays:
        if self.reads_arrays:
            chunks = result[1:]  # entry 0 stands for the first token, which nothing predicts
            return PromptArrays(
                np.concatenate([chunk.token_ids for chunk in chunks]), np.concatenate([chunk.logprobs for chunk in chunks])
            )
        width = self._top_k + 2
        return PromptArrays(
            np.asarray(result.token_ids).reshape(-1, width), np.asarray(result.logprobs, dtype=np.float32).reshape(-1, width)
        )

    def _probe(self, tokens: int) -> bool:
        """Whether arrays come as expected: the shape is right and the values are those of ``flat_logprobs``."""
        if tokens < 2:
            return False
        prompt = [token % self.vocab_size for token in range(tokens)]
        (flat,) = self._prompt_arrays([prompt])
        result = self._llm.generate(
            [{"prompt_token_ids": prompt}],
            SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=self._top_k + 1),
            use_tqdm=False,
        )[0].prompt_logprobs
        return (
            len(result) == 2
            and isinstance(result[1], PromptArrays)
            and result[1].token_ids.shape == (tokens - 1, self._top_k + 2)
            and np.array_equal(result[1].token_ids[:, 0], flat.token_ids[:, 0])
            and np.allclose(result[1].logprobs, flat.logprobs, atol=1e-3)
        )


def _keep_arrays() -> bool:
    """Make vLLM's frontend keep prompt log-probabilities as arrays; return whether this version allows it.

    Requests with ``flat_logprobs`` and arrays of an unexpected form go the way they always went.
    """
    processor: Any = getattr(vllm_logprobs, "LogprobsProcessor", None)
    original = getattr(processor, "_update_prompt_logprobs", None)
    if original is None or list(inspect.signature(original).parameters) != ["self", "prompt_logprobs_tensors"]:
        return False
    if getattr(original, "keeps_arrays", False):
        return True

    def keep(self: Any, prompt_logprobs_tensors: Any) -> None:
        token_ids, logprobs = prompt_logprobs_tensors[:2]
        expected = logprobs.ndim == 2 and token_ids.shape == logprobs.shape and logprobs.shape[1] == self.num_prompt_logprobs + 1
        if expected and type(self.prompt_logprobs) is list:
            self.prompt_logprobs.append(PromptArrays(token_ids.cpu().numpy(), logprobs.cpu().float().numpy()))
        else:
            original(self, prompt_logprobs_tensors)

    # The signature above stays that of the original, so that a second engine of this process finds it again.
    keep.keeps_arrays = True  # type: ignore[attr-defined]
    processor._update_prompt_logprobs = keep
    return True
