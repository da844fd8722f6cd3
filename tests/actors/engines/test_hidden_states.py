"""The teacher's last hidden states and its head alone: both engines, against plain forward passes."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

from actors.config.models import EngineConfig
from actors.dataloader.hidden_states import bits_of, require_right_head, states_of
from actors.engines.base import TeacherSpec, engine_environment
from actors.engines.build import build_engine
from actors.engines.teacher_head import read_head, require_head_alone
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores, check_scores
from actors.teacher.replica import EngineStarted, TeacherReplica
from tests.worlds import LONGEST, VOCAB, random_examples, tiny_llama

TOP_K = 6
VLLM = EngineConfig(kind="vllm", dtype="float32", kv_cache_mib=16, rows_per_call=4)

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose heads have size 32, which vLLM's kernels for CPUs know."""
    return tiny_llama(tmp_path_factory.mktemp("teacher") / "model", seed=4, hidden_size=64, layers=2)


def spec_of(folder: Path, kind: str = "transformers", **changed: Any) -> TeacherSpec:
    engine = VLLM if kind == "vllm" else EngineConfig(kind="transformers", dtype="float32")
    return replace(TeacherSpec(engine, ModelSource(str(folder)), TOP_K, LONGEST, wire="hidden"), **changed)


def plain_states(folder: Path, example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states [N, H] and log-probabilities [N, V] where the targets are predicted, by one plain forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        outputs = model(torch.from_numpy(example.token_ids.astype(np.int64))[None], output_hidden_states=True)
    at = example.target_positions - 1
    return outputs.hidden_states[-1][0, at], outputs.logits[0, at].log_softmax(dim=-1)


def assert_right(folder: Path, example: Example, scores: TeacherScores) -> None:
    check_scores(example, scores, VOCAB)
    assert scores.hidden is not None and scores.hidden.dtype == np.uint16
    states, logprobs = plain_states(folder, example)
    torch.testing.assert_close(states_of(scores.hidden).float(), states, rtol=2**-8, atol=1e-4)
    targets = torch.from_numpy(example.targets.astype(np.int64))
    np.testing.assert_allclose(scores.target_logprob, logprobs.gather(1, targets[:, None])[:, 0], atol=1e-4)
    np.testing.assert_allclose(scores.topk_logprobs[:, 0], [
        max(row[token] for token in range(VOCAB) if token != target)
        for row, target in zip(logprobs.tolist(), targets.tolist(), strict=True)
    ], atol=1e-4)  # fmt: skip


def test_transformers_gives_the_states_that_its_head_reads(folder: Path) -> None:
    rows = random_examples(7, seed=1)
    for example, scores in zip(rows, build_engine(spec_of(folder)).score(rows), strict=True):
        assert_right(folder, example, scores)


@pytest.fixture(scope="module")
def vllm_replica(local_ray: None, folder: Path) -> Iterator[Any]:
    environment = {"env_vars": engine_environment(VLLM)}
    actor = ray.remote(TeacherReplica).options(num_cpus=1, runtime_env=environment).remote(spec_of(folder, "vllm", ids_below=80))
    assert ray.get(actor.start.remote(), timeout=300) == EngineStarted(VOCAB)
    yield actor
    ray.get(actor.close.remote(), timeout=60)
    ray.kill(actor)


@needs_vllm
@pytest.mark.ray
@pytest.mark.slow
def test_vllm_gives_the_states_that_transformers_gives(vllm_replica: Any, folder: Path) -> None:
    rows = random_examples(9, seed=2)
    found = ray.get(vllm_replica.score.remote(rows), timeout=300)
    for mine, theirs in zip(found, build_engine(spec_of(folder, ids_below=80)).score(rows), strict=True):
        np.testing.assert_allclose(states_of(mine.hidden).float(), states_of(theirs.hidden).float(), rtol=2**-7, atol=1e-4)
        np.testing.assert_allclose(mine.target_logprob, theirs.target_logprob, atol=1e-4)
        np.testing.assert_allclose(mine.topk_logprobs, theirs.topk_logprobs, atol=1e-4)


# ---- the head


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_read_alone_and_makes_the_logits(tmp_path: Path, tied: bool) -> None:
    folder, (example,) = tiny_llama(tmp_path / "model", seed=5, tied=tied), random_examples(1, seed=3)
    states, logprobs = plain_states(folder, example)
    head = read_head(ModelSource(str(folder)), torch.float32)
    torch.testing.assert_close(head.logits(states).log_softmax(dim=-1), logprobs)
    assert read_head(ModelSource(str(folder)), torch.bfloat16).weight.dtype == torch.bfloat16


def test_a_bias_is_read_with_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = PhiForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    states, logprobs = plain_states(tmp_path, random_examples(1, seed=3)[0])
    head = read_head(ModelSource(str(tmp_path)), torch.float32)
    assert head.bias is not None
    torch.testing.assert_close(head.logits(states).log_softmax(dim=-1), logprobs)


def test_a_head_that_the_files_lack_is_refused_with_what_would_do(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", seed=5, tied=False)
    weights = load_file(folder / "model.safetensors")
    weights["another.name"] = weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError) as raised:
        read_head(ModelSource(str(folder)), torch.float32)
    assert "holds a tensor lm_head.weight of the shape [96, 16], the teacher's output head; rollouts.wire=candidates" in str(
        raised.value
    )


def test_a_teacher_whose_head_does_not_make_the_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(tmp_path)
    require_head_alone(ModelSource(str(tmp_path)))
    plain = GPT2LMHeadModel.forward

    def shifted(self: Any, *arguments: Any, **settings: Any) -> Any:
        outputs = plain(self, *arguments, **settings)
        outputs.logits = outputs.logits + torch.arange(outputs.logits.shape[-1])
        return outputs

    monkeypatch.setattr(GPT2LMHeadModel, "forward", shifted)
    message = "the output head of the teacher, a GPT2LMHeadModel, does not alone make its logits.*; rollouts.wire=candidates"
    with pytest.raises(ValueError, match=message):
        require_head_alone(ModelSource(str(tmp_path)))
    with pytest.raises(ValueError, match=message):
        build_engine(spec_of(tmp_path))


def test_a_head_of_another_model_is_found(folder: Path, tmp_path: Path) -> None:
    (example,) = random_examples(1, seed=3)
    (scores,) = build_engine(spec_of(folder)).score([example])
    require_right_head(example, scores, read_head(ModelSource(str(folder)), torch.float32))
    other = read_head(ModelSource(str(tiny_llama(tmp_path / "other", seed=6, hidden_size=64))), torch.float32)
    with pytest.raises(ValueError, match=r"row 0: the teacher's head .* nats from what the teacher said .*wire=candidates would"):
        require_right_head(example, scores, other)


# ---- as a record


def test_states_come_back_as_bfloat16_has_them() -> None:
    states = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * 100
    assert bits_of(states).dtype == np.uint16
    assert torch.equal(states_of(bits_of(states)), states.to(torch.bfloat16))


@pytest.mark.parametrize(("value", "message"), [
    (float("nan"), "hidden holds a value that is not finite; the teacher's hidden states must be finite"),
    (float("inf"), "hidden holds a value that is not finite; the teacher's hidden states must be finite"),
    (None, "has [0-9]+ targets, but hidden states of [0-9]+"),
])  # fmt: skip
def test_states_that_no_teacher_has_are_refused(folder: Path, value: float | None, message: str) -> None:
    (example,) = random_examples(1, seed=3)
    (scores,) = build_engine(spec_of(folder)).score([example])
    states = states_of(scores.hidden)  # type: ignore[arg-type]
    if value is None:
        states = states[:-1]
    else:
        states[-1, 3] = value
    with pytest.raises(ValueError, match=f"row 0 .*: {message}"):
        check_scores(example, replace(scores, hidden=bits_of(states)), VOCAB)
