"""The engines against a slow float64 reading of the full logits, and against each other. V vocabulary, K top-k."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from actors.config.models import EngineConfig
from actors.engines.base import TeacherSpec, engine_environment, likeliest_asked, require_top_k, scores_from_likeliest
from actors.engines.build import build_engine
from actors.engines.transformers import TransformersEngine
from actors.examples import write_examples
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores, check_scores, example_key
from actors.score_store.store import ScoreStore
from actors.teacher.parity import Probe
from actors.teacher.pool import TeacherPool
from actors.teacher.replica import EngineStarted, TeacherReplica
from tests.fakes import fake_spec

VOCAB, TOP_K, LONGEST = 700, 8, 48
FEWER = 500  # of the 17 likeliest tokens some five are beyond, and sometimes more than the eight that are reckoned with

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose distributions are far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("teacher")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def examples(model_folder: Path) -> list[Example]:
    """Rows of many lengths, with gaps in their masks; every third token is the model's own choice, so a target in the top K."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    rng, rows = np.random.default_rng(1), []
    for row, length in enumerate([2, 3, 7, 20, 33, LONGEST, LONGEST, 5]):
        token_ids = rng.integers(0, VOCAB, length).astype(np.int32)
        for position in range(3, length, 3):
            with torch.inference_mode():
                prefix = torch.from_numpy(token_ids[:position].astype(np.int64))
                token_ids[position] = int(model(prefix[None]).logits[0, -1].argmax())
        mask = rng.random(length) < 0.7
        mask[0], mask[-1] = False, True
        rows.append(Example(token_ids, mask, example_key(token_ids, mask), row))
    return rows


def spec(model_folder: Path, kind: str = "transformers", top_k: int = TOP_K, **engine: Any) -> TeacherSpec:
    settings = EngineConfig.model_validate({"kind": kind, "dtype": "float32", "rows_per_call": 3, **engine})
    return TeacherSpec(settings, ModelSource(str(model_folder)), top_k, LONGEST)


