"""vLLM's CPU build as a sampler, against plain forward passes of transformers."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from actors.config.models import EngineConfig
from actors.engines.base import engine_environment
from actors.model_source import ModelSource
from actors.rollouts.base import Prompt, Response, SamplerSpec, Sampling
from actors.rollouts.build import build_sampler
from tests.worlds import VOCAB, tiny_llama

ENDS, MOST, LONGEST = (0, 3, 5, 7, 11, 13, 17, 19), 9, 12
ENGINE = EngineConfig(kind="vllm", dtype="float32", kv_cache_mib=16, rows_per_call=5)
BOUND = 30

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.ray, needs_vllm]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose heads have size 32, which vLLM's kernels for CPUs know."""
    return tiny_llama(tmp_path_factory.mktemp("writer") / "model", seed=4, hidden_size=64, layers=2)


class Changing:
    """A process with one vLLM engine, whose way of sampling can be changed between calls."""

    def __init__(self, spec: SamplerSpec) -> None:
        self._sampler: Any = build_sampler(spec)
        self._spec = spec

    def sample(self, sampling: Sampling, prompts: list[Prompt]) -> list[Response]:
        """Sample as ``sampling`` says."""
        self._sampler._spec = replace(self._spec, sampling=sampling)
        return self._sampler.sample(prompts)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Give the device back."""
        self._sampler.close()


def actor_of(folder: Path, ids_below: int | None) -> Any:
    spec = SamplerSpec(ENGINE, ModelSource(str(folder)), Sampling(MOST, seed=7), ENDS, LONGEST, ids_below)
    return ray.remote(Changing).options(num_cpus=1, runtime_env={"env_vars": engine_environment(ENGINE)}).remote(spec)


@pytest.fixture(scope="module")
def free(local_ray: None, folder: Path) -> Iterator[Any]:
    """An engine that may draw all tokens."""
    actor = actor_of(folder, ids_below=None)
    yield actor
    ray.get(actor.close.remote(), timeout=60)
    ray.kill(actor)


def sampled(actor: Any, prompts: list[Prompt], **sampling: float) -> list[Response]:
    found: list[Response] = ray.get(
        actor.sample.remote(replace(Sampling(MOST, seed=7), **sampling), prompts), timeout=300  # type: ignore[arg-type]
    )
    return found


def prompts(rows: int, samples: int = 1) -> list[Prompt]:
    generator = np.random.default_rng(5)
    texts = [generator.integers(0, VOCAB, int(generator.integers(1, LONGEST + 1))).astype(np.int32) for _ in range(rows)]
    return [Prompt(text, row, sample) for row, text in enumerate(texts) for sample in range(samples)]


def plain_logprobs(folder: Path, prompt: Prompt, response: Response) -> np.ndarray:
    """Of each token of a response, its log-probability by one forward pass over the whole, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    whole = np.concatenate([prompt.token_ids, response.token_ids]).astype(np.int64)
    with torch.inference_mode():
        logprobs = model(torch.from_numpy(whole)[None]).logits[0].log_softmax(dim=-1)
    first = len(prompt.token_ids)
    return np.array([float(logprobs[place - 1, whole[place]]) for place in range(first, len(whole))])


def texts(responses: list[Response]) -> list[list[int]]:
    return [response.token_ids.tolist() for response in responses]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}])
def test_log_probabilities_are_those_of_a_plain_forward_pass_whatever_the_temperature(
    free: Any, folder: Path, sampling: dict[str, float]
) -> None:
    asked = prompts(7)
    found = sampled(free, asked, **sampling)
    for prompt, response in zip(asked, found, strict=True):
        np.testing.assert_allclose(response.logprobs, plain_logprobs(folder, prompt, response), atol=1e-4)


def test_a_response_ends_at_its_end_or_is_cut(free: Any) -> None:
    found = sampled(free, prompts(20, samples=2))
    assert {response.ended for response in found} == {True, False}
    for response in found:
        *before, last = response.token_ids.tolist()
        assert not set(before) & set(ENDS)
        assert (last in ENDS) == response.ended
        assert response.ended or len(response.token_ids) == MOST
        assert response.token_ids.dtype == np.int32 and response.logprobs.dtype == np.float32


def test_the_seed_makes_a_response_whatever_is_sampled_beside_it(free: Any) -> None:
    asked = prompts(8, samples=2)
    together = texts(sampled(free, asked))
    assert texts(sampled(free, asked[::-1]))[::-1] == together
    assert [texts(sampled(free, [prompt]))[0] for prompt in asked] == together
    others = texts(sampled(free, asked, seed=8))
    assert sum(one == other for one, other in zip(together, others, strict=True)) < len(asked) / 2


def test_a_response_is_gone_on_with_token_by_token_as_far_as_is_asked(free: Any, folder: Path) -> None:
    asked = prompts(8)
    begun = sampled(free, [replace(prompt, most=3) for prompt in asked])
    assert texts(begun) == [text[:3] for text in texts(sampled(free, asked))], "the same draws, cut sooner"
    unfinished = [(prompt, one) for prompt, one in zip(asked, begun, strict=True) if not one.ended]
    on = [
        replace(prompt, token_ids=np.concatenate([prompt.token_ids, one.token_ids]), written=3, most=2)
        for prompt, one in unfinished
    ]
    found = sampled(free, on)
    assert unfinished and all(1 <= len(response.token_ids) <= 2 for response in found)
    for prompt, response in zip(on, found, strict=True):
        np.testing.assert_allclose(response.logprobs, plain_logprobs(folder, prompt, response), atol=1e-4)
    assert texts(sampled(free, [replace(prompt, written=0) for prompt in on])) != texts(found), "what goes on draws anew"


def test_temperature_0_writes_what_transformers_writes(free: Any, folder: Path) -> None:
    asked = prompts(8)
    plainly = EngineConfig(kind="transformers", dtype="float32")
    plain = SamplerSpec(plainly, ModelSource(str(folder)), Sampling(MOST, temperature=0.0), ENDS, LONGEST)
    assert texts(sampled(free, asked, temperature=0.0)) == texts(build_sampler(plain).sample(asked))


def test_no_token_is_drawn_from_the_bound_on(free: Any, local_ray: None, folder: Path) -> None:
    asked = prompts(12)
    bound = actor_of(folder, ids_below=BOUND)
    for temperature in (0.0, 1.0):
        assert max(max(text) for text in texts(sampled(free, asked, temperature=temperature))) >= BOUND
        found = sampled(bound, asked, temperature=temperature)
        assert max(max(text) for text in texts(found)) < BOUND
        for prompt, response in zip(asked[:3], found, strict=False):  # of the whole vocabulary, though not all may be drawn
            np.testing.assert_allclose(response.logprobs, plain_logprobs(folder, prompt, response), atol=1e-4)
    ray.get(bound.close.remote(), timeout=60)
    ray.kill(bound)


def test_tokens_come_as_often_as_they_are_likely(free: Any, folder: Path) -> None:
    """The first token of many responses to one prompt: how often each of the likeliest comes."""
    text, many = prompts(1)[0].token_ids, 2000
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        likely = model(torch.from_numpy(text.astype(np.int64))[None]).logits[0, -1].double().softmax(dim=0)
    found = sampled(free, [Prompt(text, 0, sample) for sample in range(many)], max_new_tokens=1)
    counts = np.bincount([response.token_ids[0] for response in found], minlength=VOCAB)
    for token in likely.argsort(descending=True)[:10].tolist():
        mass = float(likely[token])
        assert abs(counts[token] / many - mass) <= 4 * (mass * (1 - mass) / many) ** 0.5
