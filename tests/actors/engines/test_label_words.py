"""A causal language model as a classifier: its scores of label words, against one plain forward pass for each word."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from actors.config.models import EngineConfig
from actors.engines.base import TeacherSpec, engine_environment
from actors.engines.build import build_engine
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores, check_scores
from actors.teacher.replica import EngineStarted, TeacherReplica
from tests.worlds import VOCAB, tiny_llama

WORDS = ((7,), (3, 80, 2), (95, 4), (3, 81))
CLASSES, LONGEST_PROMPT = len(WORDS), 20

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose heads have size 32, which vLLM's kernels for CPUs know."""
    return tiny_llama(tmp_path_factory.mktemp("teacher") / "model", seed=6, hidden_size=64, layers=2)


def rows() -> list[Example]:
    """Prompts of many lengths, each with a label behind it, and keys that are not those of their tokens."""
    generator, made = np.random.default_rng(0), []
    for row in range(13):
        length = 1 + (7 * row) % LONGEST_PROMPT
        token_ids = np.append(generator.integers(0, VOCAB, length), row % CLASSES).astype(np.int32)
        made.append(Example(token_ids, np.arange(length + 1) == length, f"{row:032x}", row))
    return made


def spec_of(folder: Path, kind: str = "transformers", rows_per_call: int = 5) -> TeacherSpec:
    engine = EngineConfig.model_validate({"kind": kind, "dtype": "float32", "rows_per_call": rows_per_call, "kv_cache_mib": 16})
    return TeacherSpec(engine, ModelSource(str(folder)), CLASSES - 1, LONGEST_PROMPT + 1, label_words=WORDS)


def read_word_by_word(folder: Path, example: Example) -> list[float]:
    """The log-probability of each label: token after token of each word, in float64, in a forward pass of its own."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval(), []
    for word in WORDS:
        text, logprob = example.token_ids[:-1].tolist(), 0.0
        for token in word:
            with torch.inference_mode():
                logits = model(torch.tensor([text])).logits[0, -1]
            logprob += float(logits[token]) - float(logits.exp().sum().log())
            text.append(token)
        found.append(logprob)
    mass = sum(np.exp(found))
    return [logprob - float(np.log(mass)) for logprob in found]


def assert_right(folder: Path, example: Example, scores: TeacherScores) -> None:
    check_scores(example, scores, CLASSES)
    expected, label = read_word_by_word(folder, example), int(example.token_ids[-1])
    others = sorted((one for one in range(CLASSES) if one != label), key=lambda one: -expected[one])
    assert scores.topk_ids.tolist() == [others]
    np.testing.assert_allclose(scores.target_logprob, [expected[label]], atol=1e-4)
    np.testing.assert_allclose(scores.topk_logprobs[0], [expected[one] for one in others], atol=1e-4)


def test_a_label_is_as_likely_as_its_word_among_the_words(folder: Path) -> None:
    engine = build_engine(spec_of(folder))
    assert engine.vocab_size == CLASSES and engine.way == "transformers, float32; 4 label words"
    for example, scores in zip(rows(), engine.score(rows()), strict=True):
        assert_right(folder, example, scores)
    engine.close()


def test_how_many_rows_are_read_at_once_changes_nothing(folder: Path) -> None:
    one, many = (build_engine(spec_of(folder, rows_per_call=count)).score(rows()) for count in (1, 1000))
    for mine, theirs in zip(one, many, strict=True):
        np.testing.assert_allclose(mine.topk_logprobs, theirs.topk_logprobs, atol=1e-5)


def test_more_others_than_labels_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"scores\.top_k 4 is too large: .* 4 tokens has 3 besides the target; scores\.top_k 3"):
        build_engine(replace(spec_of(folder), top_k=CLASSES))


@needs_vllm
@pytest.mark.ray
@pytest.mark.slow
def test_vllm_gives_the_same(local_ray: None, folder: Path) -> None:
    spec = spec_of(folder, "vllm")
    actor = ray.remote(TeacherReplica).options(num_cpus=1, runtime_env={"env_vars": engine_environment(spec.engine)}).remote(spec)
    assert ray.get(actor.start.remote(None), timeout=300) == EngineStarted(CLASSES)
    for example, scores in zip(rows(), ray.get(actor.score.remote(rows()), timeout=300), strict=True):
        assert_right(folder, example, scores)
    ray.get(actor.close.remote(), timeout=60)
    ray.kill(actor)
