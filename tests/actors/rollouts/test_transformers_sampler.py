"""Drawing against a slow reading in plain Python, and the sampler against plain forward passes. V vocabulary."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.config.models import EngineConfig
from actors.model_source import ModelSource
from actors.rollouts.base import Prompt, Response, SamplerSpec, Sampling, written_row
from actors.rollouts.build import build_sampler
from actors.rollouts.transformers_sampler import draw
from tests.worlds import VOCAB, tiny_llama

ENDS, MOST = (0, 3, 5, 7, 11, 13, 17, 19), 9


def distribution(logprobs: list[float], temperature: float, top_p: float) -> list[tuple[int, float]]:
    """Tokens that may be drawn, most likely first, with what each is drawn with: term by term."""
    weights = [math.exp(logprob / temperature) for logprob in logprobs]
    masses = [(token, weight / math.fsum(weights)) for token, weight in enumerate(weights)]
    kept: list[tuple[int, float]] = []
    for token, mass in sorted(masses, key=lambda one: (-one[1], one[0])):
        if math.fsum(before for _, before in kept) >= top_p:
            break
        kept.append((token, mass))
    return [(token, mass / math.fsum(one for _, one in kept)) for token, mass in kept]


def drawn_slowly(logprobs: list[float], temperature: float, top_p: float, number: float) -> int:
    """The token at which the masses, added up, exceed a number from 0 to 1."""
    passed = 0.0
    for token, mass in distribution(logprobs, temperature, top_p):
        passed += mass
        if passed > number:
            return token
    raise AssertionError("masses add up to 1")


def some_logprobs(seed: int, vocab_size: int) -> torch.Tensor:
    return torch.from_numpy(2 * np.random.default_rng(seed).normal(size=vocab_size)).log_softmax(dim=0)


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_a_token_is_drawn_where_the_masses_added_up_exceed_the_number(temperature: float, top_p: float) -> None:
    logprobs = some_logprobs(seed=1, vocab_size=40)
    for seed in range(300):
        number = np.random.default_rng(seed).random()
        found = draw(logprobs, Sampling(1, temperature, top_p), np.random.default_rng(seed))
        assert found == drawn_slowly(logprobs.tolist(), temperature, top_p, number)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8), (1.5, 0.6)])
def test_tokens_come_as_often_as_they_are_likely(temperature: float, top_p: float) -> None:
    logprobs, draws, generator = some_logprobs(seed=2, vocab_size=8), 8000, np.random.default_rng(0)
    counts = Counter(draw(logprobs, Sampling(1, temperature, top_p), generator) for _ in range(draws))
    likely = dict(distribution(logprobs.tolist(), temperature, top_p))
    assert set(counts) <= set(likely)
    for token, mass in likely.items():
        assert abs(counts[token] / draws - mass) <= 4 * math.sqrt(mass * (1 - mass) / draws)


def test_temperature_0_takes_the_most_likely_and_equals_take_the_first() -> None:
    for seed in range(20):
        logprobs = some_logprobs(seed, vocab_size=30)
        assert draw(logprobs, Sampling(1, temperature=0.0), np.random.default_rng(seed)) == int(logprobs.argmax())
    equal = torch.tensor([0.2, 0.4, 0.4], dtype=torch.float64).log()
    assert draw(equal, Sampling(1, temperature=0.0), np.random.default_rng(0)) == 1
    assert {draw(equal, Sampling(1, 1.0, top_p=0.3), np.random.default_rng(seed)) for seed in range(20)} == {1}


# ---- the sampler


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("writer") / "model", seed=4, layers=2)


def spec_of(folder: Path, ids_below: int | None = None, **sampling: float) -> SamplerSpec:
    engine = EngineConfig(kind="transformers", dtype="float32")
    how = replace(Sampling(MOST, seed=7), **sampling)  # type: ignore[arg-type]
    return SamplerSpec(engine, ModelSource(str(folder)), how, ENDS, longest_prompt=12, ids_below=ids_below)


def prompts(rows: int, samples: int = 1) -> list[Prompt]:
    generator = np.random.default_rng(5)
    texts = [generator.integers(0, VOCAB, int(generator.integers(1, 13))).astype(np.int32) for _ in range(rows)]
    return [Prompt(text, row, sample) for row, text in enumerate(texts) for sample in range(samples)]


def sampled(spec: SamplerSpec, asked: list[Prompt]) -> list[Response]:
    sampler = build_sampler(spec)
    try:
        return sampler.sample(asked)
    finally:
        sampler.close()


def same(found: Response, wanted: Response) -> bool:
    return found.token_ids.tolist() == wanted.token_ids.tolist() and found.ended == wanted.ended


def plain_logprobs(folder: Path, prompt: Prompt, response: Response) -> np.ndarray:
    """Of each token of a response, its log-probability by one forward pass over the whole, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    whole = np.concatenate([prompt.token_ids, response.token_ids]).astype(np.int64)
    with torch.inference_mode():
        logprobs = model(torch.from_numpy(whole)[None]).logits[0].log_softmax(dim=-1)
    first = len(prompt.token_ids)
    return np.array([float(logprobs[place - 1, whole[place]]) for place in range(first, len(whole))])


