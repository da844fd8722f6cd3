"""Soft labels without a teacher: how alike classes are, by the codes of an autoencoder (ReffAKD, arXiv 2404.09886).

B rows, D numbers of a code, C classes.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from actors.config.networks import Autoencoder, SoftLabels

KERNEL, STRIDE, PADDING = 4, 2, 1  # each convolution halves the size


class ImageAutoencoder(nn.Module):
    """Convolutions that halve the size, and transposed ones that double it again."""

    def __init__(self, filters: tuple[int, ...], image_shape: tuple[int, ...]) -> None:
        """Raises: ValueError if the images are too small for so many convolutions, or their size is no multiple."""
        super().__init__()
        layers = most_halvings(image_shape)
        if len(filters) > layers:
            raise ValueError(
                f"teacher.model.autoencoder.filters has {len(filters)} convolutions, each of which halves the size, and images "
                f"are {image_shape[1]} x {image_shape[2]}; {list(filters[:layers]) or 'images of an even size'} would do"
            )
        widths = [image_shape[0], *filters]
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            encoder += [nn.Conv2d(before, after, KERNEL, STRIDE, PADDING), nn.ReLU()]
        for before, after in itertools.pairwise(reversed(widths)):
            decoder += [nn.ConvTranspose2d(before, after, KERNEL, STRIDE, PADDING), nn.ReLU()]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder[:-1])

    def codes(self, images: Tensor) -> Tensor:
        """Return the codes [B, D] of images."""
        return self.encoder(images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Return images as they are after encoding and decoding."""
        return self.decoder(self.encoder(images))


def most_halvings(image_shape: tuple[int, ...]) -> int:
    """Return how often the size of images [channels, height, width] can be halved."""
    halvings = 0
    while not any(size % STRIDE ** (halvings + 1) for size in image_shape[1:]):
        halvings += 1
    return halvings


class BagAutoencoder(nn.Module):
    """The analogue for texts: the shares of a text's tokens, through one hidden layer and back."""

    def __init__(self, vocab_size: int, code_size: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(vocab_size, code_size), nn.ReLU())
        self.decoder = nn.Linear(code_size, vocab_size)

    def codes(self, bags: Tensor) -> Tensor:
        """Return the codes [B, D] of bags [B, V]."""
        return self.encoder(bags)

    def forward(self, bags: Tensor) -> Tensor:
        """Return bags as they are after encoding and decoding."""
        return self.decoder(self.encoder(bags))


def fit_autoencoder(model: nn.Module, rows: Tensor, settings: Autoencoder, seed: int) -> float:
    """Fit an autoencoder to rows by Adam; return its last epoch's mean squared error."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    error = 0.0
    for _ in range(settings.epochs):
        total = 0.0
        for batch in torch.randperm(len(rows)).split(settings.batch_rows):
            loss = mse_loss(model(rows[batch]), rows[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(batch)
        error = total / len(rows)
    return error


def class_similarities(codes: Tensor, labels: Tensor, classes: int, pairs: int, seed: int) -> Tensor:
    """Return the mean cosine similarity [C, C] of the codes [B, D] of two classes.

    Args:
        codes: of all rows.
        labels: int64 [B], the rows' classes; each class has a row.
        classes: C.
        pairs: how many pairs of each two classes are looked at, drawn with repetition; all where there are fewer. A row is never
            paired with itself, but where its class has no other.
        seed: draws the pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    directions, similarities = normalize(codes.double(), dim=1), torch.zeros(classes, classes, dtype=torch.float64)
    members = [torch.nonzero(labels == label).flatten() for label in range(classes)]
    for one, other in itertools.combinations_with_replacement(range(classes), 2):
        first, second = torch.cartesian_prod(members[one], members[other]).unbind(dim=1)
        if one == other and len(members[one]) > 1:
            first, second = first[first != second], second[first != second]
        if len(first) > pairs:
            drawn = torch.randint(len(first), (pairs,), generator=generator)
            first, second = first[drawn], second[drawn]
        mean = (directions[first] * directions[second]).sum(dim=1).mean()
        similarities[one, other] = similarities[other, one] = mean
    return similarities


def soft_labels(similarities: Tensor, diagonal_boost: float, temperature: float) -> Tensor:
    """Return log-probabilities [C, C]: the soft-max of each class's similarities, that with itself raised by the boost."""
    boosted = similarities + diagonal_boost * torch.eye(len(similarities), dtype=similarities.dtype)
    return (boosted / temperature).log_softmax(dim=1)


def smoothed_labels(classes: int, smoothing: float) -> Tensor:
    """Return log-probabilities [C, C]: each label itself, but for ``smoothing`` that is spread evenly over all labels."""
    uniform = torch.full((classes, classes), smoothing / classes, dtype=torch.float64)
    return (uniform + (1 - smoothing) * torch.eye(classes, dtype=torch.float64)).log()


def label_table(settings: SoftLabels, rows: Tensor, labels: Tensor, classes: int, seed: int) -> tuple[Tensor, float | None]:
    """Return a table of soft labels, float64 log-probabilities [C, C], and the error of the autoencoder if there is one.

    Args:
        settings: how it is made.
        rows: float32, images [B, channels, height, width] or bags of tokens [B, V].
        labels: int64 [B].
        classes: C.
        seed: draws weights, order and pairs.
    """
    assert settings.similarity != "file", "that is read, not made"
    if settings.similarity == "uniform":
        return smoothed_labels(classes, settings.smoothing), None
    torch.manual_seed(seed)
    is_image = rows.dim() == 4
    filters = settings.autoencoder.filters
    model = ImageAutoencoder(filters, tuple(rows.shape[1:])) if is_image else BagAutoencoder(rows.shape[1], filters[-1])
    error = fit_autoencoder(model, rows, settings.autoencoder, seed)
    with torch.no_grad():
        codes = torch.cat([model.codes(batch) for batch in rows.split(settings.autoencoder.batch_rows)])
    similarities = class_similarities(codes, labels, classes, settings.autoencoder.pairs, seed)
    return soft_labels(similarities, settings.diagonal_boost, settings.temperature), error
