"""Patches of vLLM's insides, each of which looks first whether the installed version takes it.

L tokens of a prompt, N rows of it that are wanted, n of those in one step, M most likely tokens, C candidates, H hidden size.

``keep_arrays``: vLLM turns each prompt log-probability into a Python object; ours keeps its arrays. It looks for the form of
0.9 to 0.32. ``TargetRows``: vLLM multiplies every position of the prompt by the output head, one request at a time, ranks every
target and normalises the whole vocabulary; ours does so for the rows that predict targets alone, those of all requests together,
and tells the log-probabilities of given candidates too, or the hidden states, in further columns.
``FreshHead``: reloading weights makes each layer's packed copy anew, but not that of a head whose matrix is the embeddings'.
"""

import inspect
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.engine import logprobs as vllm_logprobs
from vllm.v1.outputs import LogprobsTensors

ROWS_ARGUMENT = "atkd_target_rows"  # of a request's extra_args: which rows of its prompt are wanted, ascending
CANDIDATES_ARGUMENT = "atkd_candidates"  # and of which C tokens besides the most likely ones, for each of these rows
HIDDEN_ARGUMENT = "atkd_hidden_size"  # H, if the rows' last hidden states are wanted too
ROWS_AT_ONCE = {"cpu": 128}  # few enough for their logits to stay in the cache
ROWS_AT_ONCE_ELSEWHERE = 1024

LogitsOf = Callable[[torch.Tensor], torch.Tensor]
"""From hidden states [n, H] to logits [n, V]."""


@dataclass(frozen=True, slots=True)
class PromptArrays:
    """The prompt log-probabilities of one prompt as the engine computed them."""

    token_ids: np.ndarray
    """int [L-1, 1+M], column 0 the prompt's own next token; [N, 1+M+C+H] of rows that were asked for, the last H zero."""

    logprobs: np.ndarray
    """float32, as many; the last H are no log-probabilities, but the hidden states."""


@dataclass(frozen=True, slots=True)
class WantedRows:
    """What is wanted of a prompt."""

    rows: list[int]
    """N rows, ascending; row i speaks of token i+1."""

    candidates: np.ndarray | None = None
    """int [N, C], tokens whose log-probabilities are wanted besides those of the most likely ones."""

    hidden_size: int = 0
    """H, if the last hidden states are wanted; else 0."""

    @property
    def extra_columns(self) -> int:
        """Columns beside those of the most likely tokens."""
        return self.hidden_size + (0 if self.candidates is None else self.candidates.shape[1])

    def arguments(self) -> dict[str, Any]:
        """Return the request's extra_args, of types that travel to processes."""
        candidates = {} if self.candidates is None else {CANDIDATES_ARGUMENT: self.candidates.tolist()}
        return {ROWS_ARGUMENT: self.rows, HIDDEN_ARGUMENT: self.hidden_size, **candidates}


def keep_arrays() -> bool:
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


class FreshHead:
    """Becomes part of vLLM's worker: makes the output head compute with the weights that were loaded last."""

    model_runner: Any

    def refresh_head(self) -> None:
        """Have embeddings and head packed anew; on CPUs a head tied to the embeddings keeps its old copy otherwise."""
        for module in self.model_runner.get_model().modules():
            method: Any = getattr(module, "quant_method", None)
            if hasattr(module, "num_embeddings_padded") and hasattr(method, "process_weights_after_loading"):
                method.process_weights_after_loading(module)


class TargetRows:
    """Becomes part of vLLM's worker, beside the model runner: prompt log-probabilities of the wanted rows alone."""

    model_runner: Any

    def take_target_rows(self) -> bool:
        """Replace the runner's way to prompt log-probabilities; return whether this version allows it."""
        runner = self.model_runner
        if (worker := getattr(runner, "prompt_logprobs_worker", None)) is not None:
            return take_target_rows_v2(worker)
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
    """LogprobsTensors on the CPU, [N, 1+M+C+H], filled step by step."""

    first: int
    """Which of the N rows comes first."""

    hidden: torch.Tensor
    """[n, H]"""

    next_tokens: list[int]
    """The prompt's own next token after each of the n rows."""

    candidates: list[list[int]]
    """[n, C]; empty where none are wanted."""

    hidden_size: int
    """H where the hidden states are wanted; else 0."""

    @property
    def widths(self) -> tuple[int, int, int]:
        """M, C, and H where it is wanted."""
        given = len(self.candidates[0]) if self.candidates else 0
        return self.result.logprobs.shape[1] - 1 - given - self.hidden_size, given, self.hidden_size


def _logprobs_of_rows(runner: Any, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
    """Return the results of the requests whose prompts are complete with this step, as the runner's own method would."""
    finished, parts = {}, []
    for name, columns in list(runner.num_prompt_logprobs.items()):
        scheduled = num_scheduled_tokens.get(name)
        if scheduled is None:  # put off while its prompt was being read
            continue
        request = runner.requests[name]
        prompt, arguments = request.prompt_token_ids, request.sampling_params.extra_args
        rows = arguments[ROWS_ARGUMENT]
        result = request.in_progress_prompt_logprobs_cpu
        if result is None:
            result = LogprobsTensors.empty_cpu(len(rows), columns + 1)
            request.in_progress_prompt_logprobs_cpu = result
        start = request.num_computed_tokens
        offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]]) - start
        first, last = bisect_left(rows, start), bisect_left(rows, start + scheduled)
        if wanted := rows[first:last]:
            hidden, next_tokens = hidden_states[[offset + row for row in wanted]], [prompt[row + 1] for row in wanted]
            parts.append(_Part(result, first, hidden, next_tokens, *_extras(arguments, first, last)))
        if start + scheduled >= len(prompt):
            finished[name] = result
            del runner.num_prompt_logprobs[name]
            request.in_progress_prompt_logprobs_cpu = None
    if parts:
        _fill(runner.model.compute_logits, parts)
    return finished


