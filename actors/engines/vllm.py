"""vLLM as a scoring engine; the only file that imports it. L tokens of a prompt, N targets, K top-k.

Prompt log-probabilities are asked for K+1 tokens: vLLM computes an array [L-1, K+2] with the prompt's own next token in
column 0 and the K+1 most likely ones after it; row i speaks of token i+1. Left alone it then turns each entry into a Python
object. ``_keep_arrays`` replaces that one step; where the installed version does not have it in the expected form (the form
of 0.9 to 0.32), or a probe comes out differently, the public ``flat_logprobs`` results (0.15 and later) are read instead.

vLLM also multiplies every position of the prompt by the output head, one request at a time, ranks every target and normalises
the whole vocabulary. ``TargetRows`` does so for the rows that predict targets alone, those of all requests together; where the
installed version's model runner is not of the expected form, or a probe comes out differently, all rows are computed.
"""

import inspect
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.v1.engine import logprobs as vllm_logprobs
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.outputs import LogprobsTensors

from actors.engines.base import EngineDied, TeacherSpec, require_top_k, scores_from_candidates
from actors.records import Example, TeacherScores

TOKENS_PER_STEP = 8192
PROBE_TOKENS = 5
PROBE_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}  # nats; products of other shapes round differently
ROWS_ARGUMENT = "atkd_target_rows"  # of a request's extra_args: which rows of its prompt are wanted, ascending
ROWS_AT_ONCE = {"cpu": 128}  # few enough for their logits to stay in the cache
ROWS_AT_ONCE_ELSEWHERE = 1024


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
            load_format="safetensors",  # other weights are pickles, which can run code
            max_model_len=spec.longest_row + 1,  # vLLM always generates one token
            max_num_batched_tokens=max(TOKENS_PER_STEP, spec.longest_row + 1),
            max_num_seqs=engine.rows_per_call,
            max_logprobs=spec.top_k + 1,
            logprobs_mode="raw_logprobs",
            worker_extension_cls=f"{TargetRows.__module__}.{TargetRows.__qualname__}",
            enable_prefix_caching=False,  # log-probabilities of cached positions are never computed
            skip_tokenizer_init=True,
            seed=0,
            **device_arguments,
        )
        self.vocab_size: int = self._llm.llm_engine.model_config.get_vocab_size()
        require_top_k(spec.top_k, self.vocab_size)
        self._top_k = spec.top_k
        self._tolerance = PROBE_TOLERANCES[engine.dtype]
        self.reads_arrays = False
        """Whether results come as the engine's arrays; otherwise through the public flat_logprobs."""
        self.reads_arrays = _keep_arrays() and self._probe_arrays(min(PROBE_TOKENS, spec.longest_row))
        self.skips_prompts = False
        """Whether only the rows that predict targets are multiplied by the output head."""
        self.skips_prompts = self.reads_arrays and self._take_target_rows() and self._probe_rows(spec.longest_row)

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        """Return the scores of each example, in their order."""
        results = self._prompt_arrays(
            [example.token_ids.tolist() for example in examples],
            [(example.target_positions - 1).tolist() for example in examples] if self.skips_prompts else None,
        )
        return [self._scores(example, arrays) for example, arrays in zip(examples, results, strict=True)]

    def close(self) -> None:
        """Shut the engine down and give its memory back."""
        self._llm.llm_engine.engine_core.shutdown()

    def _scores(self, example: Example, arrays: PromptArrays) -> TeacherScores:
        token_ids, logprobs = arrays.token_ids, arrays.logprobs
        if not self.skips_prompts:
            rows = example.target_positions - 1
            token_ids, logprobs = token_ids[rows], logprobs[rows]  # [N, K+2]
        if not np.array_equal(token_ids[:, 0], example.targets):
            raise RuntimeError(
                f"row {example.row}: vLLM {vllm.__version__} returned log-probabilities of other tokens than the prompt's; "
                "use a version from 0.15 to 0.32, or teacher.engine.kind transformers"
            )
        return scores_from_candidates(example, logprobs[:, 0], token_ids[:, 1:], logprobs[:, 1:])

    def _prompt_arrays(self, prompts: Sequence[list[int]], rows: Sequence[list[int]] | None = None) -> list[PromptArrays]:
        parameters = [
            SamplingParams(
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
                prompt_logprobs=self._top_k + 1,
                flat_logprobs=not self.reads_arrays,
                extra_args=None if rows is None else {ROWS_ARGUMENT: rows[index]},
            )
            for index in range(len(prompts))
        ]
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
            some.token_ids.shape == (len(wanted), self._top_k + 2)
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
            SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=self._top_k + 1),
            use_tqdm=False,
        )[0].prompt_logprobs
        return (
            len(result) == 2
            and isinstance(result[1], PromptArrays)
            and result[1].token_ids.shape == (tokens - 1, self._top_k + 2)
            and np.array_equal(result[1].token_ids[:, 0], flat.token_ids[:, 0])
            and np.allclose(result[1].logprobs, flat.logprobs, atol=self._tolerance)
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


class TargetRows:
    """Becomes part of vLLM's worker, beside the model runner: prompt log-probabilities of the wanted rows alone."""

    model_runner: Any

    def take_target_rows(self) -> bool:
        """Replace the runner's way to prompt log-probabilities; return whether this version allows it."""
        runner = self.model_runner
        original = getattr(runner, "_get_prompt_logprobs_dict", None)
        if original is None or list(inspect.signature(original).parameters) != ["hidden_states", "num_scheduled_tokens"]:
            return False
        needed = ("num_prompt_logprobs", "requests", "input_batch", "query_start_loc", "model")
        if not all(hasattr(runner, name) for name in needed):
            return False

        def prompt_logprobs(hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
            asked = [(runner.requests[name].sampling_params.extra_args or {}) for name in runner.num_prompt_logprobs]
            if all(ROWS_ARGUMENT in arguments for arguments in asked):
                return _logprobs_of_rows(runner, hidden_states, num_scheduled_tokens)
            return dict(original(hidden_states, num_scheduled_tokens))

        runner._get_prompt_logprobs_dict = prompt_logprobs
        return True


@dataclass(frozen=True, slots=True)
class _Part:
    """What this step computes of one request."""

    result: Any
    """LogprobsTensors on the CPU, [N, K+2], filled step by step."""

    first: int
    """Which of the N rows comes first."""

    hidden: torch.Tensor
    """[n, H]"""

    next_tokens: list[int]
    """The prompt's own next token after each of the n rows."""


def _logprobs_of_rows(runner: Any, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
    """Return the results of the requests whose prompts are complete with this step, as the runner's own method would."""
    finished, parts = {}, []
    for name, top_k in list(runner.num_prompt_logprobs.items()):
        scheduled = num_scheduled_tokens.get(name)
        if scheduled is None:  # put off while its prompt was being read
            continue
        request = runner.requests[name]
        prompt, rows = request.prompt_token_ids, request.sampling_params.extra_args[ROWS_ARGUMENT]
        result = request.in_progress_prompt_logprobs_cpu
        if result is None:
            result = LogprobsTensors.empty_cpu(len(rows), top_k + 1)
            request.in_progress_prompt_logprobs_cpu = result
        start = request.num_computed_tokens
        offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]]) - start
        first, last = bisect_left(rows, start), bisect_left(rows, start + scheduled)
        if wanted := rows[first:last]:
            parts.append(
                _Part(result, first, hidden_states[[offset + row for row in wanted]], [prompt[row + 1] for row in wanted])
            )
        if start + scheduled >= len(prompt):
            finished[name] = result
            del runner.num_prompt_logprobs[name]
            request.in_progress_prompt_logprobs_cpu = None
    if parts:
        _fill(runner, parts)
    return finished


