"""What the GPU of a training worker does, step by step: its memory, and how much of its speed the model gets. Nothing on CPUs.

Utilisation as the driver counts it, and memory of every process, are what Ray exports of each node's GPUs by itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.models import plain_model
from actors.monitors.flops import DecoderShape, learning_flops, mean_context

PEAK_TFLOPS = {
    "NVIDIA B200": 2250.0,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA A100-SXM4-80GB": 311.9,
    "NVIDIA A100-SXM4-40GB": 311.9,
    "NVIDIA A100 80GB PCIe": 311.9,
    "NVIDIA A100-PCIE-40GB": 311.9,
    "NVIDIA L40S": 362.1,
    "NVIDIA L40": 181.0,
    "NVIDIA L4": 121.0,
    "NVIDIA A40": 149.7,
    "NVIDIA A10": 125.0,
    "NVIDIA RTX A6000": 154.8,
}
"""For each GPU, by the name that its driver gives it: bfloat16 operations a second on tensor cores without sparsity, in 10^12, as
its maker states them. A part of a GPU (MIG) has another name, and is not here."""


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A model as far as its operations depend on it (``DecoderShape``)."""

    weights: int
    """Weights in all; those that are tied count once."""
    trained: int
    """Weights that learn."""
    layers: int
    """Decoder blocks."""
    block_weights: int
    """Weights that are neither input embeddings nor output head."""
    hidden_size: int
    """H."""
    head_weights: int
    """V * H."""
    trains_head: bool
    """Whether the output head learns."""


class GpuMonitor:
    """The memory of a worker's GPU, and the model FLOPs utilisation (MFU) of all workers."""

    def __init__(self, shape: DecoderShape | None, peak_flops: float | None, peak_memory: Callable[[], int] | None) -> None:
        self._shape, self._peak_flops, self._peak_memory = shape, peak_flops, peak_memory

    @staticmethod
    def of(model: PreTrainedModel, device: torch.device, precision: str) -> "GpuMonitor":
        """Return the monitor of a worker's device; sharded weights count whole.

        MFU is known of GPUs in ``PEAK_TFLOPS`` that compute in bfloat16.
        """
        if device.type != "cuda":
            return GpuMonitor(None, None, None)
        peak = peak_flops(torch.cuda.get_device_name(device), precision)
        return GpuMonitor(trained_model(model), peak, lambda: take_peak_memory(device))

    def numbers(self, lengths: np.ndarray, targets: float, step: Mapping[str, float]) -> dict[str, float]:
        """Return what is recorded of a step.

        Args:
            lengths: int64 [rows], tokens of the step's rows on all workers.
            targets: targets of the step on all workers.
            step: the step's ``tokens_per_second``, of all workers and without waiting, and ``workers``.
        """
        found: dict[str, float] = {}
        if self._peak_memory is not None:
            found["gpu_memory_bytes"] = float(self._peak_memory())
        if self._shape is not None and self._peak_flops is not None:
            flops = learning_flops(self._shape, mean_context(lengths), targets / float(lengths.sum()))
            found["mfu"] = flops * step["tokens_per_second"] / (self._peak_flops * step["workers"])
        return found


def trained_model(model: PreTrainedModel) -> TrainedModel:
    """Read a model's size off it."""
    plain = plain_model(model)
    head, embeddings = plain.get_output_embeddings().weight, plain.get_input_embeddings().weight
    weights = sum(weight.numel() for weight in model.parameters())
    outside = head.numel() + (0 if head is embeddings else embeddings.numel())
    return TrainedModel(
        weights=weights,
        trained=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        layers=int(plain.config.get_text_config().num_hidden_layers),
        block_weights=weights - outside,
        hidden_size=head.shape[1],
        head_weights=head.numel(),
        trains_head=head.requires_grad,
    )


def peak_flops(name: str, precision: str) -> float | None:
    """Return the operations a second that a GPU can do, by its name; None where that is not known of it or of the precision."""
    peak = PEAK_TFLOPS.get(name)
    return None if peak is None or precision != "bfloat16" else peak * 1e12


def take_peak_memory(device: torch.device) -> int:
    """Return the most bytes that tensors held on a GPU since this was last asked."""
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return most
