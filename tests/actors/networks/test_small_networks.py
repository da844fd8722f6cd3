"""Small networks against the same computation written slowly, row by row; and what no network may depend on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from actors.model_source import ModelSource
from actors.models import load_model, save_model
from actors.networks.classifier import SmallClassifier, SmallClassifierConfig, class_logits
from actors.teacher.reference_pass import count_weights
from orchestrator.config.classes import WITHOUT_BLOCKS

VOCAB, CLASSES, IMAGE = 30, 4, (2, 6, 5)
TEXTS: list[dict[str, Any]] = [
    {"kind": "text_mlp", "width": 5, "hidden": 7},
    {"kind": "text_cnn", "width": 5, "filters": 3, "kernels": [1, 3]},
    {"kind": "text_rnn", "width": 5, "hidden": 3},
]
IMAGES: list[dict[str, Any]] = [
    {"kind": "image_cnn", "channels": 3, "layers": 2},
    {"kind": "image_resnet", "channels": 3, "stages": 2, "blocks": 2},
]
ROWS = [[3, 9, 4, 4, 27], [8], [11, 2, 29]]
LABELS = [2, 0, 3]


def network(shape: dict[str, Any], classes: int = CLASSES) -> SmallClassifier:
    torch.manual_seed(5)
    of_images = shape["kind"].startswith("image")
    settings = SmallClassifierConfig(shape, 0 if of_images else VOCAB, IMAGE if of_images else (), num_labels=classes)
    return SmallClassifier(settings).eval()


def batch(rows: list[list[int]], labels: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and mask, padded on the right, and where the labels stand."""
    width = 1 + max(map(len, rows))
    token_ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for place, (row, label) in enumerate(zip(rows, labels, strict=True)):
        token_ids[place, : len(row) + 1], mask[place, : len(row) + 1] = torch.tensor([*row, label]), 1
    return token_ids, mask, torch.arange(len(rows)) * width + mask.sum(dim=1) - 1


def images(rows: int = 3) -> list[list[int]]:
    pixels = np.random.default_rng(0).normal(size=(rows, int(np.prod(IMAGE)))).astype(np.float32)
    return [row.view(np.int32).tolist() for row in pixels]


def rows_for(shape: dict[str, Any]) -> list[list[int]]:
    return images() if shape["kind"].startswith("image") else ROWS


def kind_of(shape: dict[str, Any]) -> str:
    return str(shape["kind"])


def weight(model: SmallClassifier, name: str) -> np.ndarray:
    return model.network.state_dict()[name].double().numpy()


def dense(model: SmallClassifier, name: str, values: np.ndarray) -> np.ndarray:
    return weight(model, f"{name}.weight") @ values + weight(model, f"{name}.bias")


def mlp(model: SmallClassifier, row: list[int]) -> np.ndarray:
    mean = sum(weight(model, "embedding.weight")[token] for token in row) / len(row)
    return dense(model, "output", np.maximum(dense(model, "hidden", mean), 0))


def cnn(model: SmallClassifier, row: list[int]) -> np.ndarray:
    """Each filter over each stretch of its width that touches the row, which stands between zeros."""
    largest = []
    for index, kernel in enumerate((1, 3)):
        weights, bias = weight(model, f"filters.{index}.weight"), weight(model, f"filters.{index}.bias")
        zeros = [np.zeros(5)] * (kernel - 1)
        embedded = [*zeros, *(weight(model, "embedding.weight")[token] for token in row), *zeros]
        for filter, shift in zip(weights, bias, strict=True):
            stretches = range(len(row) + kernel - 1)
            responses = [sum(filter[:, k] @ embedded[place + k] for k in range(kernel)) + shift for place in stretches]
            largest.append(max(0.0, *responses))
    return dense(model, "output", np.array(largest))


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def rnn(model: SmallClassifier, row: list[int]) -> np.ndarray:
    """The GRU's own equations, over the row and over the row backwards."""
    sums = []
    for suffix, order in (("", row), ("_reverse", row[::-1])):
        of_input, of_state = (weight(model, f"states.weight_{which}_l0{suffix}") for which in ("ih", "hh"))
        bias_input, bias_state = (weight(model, f"states.bias_{which}_l0{suffix}") for which in ("ih", "hh"))
        state, total = np.zeros(3), np.zeros(3)
        for token in order:
            given = np.split(of_input @ weight(model, "embedding.weight")[token] + bias_input, 3)
            kept = np.split(of_state @ state + bias_state, 3)
            reset, update = sigmoid(given[0] + kept[0]), sigmoid(given[1] + kept[1])
            state = (1 - update) * np.tanh(given[2] + reset * kept[2]) + update * state
            total += state
        sums.append(total / len(row))
    return dense(model, "output", np.concatenate(sums))


