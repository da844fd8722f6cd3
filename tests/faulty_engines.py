"""Teachers' engines with a fault each, built through the seam of the pool."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from actors.engines.base import TeacherEngine, TeacherSpec, scores_from_likeliest
from actors.engines.build import build_engine
from actors.engines.classifier import ClassifierEngine
from actors.engines.transformers import TransformersEngine
from actors.model_source import ModelSource
from actors.records import Example, TeacherScores

TOP_K = 8


@dataclass(frozen=True)
class Serves:
    """Serves another model than it was asked for."""

    model: Path

    def __call__(self, spec: TeacherSpec) -> TeacherEngine:
        return build_engine(replace(spec, model=ModelSource(str(self.model))))


@dataclass(frozen=True)
class DiesOnce:
    """Ends the process of the first replica at its first rows."""

    marker: Path

    def __call__(self, spec: TeacherSpec) -> TeacherEngine:
        return build_engine(spec) if self.marker.exists() else LostEngine(spec, self.marker)


class LostEngine(TransformersEngine):
    """Ends its process at its first rows, and leaves a file."""

    def __init__(self, spec: TeacherSpec, marker: Path) -> None:
        super().__init__(spec)
        self._marker = marker

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        self._marker.touch()
        os._exit(1)


class ShiftedEngine(TransformersEngine):
    """Reads each target's distribution one position too late."""

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        return [self._score_shifted(example) for example in examples]

    @torch.inference_mode()
    def _score_shifted(self, example: Example) -> TeacherScores:
        logits = self._model(torch.from_numpy(example.token_ids[None].astype(np.int64))).logits[0]
        logprobs = logits[example.target_positions].float().log_softmax(dim=1)
        gold = logprobs.gather(1, torch.from_numpy(example.targets.astype(np.int64))[:, None])[:, 0]
        top = logprobs.topk(TOP_K + 1, dim=1)
        scores = scores_from_likeliest(example, gold.numpy(), top.indices.numpy(), top.values.numpy(), self._spec)
        assert scores is not None
        return scores


class SwappingEngine(TransformersEngine):
    """Gives the right top-K tokens the probabilities of each other."""

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        return [replace(scores, topk_ids=scores.topk_ids[:, ::-1].copy()) for scores in super().score(examples)]


class RepeatingEngine(TransformersEngine):
    """Names the likeliest token twice."""

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        found = super().score(examples)
        for scores in found:
            scores.topk_ids[:, 1] = scores.topk_ids[:, 0]
        return found


class CrowdedEngine(TransformersEngine):
    """Lets a row's scores depend on how many rows stand beside it."""

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        found = super().score(examples)
        return found if len(found) == 1 else [replace(one, target_logprob=one.target_logprob - 0.05) for one in found]


class RolledLabels(ClassifierEngine):
    """Gives each label the log-probability of the one before it."""

    def _scores_of(self, example: Example, logprobs: torch.Tensor) -> TeacherScores:
        return super()._scores_of(example, logprobs.roll(1))


class HotLabels(ClassifierEngine):
    """Divides logits by a temperature that the teacher does not have."""

    def _scores_of(self, example: Example, logprobs: torch.Tensor) -> TeacherScores:
        return super()._scores_of(example, (logprobs / 1.25).log_softmax(dim=0))


class SwappedLabels(ClassifierEngine):
    """Gives a row's other labels the log-probabilities of each other."""

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        return [replace(scores, topk_ids=scores.topk_ids[:, ::-1].copy()) for scores in super().score(examples)]


class CrowdedLabels(ClassifierEngine):
    """Lets a row's scores depend on how many rows stand beside it."""

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        found = super().score(examples)
        return found if len(found) == 1 else [replace(one, target_logprob=one.target_logprob - 0.05) for one in found]
