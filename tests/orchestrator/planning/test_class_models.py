"""Activations and operations of classifiers without weights, against real ones and against counts by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from actors.networks.classifier import SmallClassifier, SmallClassifierConfig, class_logits
from orchestrator.planning.class_models import class_shape, saved_by_classifier
from orchestrator.planning.shapes import Workload


def rows_of_shape(model: SmallClassifier, count: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    token_ids = torch.zeros(count, tokens, dtype=torch.long)
    return token_ids, torch.ones_like(token_ids), torch.arange(1, count + 1) * tokens - 1


def kept_by(model: torch.nn.Module, forward: Any) -> int:
    """Bytes that a real model keeps for its backward pass."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kind", ["text_mlp", "text_cnn", "text_rnn", "image_cnn", "image_resnet"])
def test_activations_of_networks_are_those_that_real_ones_keep(kind: str) -> None:
    shape, tokens = ((1, 8, 8), 65) if kind.startswith("image") else ((), 30)
    settings = SmallClassifierConfig({"kind": kind}, 100, shape, num_labels=3)
    real = SmallClassifier(settings).train()
    measured = kept_by(real, lambda: class_logits(real, *rows_of_shape(real, 16, tokens)))
    with torch.device("cpu" if kind == "text_rnn" else "meta"):
        shapes = SmallClassifier(settings).train()
    assert saved_by_classifier(shapes, 16, tokens, bfloat16=False) == pytest.approx(measured, rel=0.05)


def test_activations_of_a_transformer_are_those_that_a_real_one_keeps() -> None:
    settings = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    real = BertForSequenceClassification(settings).train()
    mask = torch.ones(6, 20, dtype=torch.long)
    mask[0, 12:] = 0
    measured = kept_by(real, lambda: real(input_ids=torch.zeros(6, 20, dtype=torch.long), attention_mask=mask))
    with torch.device("meta"):
        shapes = BertForSequenceClassification(settings).train()
    assert saved_by_classifier(shapes, 6, 21, bfloat16=False) == pytest.approx(measured, rel=0.05)


def of_length(tokens: int) -> Workload:
    return Workload(np.full(10, tokens), np.ones(10, np.int64), 0, 0, tokens, 100, "made up")


def test_operations_of_networks_are_those_of_their_products() -> None:
    def counted(network: dict[str, Any], tokens: int, shape: tuple[int, ...] = ()) -> float | None:
        with torch.device("meta"):
            model = SmallClassifier(SmallClassifierConfig(network, 100, shape, num_labels=3))
        return class_shape(model, of_length(tokens)).token_flops

    hidden, output = 16 * 32, 32 * 3
    assert counted({"kind": "text_mlp"}, 20) == 2 * (hidden + output) / 20
    filters = sum((19 + kernel - 1) * kernel * 16 * 16 for kernel in (1, 2, 3))  # padded on both sides; the label is not read
    assert counted({"kind": "text_cnn"}, 20) == 2 * (filters + 3 * 16 * 3) / 20
    convolutions = 64 * 9 * 1 * 4 + 16 * 9 * 4 * 8  # 8 x 8 places, and then 4 x 4
    assert counted({"kind": "image_cnn", "channels": 4}, 65, (1, 8, 8)) == 2 * (convolutions + 8 * 3) / 65
