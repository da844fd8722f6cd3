"""What a writer holds most likely where it drew a token: both samplers, against plain forward passes."""

import importlib.util
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
from actors.records import NO_TOKEN
from actors.rollouts.base import Prompt, Response, SamplerSpec, Sampling, written_row
from actors.rollouts.build import build_sampler
from actors.rollouts.transformers_sampler import most_likely
from actors.rollouts.workers import RolloutWorker, Weights, require_sound
from tests.worlds import VOCAB, tiny_llama

CANDIDATES, MOST, BELOW, ENDS = 7, 9, 60, (0, 3, 5)
ENGINES = {
    "transformers": EngineConfig(kind="transformers", dtype="float32"),
    "vllm": EngineConfig(kind="vllm", dtype="float32", kv_cache_mib=16, rows_per_call=5),
}

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose heads have size 32, which vLLM's kernels for CPUs know."""
    return tiny_llama(tmp_path_factory.mktemp("writer") / "model", seed=4, hidden_size=64, layers=2)


def spec_of(folder: Path, kind: str = "transformers", ids_below: int | None = BELOW, **sampling: float) -> SamplerSpec:
    how = replace(Sampling(MOST, seed=7), **sampling)  # type: ignore[arg-type]
    return SamplerSpec(ENGINES[kind], ModelSource(str(folder)), how, ENDS, 12, ids_below, CANDIDATES)


def prompts(rows: int = 6) -> list[Prompt]:
    generator = np.random.default_rng(5)
    return [Prompt(generator.integers(0, VOCAB, 1 + row).astype(np.int32), row) for row in range(rows)]


def assert_most_likely(folder: Path, prompt: Prompt, response: Response, below: int, spare: int) -> None:
    """Each place against one forward pass over the whole: the likeliest, but of those that may be named, if ``spare`` reach."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    whole = np.concatenate([prompt.token_ids, response.token_ids]).astype(np.int64)
    with torch.inference_mode():
        logits = model(torch.from_numpy(whole)[None]).logits[0].double()
    assert response.candidates is not None and response.candidates.dtype == np.int32
    assert response.candidates.shape == (len(response.token_ids), CANDIDATES)
    for place, found in enumerate(response.candidates.tolist(), start=len(prompt.token_ids)):
        order = logits[place - 1].argsort(descending=True).tolist()
        wanted = [token for token in order[: CANDIDATES + spare] if token < below][:CANDIDATES]
        assert found == wanted + [NO_TOKEN] * (CANDIDATES - len(wanted))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.3, "top_p": 0.4}, {"temperature": 0.0}])
def test_transformers_notes_the_most_likely_tokens_however_it_draws(folder: Path, sampling: dict[str, float]) -> None:
    sampler = build_sampler(spec_of(folder, **sampling))
    for prompt, response in zip(prompts(), sampler.sample(prompts()), strict=True):
        assert_most_likely(folder, prompt, response, BELOW, spare=VOCAB)


@needs_vllm
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("ids_below", [None, BELOW])
def test_vllm_notes_them_too(local_ray: None, folder: Path, ids_below: int | None) -> None:
    spec = spec_of(folder, "vllm", ids_below, temperature=0.3, top_p=0.4)
    environment = {"env_vars": engine_environment(ENGINES["vllm"])}
    actor: Any = ray.remote(RolloutWorker).options(num_cpus=1, runtime_env=environment).remote(spec, None)
    written = ray.get(actor.write.remote(Weights(0, spec.model), prompts()), timeout=300)
    ray.get(actor.close.remote(), timeout=60)
    ray.kill(actor)
    for prompt, response in zip(prompts(), written.responses, strict=True):
        assert_most_likely(folder, prompt, response, ids_below or VOCAB, spare=0 if ids_below is None else 8)


def test_none_are_noted_where_none_are_wanted(folder: Path) -> None:
    (response,) = build_sampler(replace(spec_of(folder), candidates=0)).sample(prompts(1))
    assert response.candidates is None and written_row(prompts(1)[0], response).candidates is None


def test_candidates_travel_with_the_row_and_are_no_part_of_its_key(folder: Path) -> None:
    (response,) = build_sampler(spec_of(folder)).sample(prompts(1))
    row = written_row(prompts(1)[0], response)
    assert row.candidates is response.candidates
    assert row.key == written_row(prompts(1)[0], replace(response, candidates=None)).key


def test_a_vocabulary_may_be_smaller_than_what_is_wanted() -> None:
    assert most_likely(torch.tensor([0.1, 0.7, 0.2]).log(), 5).tolist() == [1, 2, 0, NO_TOKEN, NO_TOKEN]


@pytest.mark.parametrize(("candidates", "message"), [
    (None, "has none of the most likely tokens; [2, 7] were asked for"),
    (np.zeros((2, 3), np.int32), "has those of the shape [2, 3] of the most likely tokens; [2, 7] were asked for"),
    (np.full((2, 7), BELOW, np.int32), "a most likely token is 60; all are from 0 and below 60"),
    (np.full((2, 7), -2, np.int32), "a most likely token is -2; all are from 0 and below 60"),
])  # fmt: skip
def test_candidates_that_no_sampler_notes_are_refused(folder: Path, candidates: np.ndarray | None, message: str) -> None:
    response = Response(np.array([1, 2], np.int32), np.float32([-1, -1]), False, candidates)
    with pytest.raises(ValueError) as raised:
        require_sound(prompts(3)[2], response, spec_of(folder))
    assert str(raised.value).startswith("row 2: ") and message in str(raised.value)
