"""The patch of vLLM's second model runner, which no CPU runs, against a runner with its names and tensors."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed")

from actors.engines.vllm_patches import ROWS_ARGUMENT, WantedRows, take_target_rows_v2  # noqa: E402  # after the check above

HIDDEN, VOCAB, CANDIDATES = 8, 50, 5
HEAD = torch.randn(HIDDEN, VOCAB, generator=torch.Generator().manual_seed(0))


class Worker:
    """What vLLM's own worker of prompt log-probabilities keeps of requests."""

    def __init__(self) -> None:
        self.uses_prompt_logprobs = np.zeros(4, dtype=bool)
        self.num_prompt_logprobs = np.zeros(4, dtype=np.int32)
        self.own_calls = 0

    def add_request(self, req_id: str, req_idx: int, sampling_params: Any) -> None:
        self.uses_prompt_logprobs[req_idx] = sampling_params.prompt_logprobs is not None
        self.num_prompt_logprobs[req_idx] = sampling_params.prompt_logprobs or 0

    def remove_request(self, req_id: str) -> None:
        pass

    def compute_prompt_logprobs(
        self, logits_fn: Any, hidden_states: Any, input_batch: Any, all_token_ids: Any, num_computed_tokens: Any, prompt_lens: Any
    ) -> dict[str, Any]:
        self.own_calls += 1
        return {}


def states_of(prompt: list[int]) -> torch.Tensor:
    """Hidden states [L, H] of a prompt, each its own."""
    return torch.stack(
        [torch.randn(HIDDEN, generator=torch.Generator().manual_seed(100 * token + at)) for at, token in enumerate(prompt)]
    )


