"""vLLM as a scoring engine. L tokens of a prompt, N targets, K top-k, M candidates: K+1, and some to spare for those not named.

Prompt log-probabilities are asked for M tokens: vLLM computes an array [L-1, M+1] with the prompt's own next token in
column 0 and the M most likely ones after it; row i speaks of token i+1. Two patches of its insides (``vllm_patches``) make that
cheap. Where the installed version does not take one, or a probe comes out differently, the public way is gone: ``flat_logprobs``
(0.15 and later) is read, and all rows are computed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import vllm
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError

from actors.engines.base import EngineDied, TeacherSpec, candidates_of, require_top_k, scores_from_candidates
from actors.engines.vllm_arguments import engine_arguments
from actors.engines.vllm_limits import require_build_for
from actors.engines.vllm_patches import ROWS_ARGUMENT, PromptArrays, TargetRows, keep_arrays
from actors.records import Example, TeacherScores

TOKENS_PER_STEP = 8192
SPARE = 8  # candidates asked for beyond K+1 where some tokens are not to be named; a row that needs more is asked again
PROBE_TOKENS = 5
PROBE_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}  # nats; products of other shapes round differently


class VllmEngine:
    """Scores rows through the prompt log-probabilities of one in-process vLLM engine.

    ``engine_environment`` must be in the environment before this module is imported.
    """

    def __init__(self, spec: TeacherSpec) -> None:
        engine = spec.engine
        require_build_for(engine.gpu, current_platform.device_type)
        self._llm = LLM(
            max_model_len=spec.longest_row + 1,  # vLLM always generates one token
            max_num_batched_tokens=max(TOKENS_PER_STEP, spec.longest_row + 1),
            max_logprobs=spec.top_k + 1 if spec.ids_below is None else -1,  # -1: as many as there are tokens
            worker_extension_cls=f"{TargetRows.__module__}.{TargetRows.__qualname__}",
            enable_prefix_caching=False,  # log-probabilities of cached positions are never computed
            **engine_arguments(engine, spec.model),
        )
        self.vocab_size: int = self._llm.llm_engine.model_config.get_vocab_size()
        require_top_k(spec.top_k, self.vocab_size, spec.ids_below)
        self._spec = spec
        self._candidates = candidates_of(spec, self.vocab_size, SPARE)
        self._tolerance = PROBE_TOLERANCES[engine.dtype]
        self.reads_arrays = False
        """Whether results come as the engine's arrays; otherwise through the public flat_logprobs."""
        self.reads_arrays = keep_arrays() and self._probe_arrays(min(PROBE_TOKENS, spec.longest_row))
        self.skips_prompts = False
        """Whether only the rows that predict targets are multiplied by the output head."""
        self.skips_prompts = self.reads_arrays and self._take_target_rows() and self._probe_rows(spec.longest_row)
        name = f"vLLM {vllm.__version__}, {engine.dtype}"
        self.way = f"{name}; only rows that predict targets go through the output head" if self.skips_prompts else (
            f"slow: {name} is of an unknown form, so that all rows of prompts go through the output head"
            + ("" if self.reads_arrays else ", and results come as Python objects")
        )  # fmt: skip

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        """Return the scores of each example, in their order."""
        scores = self._score(examples, self._candidates)
        if short := [index for index, found in enumerate(scores) if found is None]:
            again = self._score([examples[index] for index in short], candidates_of(self._spec, self.vocab_size))
            for index, found in zip(short, again, strict=True):
                scores[index] = found
        return [found for found in scores if found is not None]

    def close(self) -> None:
        """Shut the engine down and give its memory back."""
        self._llm.llm_engine.engine_core.shutdown()

    def _score(self, examples: Sequence[Example], candidates: int) -> list[TeacherScores | None]:
        """Return the scores of each example from so many candidates; None where these are too few."""
        results = self._prompt_arrays(
            [example.token_ids.tolist() for example in examples],
            [(example.target_positions - 1).tolist() for example in examples] if self.skips_prompts else None,
            candidates,
        )
        return [self._scores(example, arrays) for example, arrays in zip(examples, results, strict=True)]

    def _scores(self, example: Example, arrays: PromptArrays) -> TeacherScores | None:
        token_ids, logprobs = arrays.token_ids, arrays.logprobs
        if not self.skips_prompts:
            rows = example.target_positions - 1
            token_ids, logprobs = token_ids[rows], logprobs[rows]  # [N, M+1]
        if not np.array_equal(token_ids[:, 0], example.targets):
            raise RuntimeError(
                f"row {example.row}: vLLM {vllm.__version__} returned log-probabilities of other tokens than the prompt's; "
                "use a version from 0.15 to 0.32, or teacher.engine.kind transformers"
            )
        return scores_from_candidates(example, logprobs[:, 0], token_ids[:, 1:], logprobs[:, 1:], self._spec)

    def _prompt_arrays(
        self, prompts: Sequence[list[int]], rows: Sequence[list[int]] | None = None, candidates: int | None = None
    ) -> list[PromptArrays]:
        candidates = candidates or self._candidates
        parameters = [
            SamplingParams(
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
                prompt_logprobs=candidates,
                flat_logprobs=not self.reads_arrays,
                extra_args=None if rows is None else {ROWS_ARGUMENT: rows[index]},
            )
            for index in range(len(prompts))
        ]
        try:
            outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        except EngineDeadError as error:
            raise EngineDied(f"the vLLM engine died: {error}") from error
        return [self._read(output.prompt_logprobs, candidates + 1) for output in outputs]

    def _read(self, result: Any, width: int) -> PromptArrays:
        if self.reads_arrays:
            chunks = result[1:]  # entry 0 stands for the first token, which nothing predicts
            return PromptArrays(
                np.concatenate([chunk.token_ids for chunk in chunks]), np.concatenate([chunk.logprobs for chunk in chunks])
            )
        return PromptArrays(
            np.asarray(result.token_ids).reshape(-1, width), np.asarray(result.logprobs, dtype=np.float32).reshape(-1, width)
        )

    def _take_target_rows(self) -> bool:
        return all(self._llm.collective_rpc("take_target_rows"))

    def _probe_rows(self, longest_row: int) -> bool:
        """Whether the rows asked for come alone and are those of the whole prompt, for rows of several lengths at once."""
        lengths = [length for length in (2, 3, PROBE_TOKENS, 2 * PROBE_TOKENS) if length <= longest_row]
        if not lengths:
            return False
        prompts = [[(token + length) % self.vocab_size for token in range(length)] for length in lengths]
        rows = [list(range(length // 2 - 1, length - 1)) for length in lengths]
        return all(
            some.token_ids.shape == (len(wanted), self._candidates + 1)
            and np.array_equal(some.token_ids[:, 0], whole.token_ids[wanted, 0])
            and np.allclose(some.logprobs, whole.logprobs[wanted], atol=self._tolerance)
            for some, whole, wanted in zip(self._prompt_arrays(prompts, rows), self._prompt_arrays(prompts), rows, strict=True)
        )

    def _probe_arrays(self, tokens: int) -> bool:
        """Whether arrays come as expected: the shape is right and the values are those of ``flat_logprobs``."""
        if tokens < 2:
            return False
        prompt = [token % self.vocab_size for token in range(tokens)]
        (flat,) = self._prompt_arrays([prompt])
        result = self._llm.generate(
            [{"prompt_token_ids": prompt}],
            SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=self._candidates),
            use_tqdm=False,
        )[0].prompt_logprobs
        return (
            len(result) == 2
            and isinstance(result[1], PromptArrays)
            and result[1].token_ids.shape == (tokens - 1, self._candidates + 1)
            and np.array_equal(result[1].token_ids[:, 0], flat.token_ids[:, 0])
            and np.allclose(result[1].logprobs, flat.logprobs, atol=self._tolerance)
        )