@pytest.mark.parametrize(("shape", "slow"), list(zip(TEXTS, (mlp, cnn, rnn), strict=True)), ids=("mlp", "cnn", "rnn"))
def test_text_networks_are_what_they_say(shape: dict[str, Any], slow: Any) -> None:
    model = network(shape)
    logits = class_logits(model, *batch(ROWS, LABELS)).detach().numpy()
    for row, found in zip(ROWS, logits, strict=True):
        np.testing.assert_allclose(found, slow(model, row), atol=1e-5)


def convolved(states: np.ndarray, weights: np.ndarray, stride: int) -> np.ndarray:
    """A convolution of [C, H, W] whose borders are zeros, one place at a time."""
    side = weights.shape[2] // 2
    padded = np.pad(states, ((0, 0), (side, side), (side, side)))
    places = [range(0, size, stride) for size in states.shape[1:]]
    size = weights.shape[2]

    def at(kernel: np.ndarray, y: int, x: int) -> float:
        return float((kernel * padded[:, y : y + size, x : x + size]).sum())

    return np.array([[[at(kernel, y, x) for x in places[1]] for y in places[0]] for kernel in weights])


def normed(model: SmallClassifier, name: str, states: np.ndarray, stride: int) -> np.ndarray:
    """A convolution, and its states less their mean, over their deviation, of the whole image."""
    states = convolved(states, weight(model, f"{name}.0.weight"), stride)
    scaled = (states - states.mean()) / np.sqrt(states.var() + 1e-5)
    return scaled * weight(model, f"{name}.1.weight")[:, None, None] + weight(model, f"{name}.1.bias")[:, None, None]


def image_cnn(model: SmallClassifier, image: np.ndarray) -> np.ndarray:
    for layer, stride in ((0, 1), (1, 2)):
        image = np.maximum(normed(model, f"layers.{layer}", image, stride), 0)
    return dense(model, "output", image.mean(axis=(1, 2)))


def image_resnet(model: SmallClassifier, image: np.ndarray) -> np.ndarray:
    states = np.maximum(normed(model, "stem", image, 1), 0)
    for block, stride in ((0, 1), (1, 1), (2, 2), (3, 1)):
        inner = np.maximum(normed(model, f"blocks.{block}.first", states, stride), 0)
        widens = stride == 2
        shortcut = convolved(states, weight(model, f"blocks.{block}.shortcut.weight"), stride) if widens else states
        states = np.maximum(normed(model, f"blocks.{block}.second", inner, 1) + shortcut, 0)
    return dense(model, "output", states.mean(axis=(1, 2)))


@pytest.mark.parametrize(("shape", "slow"), list(zip(IMAGES, (image_cnn, image_resnet), strict=True)), ids=("cnn", "resnet"))
def test_image_networks_are_what_they_say(shape: dict[str, Any], slow: Any) -> None:
    model = network(shape)
    logits = class_logits(model, *batch(images(), LABELS)).detach().numpy()
    for bits, found in zip(images(), logits, strict=True):
        image = np.array(bits, dtype=np.int32).view(np.float32).reshape(IMAGE).astype(np.float64)
        np.testing.assert_allclose(found, slow(model, image), atol=1e-5)