V2_ARGUMENTS = ["logits_fn", "hidden_states", "input_batch", "all_token_ids", "num_computed_tokens", "prompt_lens"]


def take_target_rows_v2(worker: Any) -> bool:
    """Do the same for vLLM's second model runner, whose prompt log-probabilities are made by a worker of their own.

    vLLM takes that runner where Triton is, as on GPUs. Return whether this version allows it.
    """
    add, remove, compute = (getattr(worker, name, None) for name in ("add_request", "remove_request", "compute_prompt_logprobs"))
    if add is None or remove is None or compute is None or list(inspect.signature(compute).parameters) != V2_ARGUMENTS:
        return False
    arguments_of: dict[str, dict[str, Any]] = {}
    results: dict[str, Any] = {}

    def add_request(req_id: str, req_idx: int, sampling_params: Any) -> None:
        if ROWS_ARGUMENT in (sampling_params.extra_args or {}):
            arguments_of[req_id] = sampling_params.extra_args
        add(req_id, req_idx, sampling_params)

    def remove_request(req_id: str) -> None:
        arguments_of.pop(req_id, None)
        results.pop(req_id, None)
        remove(req_id)

    def compute_prompt_logprobs(
        logits_fn: LogitsOf, hidden_states: torch.Tensor, input_batch: Any, all_token_ids: torch.Tensor,
        num_computed_tokens: torch.Tensor, prompt_lens: np.ndarray,
    ) -> dict[str, Any]:  # fmt: skip
        slots = input_batch.idx_mapping_np
        asking = [index for index, slot in enumerate(slots) if worker.uses_prompt_logprobs[slot]]
        if not all(input_batch.req_ids[index] in arguments_of for index in asking):
            return dict(compute(logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens))
        finished, parts = {}, []
        for index in asking:
            name, slot, start = input_batch.req_ids[index], slots[index], int(input_batch.num_computed_prefill_tokens_np[index])
            stop, length = start + int(input_batch.num_scheduled_tokens[index]), int(prompt_lens[slot])
            if start >= length:  # the prompt was read before
                continue
            rows = arguments_of[name][ROWS_ARGUMENT]
            if name not in results:
                results[name] = LogprobsTensors.empty_cpu(len(rows), int(worker.num_prompt_logprobs[slot]) + 1)
            first, last = bisect_left(rows, start), bisect_left(rows, stop)
            if wanted := rows[first:last]:
                offset = int(input_batch.query_start_loc_np[index]) - start
                next_tokens = all_token_ids[slot, [row + 1 for row in wanted]].tolist()
                hidden, extras = hidden_states[[offset + row for row in wanted]], _extras(arguments_of[name], first, last)
                parts.append(_Part(results[name], first, hidden, next_tokens, *extras))
            if stop >= length:
                finished[name] = results.pop(name)
        if parts:
            _fill(logits_fn, parts)
        return finished

    worker.add_request, worker.remove_request = add_request, remove_request
    worker.compute_prompt_logprobs = compute_prompt_logprobs
    return True


def _extras(arguments: dict[str, Any], first: int, last: int) -> tuple[list[list[int]], int]:
    """Return the candidates of some of a request's rows, and H where their hidden states are wanted."""
    return arguments.get(CANDIDATES_ARGUMENT, [])[first:last], arguments.get(HIDDEN_ARGUMENT, 0)


def _fill(logits_of: LogitsOf, parts: Sequence[_Part]) -> None:
    """Compute the rows of all requests, those of equal widths together, and write them where they belong."""
    for widths in {part.widths for part in parts}:
        _fill_alike(logits_of, [part for part in parts if part.widths == widths], *widths)


def _fill_alike(logits_of: LogitsOf, parts: Sequence[_Part], likeliest: int, given: int, hidden_size: int) -> None:
    """Fill the columns of each row: the prompt's own next token, the M most likely ones, the C that were given, the states."""
    hidden = torch.cat([part.hidden for part in parts])
    named = [[token] for part in parts for token in part.next_tokens]
    if given:
        candidates = [row for part in parts for row in part.candidates]
        named = [[*first, *others] for first, others in zip(named, candidates, strict=True)]
    wanted = torch.tensor(named, device=hidden.device)  # [n, 1+C]
    at_once = ROWS_AT_ONCE.get(hidden.device.type, ROWS_AT_ONCE_ELSEWHERE)
    chunks = []
    for rows, tokens in zip(hidden.split(at_once), wanted.split(at_once), strict=True):
        logits = logits_of(rows).float()
        normalizer = logits.logsumexp(dim=1, keepdim=True)
        best, at_tokens = logits.topk(likeliest, dim=1), logits.gather(1, tokens)
        token_ids = torch.cat([tokens[:, :1], best.indices, tokens[:, 1:]], dim=1)
        logprobs = torch.cat([at_tokens[:, :1], best.values, at_tokens[:, 1:]], dim=1) - normalizer
        chunks.append((token_ids.cpu(), logprobs.cpu()))
    token_ids, logprobs = (torch.cat(columns) for columns in zip(*chunks, strict=True))
    if hidden_size:
        token_ids = torch.cat([token_ids, token_ids.new_zeros(len(token_ids), hidden_size)], dim=1)
        logprobs = torch.cat([logprobs, hidden.float().cpu()], dim=1)
    begin = 0
    for part in parts:
        here, there = slice(begin, begin + len(part.next_tokens)), slice(part.first, part.first + len(part.next_tokens))
        part.result.logprob_token_ids[there].copy_(token_ids[here])
        part.result.logprobs[there].copy_(logprobs[here])
        begin = here.stop
