"""The engine of teachers that classify: one distribution over the labels for each row. B rows, C classes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.engines.base import TeacherSpec, require_top_k, scores_from_likeliest
from actors.models import load_model
from actors.networks.classifier import class_logits
from actors.records import Example, TeacherScores

PADDING = 0


@torch.inference_mode()
def row_logprobs(model: PreTrainedModel, rows: Sequence[np.ndarray], temperature: float = 1.0) -> Tensor:
    """Return a classifier's log-probabilities of rows, float32 [B, C] on the CPU.

    Args:
        model: a classifier, on any device.
        rows: int32 each, features and behind them a label, which the model is not shown.
        temperature: by which its logits are divided.
    """
    width = max(map(len, rows))
    token_ids = torch.full((len(rows), width), PADDING, dtype=torch.long)
    attention_mask = torch.zeros_like(token_ids)
    for place, row in enumerate(rows):
        token_ids[place, : len(row)] = torch.from_numpy(row.astype(np.int64))
        attention_mask[place, : len(row)] = 1
    label_positions = torch.arange(len(rows)) * width + attention_mask.sum(dim=1) - 1
    given = (tensor.to(model.device) for tensor in (token_ids, attention_mask, label_positions))
    return (class_logits(model, *given).float() / temperature).log_softmax(dim=-1).cpu()


class ClassifierEngine:
    """Scores rows with a sequence classifier; log-probabilities are computed in float32 whatever the weights are."""

    def __init__(self, spec: TeacherSpec) -> None:
        self._device = torch.device("cuda" if spec.engine.gpu else "cpu")
        self._model = load_model(spec.model, getattr(torch, spec.engine.dtype)).eval().to(self._device)
        self.vocab_size: int = self._model.config.num_labels
        require_top_k(spec.top_k, self.vocab_size)
        self._spec = spec
        self.way = f"transformers, {spec.engine.dtype}, {self.vocab_size} classes"

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        """Return the scores of each example, in their order."""
        logprobs = row_logprobs(self._model, [example.token_ids for example in examples], self._spec.temperature)
        return [self._scores_of(example, logprobs[row]) for row, example in enumerate(examples)]

    def close(self) -> None:
        """Give the memory back."""
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _scores_of(self, example: Example, logprobs: torch.Tensor) -> TeacherScores:
        ranked = logprobs.sort(descending=True)
        target_logprob = logprobs[torch.from_numpy(example.targets.astype(np.int64))]
        scores = scores_from_likeliest(
            example, target_logprob.numpy(), ranked.indices[None].numpy(), ranked.values[None].numpy(), self._spec
        )
        assert scores is not None, "all classes are named"
        return scores
