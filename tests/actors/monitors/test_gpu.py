"""What is recorded of a GPU, with a name, a clock and a memory that are given; and that a CPU records nothing."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.monitors.flops import learning_flops
from actors.monitors.gpu import PEAK_TFLOPS, GpuMonitor, TrainedModel, peak_flops, trained_model
from actors.monitors.metrics_log import read_metrics
from actors.monitors.prometheus import GPU
from actors.student.loop import distil
from actors.student.train_checkpoints import NoCheckpoints
from tests.orchestrator.training_world import TRAIN, task_in
from tests.worlds import tiny_llama

BILLION = TrainedModel(
    weights=1_000_000_000, trained=1_000_000_000, layers=1, block_weights=1_000_000_000, hidden_size=1, head_weights=0,
    trains_head=True,
)  # fmt: skip
"""A model whose operations are 6 for each weight and token, but for attention, which is next to nothing."""
ROWS = np.array([100, 100])


@dataclass
class Memory:
    """Answers as the allocator does: the peak since it was last asked."""

    peaks: list[int]

    def __call__(self) -> int:
        return self.peaks.pop(0)


def test_six_operations_a_weight_and_token_over_what_the_gpu_can() -> None:
    peak = peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16")
    assert peak == 311.9e12
    monitor = GpuMonitor(BILLION, peak, None)
    found = monitor.numbers(ROWS, 100, {"tokens_per_second": 20_000.0, "workers": 1})
    assert found == {"mfu": pytest.approx(6e9 * 20_000 / 311.9e12, rel=1e-4)}


def test_the_tokens_are_those_of_all_workers_and_so_is_the_speed() -> None:
    monitor = GpuMonitor(BILLION, 1e15, None)
    one = monitor.numbers(ROWS, 100, {"tokens_per_second": 20_000.0, "workers": 1})["mfu"]
    eight = monitor.numbers(ROWS, 100, {"tokens_per_second": 160_000.0, "workers": 8})["mfu"]
    assert eight == pytest.approx(one)


def test_of_a_gpu_that_is_not_known_the_memory_alone_is_recorded() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
    monitor = GpuMonitor(BILLION, None, Memory([5 << 30, 3 << 30]))
    step = {"tokens_per_second": 1.0, "workers": 1}
    assert [monitor.numbers(ROWS, 100, step) for _ in range(2)] == [{"gpu_memory_bytes": 5 << 30}, {"gpu_memory_bytes": 3 << 30}]


def test_what_is_recorded_is_what_is_shown() -> None:
    found = GpuMonitor(BILLION, 1e15, Memory([1])).numbers(ROWS, 100, {"tokens_per_second": 1.0, "workers": 1})
    assert found.keys() == GPU.keys()


def test_known_gpus_have_the_names_that_drivers_give() -> None:
    assert all(name.startswith("NVIDIA ") and 50 < peak < 5000 for name, peak in PEAK_TFLOPS.items())


def test_a_model_on_a_cpu_is_not_watched(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model", seed=1))
    assert GpuMonitor.of(model, torch.device("cpu"), "bfloat16").numbers(ROWS, 1, {"tokens_per_second": 1.0, "workers": 1}) == {}


def test_a_training_on_a_cpu_records_no_gpu(tmp_path: Path) -> None:
    train = TRAIN.model_copy(update={"epochs": 0.5})
    distil(replace(task_in(tmp_path, tmp_path / "world", train=train), output=None), NoCheckpoints())
    steps = read_metrics(tmp_path / "metrics" / "train.jsonl")
    assert steps and not any(GPU.keys() & step.keys() for step in steps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_training_on_a_gpu_records_its_memory(tmp_path: Path) -> None:
    train = TRAIN.model_copy(update={"epochs": 0.5, "precision": "bfloat16"})
    distil(replace(task_in(tmp_path, tmp_path / "world", train=train, gpu=True), output=None), NoCheckpoints())
    steps = read_metrics(tmp_path / "metrics" / "train.jsonl")
    assert all(0 < step["gpu_memory_bytes"] < torch.cuda.get_device_properties(0).total_memory for step in steps)
    known = torch.cuda.get_device_name() in PEAK_TFLOPS
    assert all(("mfu" in step) is known and step.get("mfu", 0.5) < 1 for step in steps)


def test_the_size_of_a_model_is_read_off_it(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model", seed=1, hidden_size=16, layers=2, tied=False))
    shape = trained_model(model)
    outside = model.model.embed_tokens.weight.numel() + model.lm_head.weight.numel()
    assert shape.block_weights == sum(weight.numel() for weight in model.parameters()) - outside
    assert (shape.layers, shape.hidden_size, shape.head_weights) == (2, 16, model.lm_head.weight.numel())
    assert learning_flops(shape, 1.0, 0.0) == pytest.approx(6 * shape.block_weights, rel=0.05)