def _fill(runner: Any, parts: Sequence[_Part]) -> None:
    """Compute the rows of all requests together, and write them where they belong."""
    hidden = torch.cat([part.hidden for part in parts])
    targets = torch.tensor([token for part in parts for token in part.next_tokens], device=hidden.device)
    top_k = parts[0].result.logprobs.shape[1] - 1
    at_once = ROWS_AT_ONCE.get(hidden.device.type, ROWS_AT_ONCE_ELSEWHERE)
    chunks = []
    for rows, tokens in zip(hidden.split(at_once), targets.split(at_once), strict=True):
        logits = runner.model.compute_logits(rows).float()
        normalizer = logits.logsumexp(dim=1, keepdim=True)
        best = logits.topk(top_k, dim=1)
        logprobs = torch.cat([logits.gather(1, tokens[:, None]), best.values], dim=1) - normalizer
        chunks.append((torch.cat([tokens[:, None], best.indices], dim=1).cpu(), logprobs.cpu()))
    token_ids, logprobs = (torch.cat(columns) for columns in zip(*chunks, strict=True))
    begin = 0
    for part in parts:
        here, there = slice(begin, begin + len(part.next_tokens)), slice(part.first, part.first + len(part.next_tokens))
        part.result.logprob_token_ids[there].copy_(token_ids[here])
        part.result.logprobs[there].copy_(logprobs[here])
        begin = here.stop
