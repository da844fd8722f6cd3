"""The plain forward pass that served scores are held against when a teacher starts."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from actors.config.models import DType
from actors.engines.base import TeacherEngine, TeacherSpec
from actors.engines.build import build_engine
from actors.model_source import ModelSource
from actors.records import Example, example_key
from actors.teacher import reference_budget, reference_pass
from actors.teacher.parity import Probe, ScoreParity
from actors.teacher.reference_budget import Pace, product_rate, rows_in_time
from actors.teacher.reference_pass import PROBE_TARGETS, beginning, count_weights, references
from actors.teacher.replica import TeacherReplica
from tests.fakes import fake_spec
from tests.worlds import LONGEST, VOCAB, random_examples, tiny_llama

TOP_K = 8


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return ModelSource(str(tiny_llama(tmp_path_factory.mktemp("forward") / "teacher", seed=1, hidden_size=32, layers=2)))


def spec_of(teacher: ModelSource, dtype: DType = "float32") -> TeacherSpec:
    return replace(fake_spec(TOP_K, dtype=dtype), model=teacher, longest_row=LONGEST)


def test_a_replica_compares_what_it_serves_when_it_starts(teacher: ModelSource) -> None:
    rows = random_examples(4, seed=2)
    found = TeacherReplica(spec_of(teacher), build_engine).start(Probe(rows)).parity
    assert isinstance(found, ScoreParity)
    assert found.targets == sum(len(row.targets) for row in rows)
    assert found.largest_target_error < 1e-5 and found.topk_agreement == 1.0 and abs(found.slope - 1) < 1e-4
    assert found.error_one_earlier > 0.1 and found.error_one_later > 0.1
    rough = TeacherReplica(spec_of(teacher, "bfloat16"), build_engine).start(Probe(rows)).parity
    assert isinstance(rough, ScoreParity) and 1e-5 < rough.largest_target_error < 0.3
    assert TeacherReplica(spec_of(teacher), build_engine).start().parity is None


def test_the_row_that_is_furthest_off_is_named(teacher: ModelSource) -> None:
    rows = [replace(row, row=100 + place) for place, row in enumerate(random_examples(4, seed=2))]

    class OffInOneRow:
        def __init__(self, spec: TeacherSpec) -> None:
            self._engine = build_engine(spec)
            self.vocab_size, self.way = self._engine.vocab_size, self._engine.way

        def score(self, examples):  # type: ignore[no-untyped-def]
            scores = self._engine.score(examples)
            return [
                replace(one, target_logprob=one.target_logprob - 0.5 * (row.row == 102))
                for row, one in zip(examples, scores, strict=True)
            ]

    found = TeacherReplica(spec_of(teacher), OffInOneRow).start(Probe(rows)).parity  # type: ignore[arg-type]
    assert isinstance(found, ScoreParity) and found.furthest_row == 102
    assert found.largest_target_error == pytest.approx(0.5, abs=1e-4)


def test_a_long_row_is_compared_as_far_as_its_first_targets() -> None:
    token_ids = np.arange(300, dtype=np.int32) % VOCAB
    loss_mask = np.arange(300) >= 100
    long = Example(token_ids, loss_mask, example_key(token_ids, loss_mask), row=5)
    cut = beginning(long)
    assert len(cut.targets) == PROBE_TARGETS and len(cut.token_ids) == 100 + PROBE_TARGETS and cut.row == 5
    assert cut.key == example_key(cut.token_ids, cut.loss_mask) != long.key
    short = random_examples(1, seed=4)[0]
    np.testing.assert_array_equal(beginning(short).targets, short.targets)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_without_loading_them(tied: bool, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, seed=1, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert count_weights(AutoConfig.from_pretrained(folder)) == model.num_parameters()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_a_teacher_that_does_not_fit_is_not_compared_and_that_is_said(
    teacher: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_budget, "available_memory", lambda: 1000)
    started = TeacherReplica(spec_of(teacher), build_engine).start(Probe(random_examples(2, seed=2)))
    assert started.vocab_size == VOCAB
    assert started.parity == "in float32 the teacher takes 0.0 GiB, and its replica finds 0.0 GiB free (CPU)"


def test_a_teacher_that_takes_too_long_is_not_compared_and_that_is_said(
    teacher: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_budget, "MOST_SECONDS", 0.0)
    started = TeacherReplica(spec_of(teacher), build_engine).start(Probe(random_examples(2, seed=2)))
    assert started.vocab_size == VOCAB and started.remark == ""
    assert isinstance(started.parity, str) and started.parity.startswith("in float32 the ")
    assert "(may 0; 0.0 billion weights, " in started.parity and "so no row is short enough" in started.parity
    assert "teacher.engine.cpus gives more" in started.parity


def test_where_time_lacks_rows_with_short_prompts_are_compared_and_that_is_said(
    teacher: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, short = with_prompt_of(12, count=3, seed=2), with_prompt_of(2, count=3, seed=3)
    proof = 2 * 16  # tokens of the longest row, with the model's own attention and with eager
    weights = count_weights(AutoConfig.from_pretrained(teacher.name))
    monkeypatch.setattr(reference_pass, "pace_of", lambda weights, device: Pace(weights, 2.0 * weights * 46 / 60, "paper"))
    started = TeacherReplica(spec_of(teacher), build_engine).start(Probe(rows, short))
    assert isinstance(started.parity, ScoreParity) and started.parity.targets == 2 * 4  # two of 6 tokens fit into 46 - 32
    assert started.remark == (
        f"in float32 the {3 * 16 + proof} tokens of 3 rows would take 104 s (may 60; {weights / 1e9:.1f} billion weights, "
        "0 GFLOP/s on paper), so 2 of those with the shortest prompts are compared"
    )


def test_rows_are_taken_by_their_prompts_as_far_as_time_reaches() -> None:
    rows = [with_prompt_of(prompt, count=1, seed=prompt)[0] for prompt in (20, 3, 9)]
    short = [with_prompt_of(prompt, count=1, seed=prompt)[0] for prompt in (3, 4, 5, 6)]
    assert rows_in_time(Probe(rows, short), 24 + 7 + 13) == rows
    assert [len(row.token_ids) for row in rows_in_time(Probe(rows, short), 43)] == [7, 8, 9], "as many rows as were asked for"
    assert [len(row.token_ids) for row in rows_in_time(Probe(rows, short), 16)] == [7, 8]
    assert rows_in_time(Probe(rows, short), 6) == rows_in_time(Probe(rows), -5) == []


def with_prompt_of(tokens: int, count: int, seed: int) -> list[Example]:
    """Rows of so many tokens and four targets after them."""
    generator, mask = np.random.default_rng(seed), np.arange(tokens + 4) >= tokens
    drawn = [generator.integers(0, VOCAB, tokens + 4).astype(np.int32) for _ in range(count)]
    return [Example(token_ids, mask, example_key(token_ids, mask), row) for row, token_ids in enumerate(drawn)]


def test_the_pace_of_seventy_billion_weights_is_known_from_their_config_alone() -> None:
    started = time.monotonic()
    shape = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    weights = count_weights(shape)
    assert weights == 70_553_706_496 and time.monotonic() - started < 30
    pace = Pace(weights, 4 * 30e9, "4 threads")
    assert pace.most_tokens() == 51 and pace.seconds(51) == pytest.approx(60, abs=1.2)
    assert "would take 1411 s (may 60; 70.6 billion weights, 120 GFLOP/s on 4 threads), so no row" in pace.why_fewer(4, 1200, 0)
    assert pace.why_fewer(4, 1200, 1).endswith("so 1 of those with the shortest prompts are compared")


def test_the_speed_of_a_product_is_measured_after_a_first_one_that_does_not_count() -> None:
    ticks = iter([0.0, 9.0, 10.0, 10.5, 20.0, 20.25, 30.0, 31.0])
    rows, inner, columns = reference_budget.PRODUCT
    assert product_rate("cpu", clock=lambda: next(ticks)) == 2.0 * rows * inner * columns / 0.25
    assert product_rate("cpu") > 1e8


def test_a_reference_beside_an_engine_of_several_gpus_takes_none_of_its_time(
    teacher: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = threading.Event()

    def then_tell(*arguments: Any) -> Any:
        found = references(*arguments)
        computed.set()
        return found

    def build_after(spec: TeacherSpec) -> TeacherEngine:
        assert computed.wait(60), "the reference is computed while the engine is built"
        return build_engine(replace(spec, engine=spec.engine.model_copy(update={"gpu": False, "tensor_parallel": 1})))

    monkeypatch.setattr(reference_pass, "references", then_tell)
    spec = spec_of(teacher)
    wide = replace(spec, engine=spec.engine.model_copy(update={"gpu": True, "tensor_parallel": 2}))
    found = TeacherReplica(wide, build_after).start(Probe(random_examples(2, seed=2))).parity
    assert isinstance(found, ScoreParity) and found.largest_target_error < 1e-5


def test_a_quantized_teacher_is_not_compared_and_that_is_said(teacher: ModelSource, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(teacher.name)
    config.quantization_config = {"quant_method": "awq"}
    config.save_pretrained(tmp_path)
    assert references(ModelSource(str(tmp_path)), Probe(random_examples(1, seed=2)), "cpu") == (
        "the teacher's weights are quantized, and what they give in float32 is another model's"
    )


def test_a_teacher_that_transformers_cannot_load_is_an_error_that_says_how_to_go_without(tmp_path: Path) -> None:
    AutoConfig.from_pretrained(tiny_llama(tmp_path / "whole", seed=1)).save_pretrained(tmp_path / "empty")
    message = r"cannot be compared with a plain forward pass, which raised ValueError: .*; scores.compare_rows 0 goes without"
    with pytest.raises(ValueError, match=message):
        references(ModelSource(str(tmp_path / "empty")), Probe(random_examples(1, seed=2)), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_is_free_again_before_the_engine_starts(teacher: ModelSource) -> None:
    before = reference_budget.free_memory("cuda")
    assert not isinstance(references(teacher, Probe(random_examples(2, seed=2)), "cuda"), str)
    assert before - reference_budget.free_memory("cuda") < 1 << 30  # CUDA's own context stays
