"""Whether faults of a teacher are told from the rounding of 16 bits: a small trained model, served rightly and wrongly."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.config.models import DType
from actors.engines.base import EngineFactory, TeacherSpec
from actors.engines.build import build_engine
from actors.engines.transformers import TransformersEngine
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores, example_key, tail_logmass
from actors.teacher.parity import EARLIER, LATER, LEAST_LIKELY, RIGHT, ComparedRow, Probe, ScoreParity, compare
from actors.teacher.replica import TeacherReplica
from orchestrator.run.score_parity import TOLERANCES, check_raw, check_served
from tests.fakes import fake_spec
from tests.faulty_engines import TOP_K, Serves, ShiftedEngine
from tests.worlds import VOCAB, word_tokenizer

LENGTH, LAG, SURE = 40, 4, 0.8


def rows_of_language(count: int, seed: int) -> np.ndarray:
    """int64 [count, LENGTH]: most tokens are the successor of the token four places before, the others any."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, VOCAB, (count, LENGTH))
    for place in range(LAG, LENGTH):
        follows = generator.random(count) < SURE
        rows[follows, place] = (rows[follows, place - LAG] + 1) % VOCAB
    return rows


def probe(count: int, seed: int) -> Probe:
    mask = np.arange(LENGTH) >= 8
    rows = rows_of_language(count, seed).astype(np.int32)
    return Probe([Example(row, mask, example_key(row, mask), index) for index, row in enumerate(rows)])


def trained(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(240):
        rows = torch.from_numpy(rows_of_language(32, seed=1000 * seed + step))
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("language") / "teacher", seed=1)


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("language") / "another", seed=2)


def found_with(teacher: Path, engine: EngineFactory, dtype: DType) -> ScoreParity:
    spec = replace(fake_spec(TOP_K, dtype=dtype, rows_per_call=64), model=ModelSource(str(teacher)), longest_row=LENGTH)
    found = TeacherReplica(spec, engine).start(probe(8, seed=5)).parity
    assert isinstance(found, ScoreParity)
    return found


def states(found: ScoreParity, dtype: DType) -> tuple[str, str]:
    return check_raw(found).state, check_served(found, TOLERANCES[dtype]).state


def changed(teacher: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a model with another config.json."""
    shutil.copytree(teacher, folder)
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


class HotEngine(TransformersEngine):
    """Divides logits by a temperature."""

    temperature = 1.1

    def __init__(self, spec: TeacherSpec) -> None:
        super().__init__(spec)
        head = self._model.get_output_embeddings()
        head.register_forward_hook(lambda module, inputs, logits: logits / self.temperature)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_teacher_served_rightly_passes_in_each_type(teacher: Path, dtype: DType) -> None:
    found = found_with(teacher, build_engine, dtype)
    assert found.targets == 8 * 32 and found.rows == 8
    assert states(found, dtype) == ("ok", "ok"), (found, check_served(found, TOLERANCES[dtype]).line())
    assert found.mean_target_error <= found.high_target_error <= found.largest_target_error
    assert (found.mean_target_error > 1e-5) is (dtype != "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_each_fault_is_found_in_each_type(teacher: Path, another: Path, tmp_path: Path, dtype: DType) -> None:
    def other_base(settings: dict[str, Any]) -> None:
        settings["rope_parameters"]["rope_theta"] *= 10

    faults: dict[str, EngineFactory] = {
        "read one position late": ShiftedEngine,
        "another model": Serves(another),
        "a temperature": HotEngine,
        "another rotary base": Serves(changed(teacher, tmp_path / "base", other_base)),
        "a layer less": Serves(changed(teacher, tmp_path / "short", lambda settings: settings.update(num_hidden_layers=2))),
    }
    found = {name: found_with(teacher, engine, dtype) for name, engine in faults.items()}
    sound = {name: numbers for name, numbers in found.items() if states(numbers, dtype) == ("ok", "ok")}
    assert sound == {}
    assert "one position after the right one" in check_served(found["read one position late"], TOLERANCES[dtype]).line()
    assert "a temperature or a scale" in check_raw(found["a temperature"]).line()
    assert "another model" in check_served(found["another model"], TOLERANCES[dtype]).line()


def compared_row(errors: Sequence[float], expected: Sequence[float], row: int = 0) -> ComparedRow:
    """A row whose served log-probabilities are so far off those expected."""
    target = np.array(expected) - np.array(errors)
    others = np.log(np.maximum(1 - np.exp(target), 1e-6) / 2)[:, None].repeat(2, axis=1).astype(np.float32)
    ids, tail = np.zeros((len(target), 2), np.int32), tail_logmass(target, others)
    served = TeacherScores("", target.astype(np.float32), ids, others, tail)
    reference = np.stack([np.full(len(target), np.nan), np.array(expected), np.array(expected) - 1])
    return ComparedRow(row, served, reference, others.astype(np.float64), np.ones((len(target), 2), bool))


def test_unlikely_targets_are_set_aside_but_for_the_largest_error() -> None:
    likely, unlikely = compared_row([0.1] * 99 + [0.3], [-1.0] * 100), compared_row([0.7, 0.2], [-9.0, -8.5], row=6)
    found = compare([likely, unlikely])
    assert (found.rows, found.targets, found.set_aside, found.furthest_row) == (2, 102, 2, 6)
    assert found.largest_target_error == pytest.approx(0.7, abs=1e-6)
    assert found.mean_target_error == pytest.approx(0.102, abs=1e-6)
    assert found.high_target_error == pytest.approx(np.quantile([0.1] * 99 + [0.3], 0.99), abs=1e-6)
    line = check_served(found, TOLERANCES["bfloat16"]).line()
    assert f"mean and 99 % leave out 2 targets below {LEAST_LIKELY:g} nats" in line


def test_a_teacher_to_which_most_rows_are_unlikely_is_judged_by_all_of_them() -> None:
    found = compare([compared_row([0.5, 0.5, 0.1], [-9.0, -10.0, -1.0])])
    assert found.set_aside == 0 and found.mean_target_error == pytest.approx(1.1 / 3, abs=1e-6)


def test_what_is_no_number_is_not_set_aside() -> None:
    found = compare([compared_row([np.nan, 0.0, 0.0], [-1.0, -1.0, -9.0])])
    assert np.isnan(found.mean_target_error) and found.set_aside == 1
    assert check_served(found, TOLERANCES["bfloat16"]).state == "FAILED"


def test_a_single_target_far_off_fails_where_mean_and_quantile_do_not_see_it() -> None:
    found = compare([compared_row([0.001] * 255 + [3.0], [-2.0] * 256, row=4)])
    tolerance = TOLERANCES["bfloat16"]
    assert found.mean_target_error < tolerance.mean and found.high_target_error < tolerance.high
    finding = check_served(found, tolerance)
    assert finding.state == "FAILED" and "all by at most 3.0e+00 (may" in finding.line() and "row 4" in finding.line()


def test_places_of_the_predictions_are_those_before_and_after() -> None:
    assert (EARLIER, RIGHT, LATER) == (0, 1, 2)
    found = compare([compared_row([0.0, 0.0], [-1.0, -2.0])])
    assert np.isnan(found.error_one_earlier) and found.error_one_later == pytest.approx(1.0, abs=1e-6)
