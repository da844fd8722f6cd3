"""Sampling by vLLM. T tokens of a prompt, N of a response, C candidates."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError

from actors.engines.base import EngineDied
from actors.engines.vllm_arguments import engine_arguments
from actors.engines.vllm_limits import require_build_for
from actors.model_source import ModelSource
from actors.records import NO_TOKEN
from actors.rollouts.base import Prompt, Response, SamplerSpec, most_tokens, seed_of

SPARE = 8  # tokens noted beyond C where some may not be named; a place with more of those has fewer candidates


class VllmSampler:
    """Writes through one in-process vLLM engine, many responses at a time.

    ``engine_environment`` must be in the environment before this module is imported.
    """

    def __init__(self, spec: SamplerSpec) -> None:
        engine = spec.engine
        require_build_for(engine.gpu, current_platform.device_type)
        self._noted = spec.candidates + SPARE if spec.candidates and spec.ids_below is not None else spec.candidates
        self._llm = LLM(
            max_model_len=spec.longest_prompt + spec.sampling.max_new_tokens,
            max_logprobs=self._noted,
            worker_extension_cls="actors.engines.vllm_patches.FreshHead",
            **engine_arguments(engine, spec.model),
        )
        self._spec = spec
        self._vocab_size: int = self._llm.llm_engine.model_config.get_vocab_size()
        unnamed = spec.ids_below is not None and spec.ids_below < self._vocab_size
        self._allowed = list(range(spec.ids_below)) if spec.ids_below is not None and unnamed else None

    def sample(self, prompts: Sequence[Prompt]) -> list[Response]:
        """Return a response to each prompt, in their order."""
        inputs = [{"prompt_token_ids": prompt.token_ids.tolist()} for prompt in prompts]
        try:
            outputs = self._llm.generate(inputs, [self._parameters(prompt) for prompt in prompts], use_tqdm=False)
        except EngineDeadError as error:
            raise EngineDied(f"the vLLM engine died: {error}") from error
        return [self._response(output.outputs[0]) for output in outputs]

    def load(self, model: ModelSource) -> None:
        """Write by other weights of the same model from now on, which stand in a folder of their own.

        Raises:
            RuntimeError: if texts that the old weights have read stay in the prefix cache.
        """
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": model.name})
        self._llm.collective_rpc("refresh_head")
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache, so that old weights' keys and values would be read on")

    def logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """Return the log-probability of each token of a text but the first, float32 [T-1]."""
        parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        (output,) = self._llm.generate({"prompt_token_ids": token_ids.tolist()}, parameters, use_tqdm=False)
        at_tokens = zip(token_ids[1:].tolist(), output.prompt_logprobs[1:], strict=True)
        return np.array([at_token[token].logprob for token, at_token in at_tokens], np.float32)

    def close(self) -> None:
        """Shut the engine down and give its memory back."""
        self._llm.llm_engine.engine_core.shutdown()

    def _parameters(self, prompt: Prompt) -> SamplingParams:
        sampling = self._spec.sampling
        return SamplingParams(
            max_tokens=most_tokens(sampling, prompt),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed_of(sampling, prompt),
            ignore_eos=True,  # of the model's own; where responses end is settled for the run
            stop_token_ids=list(self._spec.ends),
            allowed_token_ids=self._allowed,
            logprobs=min(self._noted, self._vocab_size),
            flat_logprobs=True,
            detokenize=False,
        )

    def _response(self, output: Any) -> Response:
        token_ids = np.array(output.token_ids, np.int32)
        noted = np.array(output.logprobs.token_ids, np.int32).reshape(len(token_ids), -1)  # the drawn one, then the most likely
        logprobs = np.array(output.logprobs.logprobs, np.float32).reshape(noted.shape)
        assert (noted[:, 0] == token_ids).all(), "vLLM begins with the token that was drawn"
        candidates = first_named(noted[:, 1:], self._spec) if self._spec.candidates else None
        return Response(token_ids, logprobs[:, 0], int(token_ids[-1]) in self._spec.ends, candidates)


def first_named(likeliest: np.ndarray, spec: SamplerSpec) -> np.ndarray:
    """Return the first C tokens below ``ids_below`` of each row [N, M], int32 [N, C]; ``NO_TOKEN`` where there are fewer."""
    named = likeliest < (spec.ids_below if spec.ids_below is not None else np.iinfo(np.int32).max)
    first = np.argsort(~named, axis=1, kind="stable")
    ids = np.take_along_axis(np.where(named, likeliest, np.int32(NO_TOKEN)), first, axis=1)[:, : spec.candidates]
    missing = spec.candidates - ids.shape[1]
    return np.pad(ids, ((0, 0), (0, missing)), constant_values=NO_TOKEN).astype(np.int32)
