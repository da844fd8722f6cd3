"""A classifier that answers rows that nobody has labelled. B rows, C classes."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from transformers import PreTrainedModel

from actors.config.models import EvaluateConfig
from actors.engines.classifier import row_logprobs
from actors.evaluation.evaluator import load_for_evaluation
from actors.handles import RemoteMethod
from actors.model_source import ModelSource

NO_LABEL = 0  # stands where rows have their label, which no model is shown


class ClassPredictorHandle(Protocol):
    """Handle of the actor that a ``ClassPredictor`` becomes."""

    @property
    def predict(self) -> RemoteMethod[[Sequence[np.ndarray]], np.ndarray]:
        """See ``ClassPredictor.predict``."""
        ...


class ClassPredictor:
    """One classifier on its device. Becomes a Ray actor."""

    def __init__(self, model: ModelSource, evaluate: EvaluateConfig, temperature: float = 1.0) -> None:
        self._source, self._evaluate, self._temperature = model, evaluate, temperature
        self._model: PreTrainedModel | None = None

    def predict(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Return the probabilities of each label, float64 [B, C], for rows of int32 features.

        The model is loaded by the first call and not by the constructor, so that its error arrives as it was raised.

        Raises:
            ValueError: if they are not finite, or a GPU is asked for and there is none.
        """
        if self._model is None:
            self._model = load_for_evaluation(self._source, self._evaluate)
        logprobs = row_logprobs(self._model, [np.append(row, np.int32(NO_LABEL)) for row in rows], self._temperature)
        probabilities: np.ndarray = logprobs.double().softmax(dim=-1).numpy()
        if not np.isfinite(probabilities).all():
            raise ValueError(f"the model in {self._source.name} gives logits that are not finite; its training diverged")
        return probabilities
