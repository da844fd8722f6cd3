"""The teacher's log-probabilities of tokens that a row names: both engines, against full logits."""

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
from actors.engines.base import TeacherSpec, engine_environment
from actors.engines.build import build_engine
from actors.model_source import ModelSource
from actors.records import NO_TOKEN, Example, TeacherScores, check_scores
from actors.teacher.parity import Probe
from actors.teacher.replica import EngineStarted, TeacherReplica
from tests.worlds import LONGEST, VOCAB, random_examples, tiny_llama

TOP_K, CANDIDATES, BELOW = 6, 5, 80
VLLM = EngineConfig(kind="vllm", dtype="float32", kv_cache_mib=16, rows_per_call=4)

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose heads have size 32, which vLLM's kernels for CPUs know."""
    return tiny_llama(tmp_path_factory.mktemp("teacher") / "model", seed=4, hidden_size=64, layers=2)


def rows_with_candidates() -> list[Example]:
    """Candidates of all kinds: likely and not, the target itself, and fewer than there is room for."""
    generator, rows = np.random.default_rng(0), []
    for example in random_examples(9, seed=2):
        count = len(example.targets)
        candidates = np.stack([generator.permutation(BELOW)[:CANDIDATES] for _ in range(count)]).astype(np.int32)
        candidates[::3, 2] = example.targets[::3]
        candidates[1::3, 3:] = NO_TOKEN
        rows.append(replace(example, candidates=candidates))
    return rows


def spec_of(folder: Path, kind: str = "transformers") -> TeacherSpec:
    engine = VLLM if kind == "vllm" else EngineConfig(kind="transformers", dtype="float32")
    return TeacherSpec(engine, ModelSource(str(folder)), TOP_K, LONGEST, ids_below=BELOW, wire="candidates")


def read_off_full_logits(folder: Path, example: Example) -> list[tuple[dict[int, float], float]]:
    """Of each target, what each token of the union has, and the mass that is left: token by token, in float64."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval(), []
    with torch.inference_mode():
        logprobs = model(torch.from_numpy(example.token_ids.astype(np.int64))[None]).logits[0].log_softmax(dim=-1)
    assert example.candidates is not None
    for position, target, candidates in zip(example.target_positions, example.targets, example.candidates, strict=True):
        here = logprobs[position - 1].tolist()
        named = [token for token in sorted(range(BELOW), key=lambda token: -here[token]) if token != target][:TOP_K]
        union = {*named, *candidates.tolist()} - {int(target), NO_TOKEN}
        left = 1 - sum(np.exp(here[token]) for token in {*union, int(target)})
        found.append(({token: here[token] for token in union}, left))
    return found


def assert_right(folder: Path, example: Example, scores: TeacherScores) -> None:
    check_scores(example, scores, BELOW)
    assert scores.topk_ids.shape == (len(example.targets), TOP_K + CANDIDATES) and scores.topk_ids.dtype == np.int32
    for row, (union, left) in enumerate(read_off_full_logits(folder, example)):
        count, ids, logprobs = len(union), scores.topk_ids[row], scores.topk_logprobs[row]
        assert set(ids[:count].tolist()) == set(union) and (ids[count:] == NO_TOKEN).all()
        assert np.isneginf(logprobs[count:]).all() and (np.diff(logprobs[:count]) <= 0).all()
        np.testing.assert_allclose(logprobs[:count], [union[token] for token in ids[:count].tolist()], atol=1e-4)
        np.testing.assert_allclose(np.exp(scores.tail_logmass[row]), left, atol=1e-4)


def test_transformers_gives_the_union_of_both_sides(folder: Path) -> None:
    rows = rows_with_candidates()
    for example, scores in zip(rows, build_engine(spec_of(folder)).score(rows), strict=True):
        assert_right(folder, example, scores)


def test_a_row_without_candidates_has_the_teachers_own_tokens_alone(folder: Path) -> None:
    rows = random_examples(3, seed=1)
    plain = build_engine(replace(spec_of(folder), wire="top_k")).score(rows)
    for mine, theirs in zip(build_engine(spec_of(folder)).score(rows), plain, strict=True):
        np.testing.assert_array_equal(mine.topk_ids, theirs.topk_ids)


class Narrow(TeacherReplica):
    """A replica whose engine reads few tokens in a step."""

    def start(self, probe: Probe | None = None) -> EngineStarted:
        """Build the engine with a smaller step."""
        from actors.engines import vllm as vllm_engine

        vllm_engine.TOKENS_PER_STEP = LONGEST + 2
        return super().start(probe)


class OfAnotherForm(TeacherReplica):
    """A replica whose vLLM does not take our patches."""

    def start(self, probe: Probe | None = None) -> EngineStarted:
        """Build the engine without them."""
        from actors.engines import vllm as vllm_engine

        vllm_engine.keep_arrays = lambda: False
        return super().start(probe)


def replica_of(kind: type[TeacherReplica], folder: Path) -> Any:
    environment = {"env_vars": engine_environment(VLLM)}
    return ray.remote(kind).options(num_cpus=1, runtime_env=environment).remote(spec_of(folder, "vllm"))


@pytest.fixture(scope="module")
def vllm_replica(local_ray: None, folder: Path) -> Iterator[Any]:
    actor = replica_of(Narrow, folder)
    assert ray.get(actor.start.remote(), timeout=300) == EngineStarted(VOCAB)
    yield actor
    ray.get(actor.close.remote(), timeout=60)
    ray.kill(actor)


@needs_vllm
@pytest.mark.ray
@pytest.mark.slow
def test_vllm_gives_what_transformers_and_the_full_logits_give(vllm_replica: Any, folder: Path) -> None:
    rows = rows_with_candidates()
    found = ray.get(vllm_replica.score.remote(rows), timeout=300)
    for example, mine, theirs in zip(rows, found, build_engine(spec_of(folder)).score(rows), strict=True):
        assert_right(folder, example, mine)
        np.testing.assert_allclose(mine.topk_logprobs, theirs.topk_logprobs, atol=1e-4)
        np.testing.assert_allclose(mine.target_logprob, theirs.target_logprob, atol=1e-4)


@needs_vllm
@pytest.mark.ray
@pytest.mark.slow
def test_rows_with_and_without_candidates_are_scored_together(vllm_replica: Any, folder: Path) -> None:
    rows = [row if index % 2 else replace(row, candidates=None) for index, row in enumerate(rows_with_candidates())]
    for example, scores in zip(rows, ray.get(vllm_replica.score.remote(rows), timeout=300), strict=True):
        if example.candidates is not None:
            assert_right(folder, example, scores)
        else:
            assert scores.topk_ids.shape == (len(example.targets), TOP_K)


@needs_vllm
@pytest.mark.ray
@pytest.mark.slow
def test_a_vllm_of_another_form_is_refused_with_what_would_do(local_ray: None, folder: Path) -> None:
    actor = replica_of(OfAnotherForm, folder)
    message = "rollouts.wire is candidates, but vLLM .* unknown form.*; rollouts.wire=top_k, or teacher.engine"
    with pytest.raises(ValueError, match=message):
        ray.get(actor.start.remote(), timeout=300)
    ray.kill(actor)
