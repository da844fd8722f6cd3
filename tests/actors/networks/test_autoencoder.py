"""Soft labels against plain Python: similarities pair by pair, soft-maxes term by term."""

import math

import pytest
import torch
from torch import Tensor

from actors.config.networks import Autoencoder, SoftLabels
from actors.networks.autoencoder import (
    BagAutoencoder,
    ImageAutoencoder,
    class_similarities,
    fit_autoencoder,
    label_table,
    most_halvings,
    smoothed_labels,
    soft_labels,
)

LABELS = torch.tensor([0, 1, 2, 0, 1, 0, 1, 2])


def codes() -> Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(2))


def cosine(one: list[float], other: list[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


def test_similarities_are_means_over_all_pairs_of_two_rows() -> None:
    found, rows, labels = class_similarities(codes(), LABELS, 3, 10_000, seed=0), codes().tolist(), LABELS.tolist()
    for one in range(3):
        for other in range(3):
            pairs = [
                cosine(rows[a], rows[b])
                for a in range(8) for b in range(8) if a != b and (labels[a], labels[b]) == (one, other)
            ]  # fmt: skip
            assert float(found[one, other]) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_pairs_that_are_drawn_come_near_all_of_them() -> None:
    rows, labels = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)) + 1, torch.arange(300) % 3
    everything, drawn = (class_similarities(rows, labels, 3, pairs, seed=1) for pairs in (10**9, 3000))
    assert (everything - drawn).abs().max() < 0.05  # a cosine deviates by 0.4 or so: 0.007 of the mean of 3,000
    assert torch.equal(drawn, class_similarities(rows, labels, 3, 3000, seed=1)) and torch.equal(drawn, drawn.T)
    assert not torch.equal(drawn, class_similarities(rows, labels, 3, 3000, seed=2))


def test_a_class_of_one_row_is_like_itself() -> None:
    assert float(class_similarities(codes()[:2], torch.tensor([0, 1]), 2, 10, seed=0)[1, 1]) == pytest.approx(1)


@pytest.mark.parametrize(("boost", "temperature"), [(0.0, 1.0), (0.0225, 1.0), (0.5, 0.1)])
def test_soft_labels_are_soft_maxes_of_similarities(boost: float, temperature: float) -> None:
    similarities = class_similarities(codes(), LABELS, 3, 100, seed=0)
    found = soft_labels(similarities, boost, temperature).exp()
    for row in range(3):
        raised = [math.exp((float(similarities[row, c]) + boost * (c == row)) / temperature) for c in range(3)]
        for column in range(3):
            assert float(found[row, column]) == pytest.approx(raised[column] / sum(raised))


def test_smoothed_labels_keep_the_rest_on_the_label() -> None:
    found = smoothed_labels(4, 0.1).exp()
    for row in range(4):
        assert found[row].tolist() == pytest.approx([0.9 * (column == row) + 0.1 / 4 for column in range(4)])


def stripes(rows: int = 48) -> tuple[Tensor, Tensor]:
    """Images of three classes: bright above, the same a little less, bright on the left."""
    labels = torch.arange(rows) % 3
    images = 0.05 * torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    images[labels == 0, :, :4] += 1
    images[labels == 1, :, :5] += 1
    images[labels == 2, :, :, :4] += 1
    return images, labels


def test_classes_that_look_alike_teach_each_other() -> None:
    settings = SoftLabels(kind="soft_labels", temperature=0.1, autoencoder=Autoencoder(filters=(4, 8), epochs=10, batch_rows=16))
    images, labels = stripes()
    table, error = label_table(settings, images, labels, 3, seed=0)
    assert table.exp().sum(dim=1).tolist() == pytest.approx([1, 1, 1])
    assert table[0, 1] > table[0, 2] and table[1, 0] > table[1, 2] and table.argmax(dim=1).tolist() == [0, 1, 2]
    again, same_error = label_table(settings, images, labels, 3, seed=0)
    assert torch.equal(table, again) and error == same_error
    assert not torch.equal(table, label_table(settings, images, labels, 3, seed=1)[0])


def test_fitting_lowers_the_error_of_images_and_of_bags_of_tokens() -> None:
    images, _ = stripes()
    bags = torch.eye(6).repeat(8, 1)
    for model, rows in ((ImageAutoencoder((4,), (1, 8, 8)), images), (BagAutoencoder(6, 4), bags)):
        assert model(rows).shape == rows.shape
        once, often = (fit_autoencoder(model, rows, Autoencoder(epochs=e, learning_rate=1e-2), 0) for e in (1, 30))
        assert often < 0.7 * once


def test_label_smoothing_needs_no_autoencoder() -> None:
    settings = SoftLabels(kind="soft_labels", similarity="uniform", smoothing=0.2)
    table, error = label_table(settings, torch.zeros(0), torch.zeros(0), 5, seed=0)
    assert torch.equal(table, smoothed_labels(5, 0.2)) and error is None


@pytest.mark.parametrize(("shape", "halvings"), [((1, 8, 8), 3), ((3, 32, 24), 3), ((1, 28, 28), 2), ((1, 5, 4), 0)])
def test_how_often_a_size_can_be_halved(shape: tuple[int, ...], halvings: int) -> None:
    assert most_halvings(shape) == halvings


def test_images_too_small_for_so_many_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"autoencoder\.filters has 3 convolutions, .* images are 28 x 28; \[12, 24\] would do"):
        ImageAutoencoder((12, 24, 48), (1, 28, 28))
    with pytest.raises(ValueError, match=r"images are 5 x 4; images of an even size would do"):
        ImageAutoencoder((12,), (1, 5, 4))