def test_a_response_ends_at_its_end_or_is_cut(folder: Path) -> None:
    found = sampled(spec_of(folder), prompts(20, samples=2))
    assert {response.ended for response in found} == {True, False}
    for response in found:
        *before, last = response.token_ids.tolist()
        assert not set(before) & set(ENDS)
        assert (last in ENDS) == response.ended
        assert len(response.token_ids) <= MOST
        assert response.ended or len(response.token_ids) == MOST
        assert response.token_ids.dtype == np.int32 and response.logprobs.dtype == np.float32


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}])
def test_log_probabilities_are_those_of_a_plain_forward_pass_whatever_the_temperature(
    folder: Path, sampling: dict[str, float]
) -> None:
    asked = prompts(6)
    for prompt, response in zip(asked, sampled(spec_of(folder, ids_below=60, **sampling), asked), strict=True):
        np.testing.assert_allclose(response.logprobs, plain_logprobs(folder, prompt, response), atol=1e-5)


def test_temperature_0_writes_what_a_plain_loop_writes(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = prompts(8)
    for prompt, response in zip(asked, sampled(spec_of(folder, temperature=0.0), asked), strict=True):
        tokens = prompt.token_ids.tolist()
        while len(tokens) < len(prompt.token_ids) + MOST and tokens[len(prompt.token_ids) :][-1:] not in [[end] for end in ENDS]:
            with torch.inference_mode():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert response.token_ids.tolist() == tokens[len(prompt.token_ids) :]


def test_the_seed_makes_a_response_whatever_is_sampled_beside_it(folder: Path) -> None:
    asked = prompts(6, samples=2)
    together = sampled(spec_of(folder), asked)
    backwards = sampled(spec_of(folder), asked[::-1])[::-1]
    alone = [sampled(spec_of(folder), [prompt])[0] for prompt in asked]
    assert all(same(one, other) for one, other in zip(together, backwards, strict=True))
    assert all(same(one, other) for one, other in zip(together, alone, strict=True))
    others = sampled(spec_of(folder, seed=8), asked)
    assert sum(same(one, other) for one, other in zip(together, others, strict=True)) < len(asked) / 2
    first, second = together[::2], together[1::2]
    assert sum(same(one, other) for one, other in zip(first, second, strict=True)) < len(first) / 2, "samples of a row differ"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_is_drawn_from_the_bound_on(folder: Path, temperature: float) -> None:
    asked = prompts(12)
    free = sampled(spec_of(folder, temperature=temperature), asked)
    bound = sampled(spec_of(folder, ids_below=30, temperature=temperature), asked)
    assert max(int(response.token_ids.max()) for response in free) >= 30
    assert max(int(response.token_ids.max()) for response in bound) < 30


def test_a_written_row_is_the_prompt_and_the_response_whose_tokens_are_its_targets() -> None:
    prompt = Prompt(np.array([4, 5, 6], np.int32), row=11, sample=2)
    row = written_row(prompt, Response(np.array([7, 0], np.int32), np.array([-1.0, -2.0], np.float32), ended=True))
    assert row.token_ids.tolist() == [4, 5, 6, 7, 0] and row.targets.tolist() == [7, 0]
    assert row.last_prompt.tolist() == [4, 5, 6] and row.row == 11
