"""Neighbours of tokens as a teacher, against one target after the other."""

import math
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from actors.config.models import EngineConfig, SimilarTokens
from actors.engines import similar_tokens
from actors.engines.base import TeacherSpec
from actors.engines.build import build_engine
from actors.model_source import ModelSource
from actors.records import check_scores
from tests.worlds import VOCAB, random_examples, tiny_llama

TOP_K, BELOW = 6, VOCAB - 5


def spec_of(folder: Path, **changes: float) -> TeacherSpec:
    engine, settings = EngineConfig(kind="transformers", dtype="float32"), SimilarTokens.model_validate(changes)
    return TeacherSpec(engine, ModelSource(str(folder)), TOP_K, 64, ids_below=BELOW, similar_tokens=settings)


def neighbours_slowly(embeddings: np.ndarray, target: int, smoothing: float, temperature: float) -> dict[int, float]:
    """Probabilities of the K tokens like a target, by plain loops."""
    cosines = {}
    for token in range(BELOW):
        if token != target:
            one, other = embeddings[token], embeddings[target]
            lengths = math.sqrt(float(one @ one) * float(other @ other))
            cosines[token] = float(one @ other) / lengths if lengths else 0.0  # padding's embedding is 0
    nearest = sorted(cosines, key=lambda token: -cosines[token])[:TOP_K]
    shares = [math.exp(cosines[token] / temperature) for token in nearest]
    return {token: smoothing * share / sum(shares) for token, share in zip(nearest, shares, strict=True)}


@pytest.mark.parametrize(("smoothing", "temperature"), [(0.1, 0.1), (0.4, 2.0)])
def test_each_target_keeps_its_mass_and_shares_the_rest_with_what_is_like_it(
    smoothing: float, temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similar_tokens, "TOKENS_AT_ONCE", 3)
    tiny_llama(tmp_path, seed=0)
    embeddings = AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings().weight.detach().double().numpy()
    engine, rows = build_engine(spec_of(tmp_path, smoothing=smoothing, temperature=temperature)), random_examples(5, seed=1)
    assert engine.vocab_size == VOCAB and "tokens like each target" in engine.way
    for row, scores in zip(rows, [*engine.score(rows[:2]), *engine.score(rows[2:])], strict=True):
        check_scores(row, scores, BELOW)
        assert np.exp(scores.target_logprob) == pytest.approx(1 - smoothing)
        assert np.exp(scores.tail_logmass) == pytest.approx(0, abs=1e-6)
        for target, ids, logprobs in zip(row.targets, scores.topk_ids, scores.topk_logprobs, strict=True):
            expected = neighbours_slowly(embeddings, int(target), smoothing, temperature)
            assert set(ids.tolist()) == set(expected)
            assert np.exp(logprobs) == pytest.approx([expected[token] for token in ids.tolist()], rel=1e-4)
            assert (np.diff(logprobs) <= 0).all()
    engine.close()


def test_more_neighbours_than_tokens_are_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path, seed=0)
    engine = EngineConfig(kind="transformers")
    spec = TeacherSpec(engine, ModelSource(str(tmp_path)), VOCAB, 64, similar_tokens=SimilarTokens())
    with pytest.raises(ValueError, match=rf"scores\.top_k {VOCAB} is too large: .*; scores\.top_k {VOCAB - 1}|would do"):
        build_engine(spec)