def read_off_full_logits(model_folder: Path, examples: list[Example], ids_below: int = VOCAB) -> list[TeacherScores]:
    """Scores read off the full logits in float64, one row and one target at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval()
    scores = []
    for example in examples:
        with torch.inference_mode():
            logits = model(torch.from_numpy(example.token_ids.astype(np.int64))[None]).logits[0].double()
        target, ids, values, tail = [], [], [], []
        for position in range(1, len(example.token_ids)):
            if not example.loss_mask[position]:
                continue
            logprobs = logits[position - 1] - torch.logsumexp(logits[position - 1], 0)
            gold = int(example.token_ids[position])
            order = [token for token in logprobs.argsort(descending=True).tolist() if token != gold]
            named = [token for token in order if token < ids_below][:TOP_K]
            target.append(float(logprobs[gold]))
            ids.append(named)
            values.append([float(logprobs[token]) for token in named])
            tail.append(float(torch.logsumexp(logprobs[[token for token in order if token not in named]], 0)))
        scores.append(
            TeacherScores(example.key, np.float32(target), np.array(ids, np.int32), np.float32(values), np.float32(tail))
        )
    return scores


@pytest.fixture(scope="module")
def reference(model_folder: Path, examples: list[Example]) -> list[TeacherScores]:
    """Scores of all tokens."""
    return read_off_full_logits(model_folder, examples)


def assert_agree(found: list[TeacherScores], wanted: list[TeacherScores], atol: float = 1e-4) -> None:
    """Target and top-K to ``atol`` nats; the same tokens unless two log-probabilities are as close as that."""
    assert [scores.key for scores in found] == [scores.key for scores in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours.target_logprob, theirs.target_logprob, atol=atol)
        np.testing.assert_allclose(ours.topk_logprobs, theirs.topk_logprobs, atol=atol)
        np.testing.assert_allclose(np.exp(ours.tail_logmass), np.exp(theirs.tail_logmass), atol=atol)
        assert ours.topk_ids.dtype == np.int32 and ours.topk_ids.shape == theirs.topk_ids.shape
        last = theirs.topk_logprobs[:, -1:]
        for mine, other in ((ours, theirs), (theirs, ours)):
            for row in range(len(mine.topk_ids)):
                for token, logprob in zip(mine.topk_ids[row], mine.topk_logprobs[row], strict=True):
                    assert token in other.topk_ids[row] or abs(logprob - last[row, 0]) <= 2 * atol


def test_the_rows_hold_targets_inside_and_outside_the_top_k(examples: list[Example], reference: list[TeacherScores]) -> None:
    inside = np.concatenate([scores.target_logprob > scores.topk_logprobs[:, -1] for scores in reference])
    assert 10 < inside.sum() < len(inside) - 10


def test_transformers_gives_what_the_full_logits_say(
    model_folder: Path, examples: list[Example], reference: list[TeacherScores]
) -> None:
    engine = build_engine(spec(model_folder))
    assert engine.vocab_size == VOCAB
    found = engine.score(examples)
    assert_agree(found, reference)
    for example, scores in zip(examples, found, strict=True):
        check_scores(example, scores, VOCAB)
    engine.close()


def test_tokens_that_the_tokenizer_has_not_join_the_tail(model_folder: Path, examples: list[Example]) -> None:
    bounded = replace(spec(model_folder), ids_below=FEWER)
    found = build_engine(bounded).score(examples)
    assert_agree(found, read_off_full_logits(model_folder, examples, FEWER))
    for example, scores in zip(examples, found, strict=True):
        check_scores(example, scores, FEWER)
    with pytest.raises(ValueError, match="scores.top_k 10 is too large: a vocabulary of 10 tokens has 9 besides the target"):
        build_engine(replace(spec(model_folder, top_k=10), ids_below=10))


def test_more_candidates_are_asked_for_where_too_few_can_be_named(model_folder: Path) -> None:
    bounded = replace(spec(model_folder, top_k=2), ids_below=10)
    assert [likeliest_asked(bounded, vocab_size, 3) for vocab_size in (10, 12, 90)] == [3, 5, 6]
    assert likeliest_asked(bounded, 90) == 83 and likeliest_asked(replace(bounded, ids_below=None), 90) == 3
    example = Example(np.array([0, 4], np.int32), np.array([False, True]), "k", 0)
    ids, logprobs = np.array([[4, 11, 1, 12, 2]]), np.log([[0.4, 0.3, 0.1, 0.1, 0.05]])
    assert scores_from_likeliest(example, np.log([0.4]), ids[:, :4], logprobs[:, :4], bounded) is None
    scores = scores_from_likeliest(example, np.log([0.4]), ids, logprobs, bounded)
    assert scores is not None and scores.topk_ids.tolist() == [[1, 2]]
    np.testing.assert_allclose(np.exp(scores.tail_logmass), [0.45], rtol=1e-5)


def test_transformers_scores_do_not_depend_on_the_batch(
    model_folder: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(spec(model_folder))
    together = engine.score(examples)
    alone = [scores for example in examples for scores in engine.score([example])]
    monkeypatch.setattr("actors.engines.transformers.MAX_LOGITS", 60 * VOCAB)
    in_passes = engine.score(examples[::-1])[::-1]
    assert_agree(alone, together, atol=5e-5)
    assert_agree(in_passes, together, atol=5e-5)


def test_k_may_be_all_other_tokens_and_no_more(model_folder: Path, examples: list[Example]) -> None:
    scores = build_engine(spec(model_folder, top_k=VOCAB - 1)).score(examples[3:4])[0]
    for row, target in zip(scores.topk_ids, examples[3].targets, strict=True):
        assert sorted([*row.tolist(), int(target)]) == list(range(VOCAB))
    assert np.exp(scores.tail_logmass).max() < 1e-5
    with pytest.raises(ValueError, match="scores.top_k 700 is too large: a vocabulary of 700 tokens .* 699 would do"):
        build_engine(spec(model_folder, top_k=VOCAB))
    require_top_k(VOCAB - 1, VOCAB)


def test_the_target_is_dropped_from_the_candidates_or_else_the_last_of_them() -> None:
    example = Example(np.array([0, 4, 9, 2], np.int32), np.array([False, True, True, True]), "k", 0)
    ids = np.array([[4, 1, 2], [1, 2, 3], [5, 6, 2]])
    logprobs = np.log([[0.5, 0.2, 0.1], [0.4, 0.3, 0.1], [0.4, 0.3, 0.2]])
    scores = scores_from_likeliest(example, np.log([0.5, 0.05, 0.2]), ids, logprobs, fake_spec(top_k=2))
    assert scores is not None
    assert scores.topk_ids.tolist() == [[1, 2], [1, 2], [5, 6]]
    np.testing.assert_allclose(np.exp(scores.topk_logprobs), [[0.2, 0.1], [0.4, 0.3], [0.4, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(scores.tail_logmass), [0.2, 0.25, 0.1], rtol=1e-5)


def test_the_environment_of_an_engine_follows_its_device() -> None:
    on_cpu = engine_environment(EngineConfig(kind="vllm", cpus=2.5))
    assert on_cpu["OMP_NUM_THREADS"] == "2"
    assert on_cpu["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert on_cpu["VLLM_CPU_OMP_THREADS_BIND"] == "nobind" and on_cpu["TORCHDYNAMO_DISABLE"] == "1"
    on_gpus = engine_environment(EngineConfig(kind="vllm", gpu=True, tensor_parallel=2))
    assert not {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND", "TORCHDYNAMO_DISABLE"} & on_gpus.keys()
    assert not [name for name in engine_environment(EngineConfig(kind="transformers", cpus=0.5)) if name.startswith("VLLM")]


@pytest.mark.ray
def test_a_pool_builds_the_engine_its_config_names(
    local_ray: None, model_folder: Path, examples: list[Example], reference: list[TeacherScores], tmp_path: Path
) -> None:
    write_examples(tmp_path / "train.arrow", examples)
    store = ScoreStore.open_or_create(tmp_path / "store", {"top_k": TOP_K, "vocab_size": VOCAB}, len(examples), 3)
    with TeacherPool(spec(model_folder)) as pool:
        list(pool.score_missing(tmp_path / "train.arrow", store))
    assert_agree([store.scores_at(position) for position in range(len(examples))], reference, atol=5e-4)


class VllmProbe(TeacherReplica):
    """A replica whose engine can be told which way to take to vLLM's results."""

    def ways(self) -> tuple[bool, bool]:
        """Whether the engine found vLLM's arrays, and whether it leaves prompts out."""
        return self._engine.reads_arrays, self._engine.skips_prompts

    def score_through(self, arrays: bool, target_rows: bool, examples: list[Example]) -> list[TeacherScores]:
        """Score by one of the ways, and go back to the one found at the start."""
        found = self.ways()
        self._engine.reads_arrays, self._engine.skips_prompts = arrays, target_rows
        try:
            return self.score(examples)
        finally:
            self._engine.reads_arrays, self._engine.skips_prompts = found


