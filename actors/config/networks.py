"""Configuration schema of small classifiers that are made from scratch. Imports no torch."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from losses.section import Section


class TextMlp(Section):
    """Averaged token embeddings and one hidden layer."""

    kind: Literal["text_mlp"]

    width: int = Field(default=16, ge=1)
    """Size of a token's embedding."""

    hidden: int = Field(default=32, ge=1)
    """Units of the hidden layer."""

    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Dropout before the output layer."""


class TextCnn(Section):
    """Token embeddings, convolutions of several widths over them, and the largest response of each (arXiv 1408.5882)."""

    kind: Literal["text_cnn"]

    width: int = Field(default=16, ge=1)
    """Size of a token's embedding."""

    filters: int = Field(default=16, ge=1)
    """Filters of each width."""

    kernels: tuple[int, ...] = (1, 2, 3)
    """Widths of the filters, in tokens."""

    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Dropout before the output layer."""

    @field_validator("kernels")
    @classmethod
    def _kernels_are_widths(cls, kernels: tuple[int, ...]) -> tuple[int, ...]:
        if not kernels or min(kernels) < 1:
            raise ValueError(f"kernels {list(kernels)} must be widths of at least one token; [1, 2, 3] would do")
        return kernels


class TextRnn(Section):
    """Token embeddings and a bidirectional GRU; the mean of its states is classified."""

    kind: Literal["text_rnn"]

    width: int = Field(default=16, ge=1)
    """Size of a token's embedding."""

    hidden: int = Field(default=16, ge=1)
    """Units of the GRU, in each direction."""

    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Dropout before the output layer."""


class ImageCnn(Section):
    """Convolutions of 3 x 3, each but the first with stride 2, and the mean over all places."""

    kind: Literal["image_cnn"]

    channels: int = Field(default=16, ge=1)
    """Channels of the first convolution; each further one has twice as many."""

    layers: int = Field(default=2, ge=1)
    """Number of convolutions."""


class ImageResnet(Section):
    """A small residual network: a convolution, then stages of residual blocks (arXiv 1512.03385)."""

    kind: Literal["image_resnet"]

    channels: int = Field(default=16, ge=1)
    """Channels of the first stage; each further one has twice as many, at half the size."""

    stages: int = Field(default=2, ge=1)
    """Number of stages."""

    blocks: int = Field(default=1, ge=1)
    """Residual blocks of a stage."""


class Autoencoder(Section):
    """A convolutional autoencoder whose codes say how alike classes are (ReffAKD, arXiv 2404.09886)."""

    filters: tuple[int, ...] = (12, 24, 48)
    """Filters of its convolutions, each 4 x 4 with stride 2, as in the paper; images of a few pixels allow fewer. Of texts the
    last is the size of the one hidden layer."""

    epochs: int = Field(default=10, ge=1)
    """Passes over the training rows."""

    batch_rows: int = Field(default=64, ge=1)
    """Rows of a step."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Of Adam."""

    pairs: int = Field(default=2000, ge=1)
    """Pairs of rows of two classes, drawn at random, whose similarity is averaged; all where there are fewer."""

    @field_validator("filters")
    @classmethod
    def _there_are_filters(cls, filters: tuple[int, ...]) -> tuple[int, ...]:
        if not filters or min(filters) < 1:
            raise ValueError(f"filters {list(filters)} must be numbers of at least 1; [12, 24, 48] are the paper's")
        return filters


class SoftLabels(Section):
    """No model but one distribution over the labels for each label, which teaches in a teacher's place (ReffAKD)."""

    kind: Literal["soft_labels"]
    """``soft_labels``, for teachers alone."""

    similarity: Literal["autoencoder", "uniform", "file"] = "autoencoder"
    """``autoencoder``: the mean cosine similarity of the codes of two classes. ``uniform``: label smoothing, the control.
    ``file``: none, the distributions stand in ``table``."""

    table: str | None = None
    """With ``file``: a JSON file, ``{label: {label: probability}}``, with a distribution for each label."""

    diagonal_boost: float = Field(default=0.0225, ge=0.0)
    """Added to the similarity of each class with itself before the soft-max (the paper's notebook: 0.0225)."""

    temperature: float = Field(default=1.0, gt=0.0)
    """Similarities are divided by it before the soft-max; lower is sharper. The paper has 1."""

    smoothing: float = Field(default=0.1, gt=0.0, lt=1.0)
    """With ``uniform``: the mass that is spread evenly over all labels."""

    autoencoder: Autoencoder = Autoencoder()
    """Its shape and training, with ``autoencoder``."""

    @model_validator(mode="after")
    def _knobs_act(self) -> "SoftLabels":
        for name, kind in (("smoothing", "uniform"), ("diagonal_boost", "autoencoder"), ("temperature", "autoencoder")):
            if name in self.model_fields_set and self.similarity != kind:
                default = type(self).model_fields[name].default
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} {getattr(self, name)} acts with similarity {kind} alone; leave it out, or {kind} would do"
                    )
        if self.similarity == "file" and self.table is None:
            raise ValueError("similarity file reads the distributions from table, which is null; table=labels.json would do")
        if self.similarity != "file" and self.table is not None:
            raise ValueError(f"table {self.table} is read with similarity file alone; leave it out, or file would do")
        return self


TEXT_NETWORKS = ("text_mlp", "text_cnn", "text_rnn")
IMAGE_NETWORKS = ("image_cnn", "image_resnet")
Network = TextMlp | TextCnn | TextRnn | ImageCnn | ImageResnet
"""A small classifier made from scratch."""
