"""The plain forward pass that served scores are held against when a teacher starts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from actors.config.models import DType
from actors.engines.base import TeacherSpec
from actors.engines.build import build_engine
from actors.model_source import ModelSource
from actors.records import Example, example_key
from actors.teacher import reference_pass as forward_pass
from actors.teacher.parity import ScoreParity
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
    found = TeacherReplica(spec_of(teacher), build_engine).start(rows).parity
    assert isinstance(found, ScoreParity)
    assert found.targets == sum(len(row.targets) for row in rows)
    assert found.largest_target_error < 1e-5 and found.topk_agreement == 1.0 and abs(found.slope - 1) < 1e-4
    assert found.error_one_earlier > 0.1 and found.error_one_later > 0.1
    rough = TeacherReplica(spec_of(teacher, "bfloat16"), build_engine).start(rows).parity
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

    found = TeacherReplica(spec_of(teacher), OffInOneRow).start(rows).parity  # type: ignore[arg-type]
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
    monkeypatch.setattr(forward_pass, "free_memory", lambda device: 1000)
    started = TeacherReplica(spec_of(teacher), build_engine).start(random_examples(2, seed=2))
    assert started.vocab_size == VOCAB
    assert started.parity == "in float32 the teacher takes 0.0 GiB, and its replica finds 0.0 GiB free (CPU)"


def test_a_quantized_teacher_is_not_compared_and_that_is_said(teacher: ModelSource, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(teacher.name)
    config.quantization_config = {"quant_method": "awq"}
    config.save_pretrained(tmp_path)
    assert references(ModelSource(str(tmp_path)), random_examples(1, seed=2), "cpu") == (
        "the teacher's weights are quantized, and what they give in float32 is another model's"
    )


def test_a_teacher_that_transformers_cannot_load_is_an_error_that_says_how_to_go_without(tmp_path: Path) -> None:
    AutoConfig.from_pretrained(tiny_llama(tmp_path / "whole", seed=1)).save_pretrained(tmp_path / "empty")
    message = r"cannot be compared with a plain forward pass, which raised ValueError: .*; scores.compare_rows 0 goes without"
    with pytest.raises(ValueError, match=message):
        references(ModelSource(str(tmp_path / "empty")), random_examples(1, seed=2), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_is_free_again_before_the_engine_starts(teacher: ModelSource) -> None:
    before = forward_pass.free_memory("cuda")
    assert not isinstance(references(teacher, random_examples(2, seed=2), "cuda"), str)
    assert before - forward_pass.free_memory("cuda") < 1 << 30  # CUDA's own context stays
