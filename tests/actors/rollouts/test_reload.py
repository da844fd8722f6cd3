"""vLLM computes with the weights that it was given last: layers, embeddings, head, and nothing that was read before."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from actors.config.models import EngineConfig
from actors.model_source import ModelSource
from actors.rollouts.base import Prompt, Response, SamplerSpec, Sampling
from actors.rollouts.transformers_sampler import TransformersSampler
from actors.rollouts.weights import Proof
from actors.rollouts.workers import RolloutWorkers, Weights
from tests.worlds import tiny_llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

ENGINE = EngineConfig(kind="vllm", dtype="float32", kv_cache_mib=16, cpus=0.5)
PLAIN = EngineConfig(kind="transformers", dtype="float32")
ROW = np.arange(1, 25, dtype=np.int32)  # longer than a block of the prefix cache
PROMPTS = [Prompt(ROW[: 20 + row], row, step=1) for row in range(4)]


def reference(model: ModelSource) -> TransformersSampler:
    return TransformersSampler(SamplerSpec(PLAIN, model, Sampling(8, seed=5), (0,), 24))


def largest_error(model: ModelSource, responses: list[Response]) -> float:
    """How far the log-probabilities of what was drawn lie from those of a plain forward pass."""
    plain = reference(model)
    errors = []
    for prompt, response in zip(PROMPTS, responses, strict=True):
        logprobs = plain.logprobs(np.concatenate([prompt.token_ids, response.token_ids]))
        errors.append(np.abs(logprobs[len(prompt.token_ids) - 1 :] - response.logprobs).max())
    return float(max(errors))


@pytest.mark.parametrize("tied", [True, False])
def test_new_weights_are_what_vllm_computes_with(tmp_path: Path, local_ray: None, tied: bool) -> None:
    def model(seed: int) -> ModelSource:
        return ModelSource(str(tiny_llama(tmp_path / f"model-{seed}", seed, hidden_size=64, layers=2, tied=tied)))

    first, second = model(1), model(2)
    (tmp_path / "logs").mkdir()
    with RolloutWorkers(SamplerSpec(ENGINE, first, Sampling(8, seed=5), (0,), 24), 1, tmp_path / "logs") as workers:
        before = workers.write(Weights(0, first), PROMPTS)
        after = workers.write(Weights(3, second, Proof(ROW, reference(second).logprobs(ROW))), PROMPTS)
        back = workers.write(Weights(4, first, Proof(ROW, reference(first).logprobs(ROW))), PROMPTS)
    assert largest_error(first, before.responses) < 1e-4
    assert largest_error(second, after.responses) < 1e-4 < 0.1 < largest_error(first, after.responses)
    assert after.hand_over is not None and after.hand_over.largest_gap < 1e-4
    assert [one.token_ids.tolist() for one in back.responses] == [one.token_ids.tolist() for one in before.responses]
