"""The engine of teachers that classify: one distribution over the labels for each row. B rows, C classes."""

from collections.abc import Sequence

import numpy as np
import torch

from actors.engines.base import TeacherSpec, require_top_k, scores_from_likeliest
from actors.models import load_model
from actors.networks.classifier import class_logits
from actors.records import Example, TeacherScores

PADDING = 0


class ClassifierEngine:
    """Scores rows with a sequence classifier; log-probabilities are computed in float32 whatever the weights are."""

    def __init__(self, spec: TeacherSpec) -> None:
        self._device = torch.device("cuda" if spec.engine.gpu else "cpu")
        self._model = load_model(spec.model, getattr(torch, spec.engine.dtype)).eval().to(self._device)
        self.vocab_size: int = self._model.config.num_labels
        require_top_k(spec.top_k, self.vocab_size)
        self._spec = spec
        self.way = f"transformers, {spec.engine.dtype}, {self.vocab_size} classes"

    @torch.inference_mode()
    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        """Return the scores of each example, in their order."""
        width = max(len(example.token_ids) for example in examples)
        token_ids = torch.full((len(examples), width), PADDING, dtype=torch.long)
        attention_mask = torch.zeros_like(token_ids)
        for row, example in enumerate(examples):
            token_ids[row, : len(example.token_ids)] = torch.from_numpy(example.token_ids.astype(np.int64))
            attention_mask[row, : len(example.token_ids)] = 1
        label_positions = torch.arange(len(examples)) * width + attention_mask.sum(dim=1) - 1
        given = (tensor.to(self._device) for tensor in (token_ids, attention_mask, label_positions))
        logits = class_logits(self._model, *given).float() / self._spec.temperature  # [B, C]
        logprobs = logits.log_softmax(dim=-1).cpu()
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