@pytest.mark.parametrize("shape", [*TEXTS, *IMAGES], ids=kind_of)
def test_a_rows_logits_know_neither_its_label_nor_its_batch(shape: dict[str, Any]) -> None:
    model, rows = network(shape), rows_for(shape)
    together = class_logits(model, *batch(rows, LABELS))
    assert torch.equal(together, class_logits(model, *batch(rows, [1, 1, 1])))
    for row, label, logits in zip(rows, LABELS, together, strict=True):
        torch.testing.assert_close(class_logits(model, *batch([row], [label]))[0], logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", TEXTS, ids=kind_of)
def test_what_stands_in_the_padding_changes_nothing(shape: dict[str, Any]) -> None:
    model = network(shape)
    token_ids, mask, labels = batch(ROWS, LABELS)
    wider_mask = torch.cat([mask, torch.zeros(3, 4, dtype=torch.long)], dim=1)
    wider = torch.cat([token_ids, torch.zeros_like(wider_mask[:, :4])], dim=1).masked_fill(wider_mask == 0, 17)
    padded = class_logits(model, wider, wider_mask, torch.arange(3) * wider.shape[1] + mask.sum(dim=1) - 1)
    torch.testing.assert_close(padded, class_logits(model, token_ids, mask, labels), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [*TEXTS, *IMAGES], ids=kind_of)
def test_a_network_is_saved_and_loaded_as_transformers_loads_its_own(shape: dict[str, Any], tmp_path: Path) -> None:
    model, rows = network(shape), batch(rows_for(shape), LABELS)
    save_model(model, None, tmp_path / "model")
    expected = class_logits(model, *rows)
    for again in (
        load_model(ModelSource(str(tmp_path / "model"), classes=CLASSES)),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "model"),
    ):
        assert torch.equal(class_logits(again.eval(), *rows), expected)
    with pytest.raises(ValueError, match=r"model tells 4 labels apart, and task\.labels has 3; a classifier of"):
        load_model(ModelSource(str(tmp_path / "model"), classes=3))


@pytest.mark.parametrize(
    ("shape", "vocab_size", "image_shape", "classes"),
    [
        ({"kind": "text_cnn", "width": 16, "filters": 16, "kernels": [1, 2, 3]}, 1000, (), 3),  # configs/grading_cpu.yaml
        ({"kind": "text_mlp"}, 1000, (), 3),
        ({"kind": "text_rnn"}, 1000, (), 3),
        ({"kind": "image_cnn", "channels": 8, "layers": 2}, 0, (1, 8, 8), 10),  # configs/digits_reffakd.yaml
        ({"kind": "image_resnet"}, 0, (1, 8, 8), 10),
    ],
)
def test_students_have_less_than_a_twentieth_of_a_million_weights(
    shape: dict[str, Any], vocab_size: int, image_shape: tuple[int, ...], classes: int
) -> None:
    settings = SmallClassifierConfig(shape, vocab_size, image_shape, num_labels=classes)
    weights = sum(parameter.numel() for parameter in SmallClassifier(settings).parameters())
    assert weights < 50_000 and count_weights(settings, classifies=True) == weights


def test_a_table_answers_by_the_label_alone() -> None:
    model = SmallClassifier(SmallClassifierConfig(num_labels=CLASSES))
    model.network.logprobs.data = torch.arange(16.0).view(4, 4)
    assert class_logits(model, *batch(ROWS, LABELS))[:, 0].tolist() == [8.0, 0.0, 12.0]
    assert isinstance(model.network, nn.Module) and not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("shape", [*TEXTS, *IMAGES], ids=kind_of)
def test_networks_have_blocks_as_the_configuration_has_it(shape: dict[str, Any]) -> None:
    model = network(shape)
    assert any(isinstance(module, nn.ModuleList) for module in model.modules()) == (shape["kind"] not in WITHOUT_BLOCKS)
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        model.gradient_checkpointing_enable()
