"""A classifier's predictions for the rows of a batch, whichever part of the house asks. B rows, C classes."""

from torch import Tensor
from transformers import PreTrainedModel

from actors.dataloader.collator import MicroBatch
from actors.networks.classifier import class_logits


def row_logits(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Return logits [B, C]; the labels behind the rows' features are not shown to the model."""
    assert batch.attention_mask is not None, "rows of classifiers are not packed"
    return class_logits(model, batch.token_ids, batch.attention_mask, batch.predicting + 1)