class NarrowVllm(TeacherReplica):
    """A replica whose engine reads few tokens in a step."""

    def start(self, probe: Probe | None = None) -> EngineStarted:
        """Build the engine with a smaller step."""
        from actors.engines import vllm as vllm_engine

        vllm_engine.TOKENS_PER_STEP = 40
        return super().start(probe)


@pytest.fixture(scope="module")
def vllm_replica(local_ray: None, model_folder: Path) -> Iterator[Any]:
    """One vLLM engine, in a process of its own: a process can hold no second one."""
    engine = EngineConfig(kind="vllm", dtype="float32", kv_cache_mib=16, rows_per_call=3)
    actor = (
        ray.remote(VllmProbe)
        .options(num_cpus=1, runtime_env={"env_vars": engine_environment(engine)})
        .remote(TeacherSpec(engine, ModelSource(str(model_folder)), TOP_K, LONGEST))
    )
    assert ray.get(actor.start.remote(), timeout=300) == EngineStarted(VOCAB)
    yield actor
    ray.get(actor.close.remote(), timeout=60)
    ray.kill(actor)


@needs_vllm
@pytest.mark.ray
@pytest.mark.slow
def test_vllm_gives_what_transformers_and_the_full_logits_give(
    vllm_replica: Any, model_folder: Path, examples: list[Example], reference: list[TeacherScores]
) -> None:
    found = ray.get(vllm_replica.score.remote(examples), timeout=300)
    assert_agree(found, reference)
    assert_agree(found, build_engine(spec(model_folder)).score(examples))
    for example, scores in zip(examples, found, strict=True):
        check_scores(example, scores, VOCAB)


@needs_vllm
@pytest.mark.ray
@pytest.mark.slow
def test_every_way_to_vllms_results_gives_the_same(vllm_replica: Any, examples: list[Example]) -> None:
    assert ray.get(vllm_replica.ways.remote(), timeout=60) == (True, True), "the locked version allows the fastest way"
    target_rows, arrays, public = (
        ray.get(vllm_replica.score_through.remote(*way, examples), timeout=300)
        for way in ((True, True), (True, False), (False, False))
    )
    assert_agree(arrays, public, atol=1e-6)
    assert_agree(target_rows, public, atol=2e-5)


@needs_vllm
@pytest.mark.ray
@pytest.mark.slow
def test_rows_read_in_pieces_are_those_of_whole_prompts_and_name_no_token_beyond_the_bound(
    local_ray: None, model_folder: Path
) -> None:
    """Twenty rows of 36 tokens do not fit a step of 40: vLLM reads some in two pieces. Of some, more candidates are asked for."""
    rng = np.random.default_rng(3)
    rows = []
    for row in range(20):
        token_ids = rng.integers(0, VOCAB, 36).astype(np.int32)
        mask = np.arange(36) >= rng.integers(1, 36)
        rows.append(Example(token_ids, mask, example_key(token_ids, mask), row))
    engine = EngineConfig(kind="vllm", dtype="float32", kv_cache_mib=16, rows_per_call=20)
    actor = (
        ray.remote(NarrowVllm)
        .options(num_cpus=1, runtime_env={"env_vars": engine_environment(engine)})
        .remote(TeacherSpec(engine, ModelSource(str(model_folder)), TOP_K, 37, ids_below=FEWER))
    )
    assert ray.get(actor.start.remote(), timeout=300) == EngineStarted(VOCAB)
    found = ray.get(actor.score.remote(rows), timeout=300)
    ray.kill(actor)
    assert_agree(found, build_engine(replace(spec(model_folder), ids_below=FEWER)).score(rows))


@needs_vllm
@pytest.mark.ray
@pytest.mark.slow
def test_vllm_scores_do_not_depend_on_the_batch(vllm_replica: Any, examples: list[Example]) -> None:
    together = ray.get(vllm_replica.score.remote(examples), timeout=300)
    alone = [ray.get(vllm_replica.score.remote([example]), timeout=300)[0] for example in examples]
    assert_agree(alone, together, atol=5e-5)