def step(
    worker: Worker, prompts: dict[str, list[int]], slots: dict[str, int], pieces: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    """Let the worker see a step in which each named prompt is read from its first number up to its second."""
    tokens = torch.zeros(4, 32, dtype=torch.int32)
    lengths = np.zeros(4, dtype=np.int32)
    for name, prompt in prompts.items():
        tokens[slots[name], : len(prompt)] = torch.tensor(prompt)
        lengths[slots[name]] = len(prompt)
    scheduled = np.array([stop - start for start, stop in pieces.values()])
    batch = SimpleNamespace(
        req_ids=list(pieces), idx_mapping_np=np.array([slots[name] for name in pieces]), num_scheduled_tokens=scheduled,
        num_computed_prefill_tokens_np=np.array([start for start, _ in pieces.values()]),
        query_start_loc_np=np.concatenate([[0], scheduled.cumsum()]),
    )  # fmt: skip
    hidden = torch.cat([states_of([*prompts[name], 0])[start:stop] for name, (start, stop) in pieces.items()])
    return worker.compute_prompt_logprobs(lambda states: states @ HEAD, hidden, batch, tokens, None, lengths)


def asked(rows: list[int] | None) -> Any:
    return SimpleNamespace(prompt_logprobs=CANDIDATES, extra_args=None if rows is None else {ROWS_ARGUMENT: rows})


def assert_right(found: Any, prompt: list[int], rows: list[int]) -> None:
    """Each row against its logits, computed by itself in float64."""
    assert found.logprobs.shape == (len(rows), CANDIDATES + 1)
    for index, row in enumerate(rows):
        logprobs = (states_of(prompt)[row].double() @ HEAD.double()).log_softmax(0)
        best = logprobs.topk(CANDIDATES)
        assert found.logprob_token_ids[index].tolist() == [prompt[row + 1], *best.indices.tolist()]
        torch.testing.assert_close(
            found.logprobs[index].double(), torch.cat([logprobs[[prompt[row + 1]]], best.values]), atol=1e-5, rtol=0
        )


def test_the_rows_of_prompts_read_in_pieces_beside_others() -> None:
    worker = Worker()
    assert take_target_rows_v2(worker)
    prompts = {"a": list(range(3, 15)), "b": [9, 4, 40, 7, 21], "c": [1, 2, 3]}
    slots, rows = {"a": 2, "b": 0, "c": 1}, {"a": [0, 3, 4, 10], "b": [1, 2, 3], "c": [0, 1]}
    for name in ("a", "b"):
        worker.add_request(name, slots[name], asked(rows[name]))
    assert step(worker, prompts, slots, {"a": (0, 4), "b": (0, 3)}) == {}, "neither prompt is at its end"
    found = step(worker, prompts, slots, {"b": (3, 5), "a": (4, 9)})
    assert list(found) == ["b"]
    assert_right(found["b"], prompts["b"], rows["b"])
    worker.add_request("c", slots["c"], asked(rows["c"]))
    found = step(worker, prompts, slots, {"a": (9, 12), "b": (5, 6), "c": (0, 3)})
    assert set(found) == {"a", "c"} and worker.own_calls == 0
    for name, result in found.items():
        assert_right(result, prompts[name], rows[name])
    for name in prompts:
        worker.remove_request(name)
    worker.add_request("c", slots["a"], asked([1]))  # the name and the slot of one before
    assert_right(step(worker, prompts, {**slots, "c": 2}, {"c": (0, 3)})["c"], prompts["c"], [1])


def test_candidates_follow_the_most_likely_tokens_of_their_own_rows() -> None:
    worker, prompts, slots = Worker(), {"a": list(range(3, 11)), "b": [9, 4, 40, 7, 21]}, {"a": 2, "b": 0}
    assert take_target_rows_v2(worker)
    wanted = WantedRows([1, 4, 6], np.array([[7, 8], [0, 49], [30, 2]]))
    more = SimpleNamespace(prompt_logprobs=CANDIDATES + wanted.extra_columns, extra_args=wanted.arguments())
    worker.add_request("a", slots["a"], more)
    worker.add_request("b", slots["b"], asked([2, 3]))  # without candidates, in the same step
    assert set(step(worker, prompts, slots, {"a": (0, 5), "b": (0, 5)})) == {"b"}
    found = step(worker, prompts, slots, {"a": (5, 8)})["a"]
    assert found.logprobs.shape == (3, 1 + CANDIDATES + 2)
    for index, (row, candidates) in enumerate(zip(wanted.rows, wanted.candidates.tolist(), strict=True)):
        logprobs = (states_of(prompts["a"])[row].double() @ HEAD.double()).log_softmax(0)
        best = logprobs.topk(CANDIDATES).indices.tolist()
        ids = [prompts["a"][row + 1], *best, *candidates]
        assert found.logprob_token_ids[index].tolist() == ids
        torch.testing.assert_close(found.logprobs[index].double(), logprobs[ids], atol=1e-5, rtol=0)


def test_hidden_states_follow_in_columns_of_their_own() -> None:
    worker, prompts, slots = Worker(), {"a": list(range(3, 11)), "b": [9, 4, 40, 7, 21]}, {"a": 2, "b": 0}
    assert take_target_rows_v2(worker)
    wanted = WantedRows([1, 4, 6], hidden_size=HIDDEN)
    more = SimpleNamespace(prompt_logprobs=CANDIDATES + wanted.extra_columns, extra_args=wanted.arguments())
    worker.add_request("a", slots["a"], more)
    worker.add_request("b", slots["b"], asked([2, 3]))
    assert_right(step(worker, prompts, slots, {"a": (0, 5), "b": (0, 5)})["b"], prompts["b"], [2, 3])
    found = step(worker, prompts, slots, {"a": (5, 8)})["a"]
    assert found.logprobs.shape == found.logprob_token_ids.shape == (3, 1 + CANDIDATES + HIDDEN)
    torch.testing.assert_close(found.logprobs[:, 1 + CANDIDATES :], states_of(prompts["a"])[wanted.rows])
    for index, row in enumerate(wanted.rows):
        logprobs = (states_of(prompts["a"])[row].double() @ HEAD.double()).log_softmax(0)
        ids = [prompts["a"][row + 1], *logprobs.topk(CANDIDATES).indices.tolist()]
        assert found.logprob_token_ids[index, : 1 + CANDIDATES].tolist() == ids


def test_a_step_with_a_request_that_names_no_rows_goes_vllms_own_way() -> None:
    worker = Worker()
    assert take_target_rows_v2(worker)
    worker.add_request("a", 0, asked([0]))
    worker.add_request("b", 1, asked(None))
    assert step(worker, {"a": [1, 2, 3], "b": [4, 5]}, {"a": 0, "b": 1}, {"a": (0, 3), "b": (0, 2)}) == {}
    assert worker.own_calls == 1


def test_a_worker_of_another_form_is_left_as_it_is() -> None:
    class Other(Worker):
        def compute_prompt_logprobs(self, logits_fn: Any, hidden_states: Any) -> dict[str, Any]:  # type: ignore[override]
            return {}

    other = Other()
    assert not take_target_rows_v2(other) and "add_request" not in vars(other)
    assert not take_target_rows_v2(SimpleNamespace())
