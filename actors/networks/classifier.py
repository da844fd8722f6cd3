"""Classifiers as transformers knows them: small networks of ours beside its own, loaded, saved and called alike.

B rows, T tokens of a row with its label as the last, C classes. A row of an image has the bits of its float32 values in the
place of tokens, and its label behind them.
"""

from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from actors.config.networks import IMAGE_NETWORKS, ImageCnn, ImageResnet, Network, TextCnn, TextMlp, TextRnn
from actors.networks.image import ImageCnnNetwork, ImageResnetNetwork
from actors.networks.label_table import LabelTable
from actors.networks.text import TextCnnNetwork, TextMlpNetwork, TextRnnNetwork

LABEL_TABLE = "label_table"


class SmallClassifierConfig(PreTrainedConfig):
    """``config.json`` of a small classifier.

    Args:
        network: the section of the configuration that says its shape, dumped; ``{kind: label_table}`` for a table.
        vocab_size: tokens of its vocabulary; 0 where it reads none.
        image_shape: channels, height and width; empty where it sees no images.
        settings: what every configuration of transformers takes, ``num_labels`` among it.
    """

    model_type = "small_classifier"

    def __init__(
        self, network: dict[str, Any] | None = None, vocab_size: int = 0, image_shape: tuple[int, ...] = (), **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.network, self.vocab_size, self.image_shape = network or {"kind": LABEL_TABLE}, vocab_size, tuple(image_shape)


class SmallClassifier(PreTrainedModel):
    """A small network behind the interface of a sequence classifier of transformers."""

    config_class = SmallClassifierConfig
    base_model_prefix = "network"
    main_input_name = "input_ids"

    def __init__(self, config: SmallClassifierConfig) -> None:
        super().__init__(config)
        self.network = network_of(config)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:  # fmt: skip
        """Return logits [B, C] of tokens [B, T] with their mask, of images [B, channels, height, width], or of labels [B]."""
        match self.config.network["kind"]:
            case kind if kind in IMAGE_NETWORKS:
                logits = self.network(pixel_values)
            case "label_table":
                logits = self.network(labels)
            case _:
                assert input_ids is not None, "texts are tokens"
                logits = self.network(input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        return SequenceClassifierOutput(logits=logits)

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the weights that each layer drew of itself."""


def network_of(config: SmallClassifierConfig) -> nn.Module:
    """Return the network that a configuration describes, its weights drawn at random."""
    classes, vocab_size = config.num_labels, config.vocab_size
    if config.network["kind"] == LABEL_TABLE:
        return LabelTable(classes)
    shape: Network = TypeAdapter(Network).validate_python(config.network)
    match shape:
        case TextMlp():
            return TextMlpNetwork(shape, vocab_size, classes)
        case TextCnn():
            return TextCnnNetwork(shape, vocab_size, classes)
        case TextRnn():
            return TextRnnNetwork(shape, vocab_size, classes)
        case ImageCnn():
            return ImageCnnNetwork(shape, config.image_shape[0], classes)
        case ImageResnet():
            return ImageResnetNetwork(shape, config.image_shape[0], classes)


def register() -> None:
    """Let transformers load small classifiers like its own."""
    AutoConfig.register(SmallClassifierConfig.model_type, SmallClassifierConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(SmallClassifierConfig, SmallClassifier, exist_ok=True)


def class_logits(model: PreTrainedModel, token_ids: Tensor, attention_mask: Tensor, label_positions: Tensor) -> Tensor:
    """Return logits [B, C] of rows without showing their labels to the model, unless it is a table that reads nothing else.

    Args:
        model: a classifier.
        token_ids: int64 [B, T], padded on the right; each row's label stands behind its features.
        attention_mask: int64 [B, T], 0 on padding.
        label_positions: int64 [B], flat positions in [B * T] of the labels.
    """
    kind = model.config.network["kind"] if isinstance(model.config, SmallClassifierConfig) else None
    labels = token_ids.flatten()[label_positions]
    if kind == LABEL_TABLE:
        return model(labels=labels).logits
    if kind in IMAGE_NETWORKS:
        return model(pixel_values=images_of(token_ids[:, :-1], model.config.image_shape)).logits
    padding = getattr(model.config, "pad_token_id", None) or 0
    features = token_ids.flatten().index_fill(0, label_positions, padding).view_as(token_ids)[:, :-1]
    seen = attention_mask.flatten().index_fill(0, label_positions, 0).view_as(attention_mask)[:, :-1]
    return model(input_ids=features.masked_fill(seen == 0, padding), attention_mask=seen).logits


def images_of(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return float32 [B, channels, height, width] from the bits of their values, int64 [B, channels * height * width]."""
    return bits.to(torch.int32).view(torch.float32).view(len(bits), *shape)


register()
