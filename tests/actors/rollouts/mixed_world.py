"""Student and teacher that write together in this process; each deals its work to several engines, as their actors do."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType

import numpy as np

from actors.model_source import ModelSource
from actors.rollouts.base import Prompt, SamplerSpec
from actors.rollouts.mixed_writing import MixedWriters
from actors.rollouts.workers import Read, RolloutWorker, Weights, Written, worst_of

ONE_AT_A_TIME = threading.Lock()
"""Student and teacher, elsewhere processes, are threads here, and transformers loads one model at a time in a process."""


class Together:
    """Stands where ``RolloutWorkers`` do."""

    def __init__(self, spec: SamplerSpec, count: int = 1) -> None:
        self.spec, self._workers = spec, [RolloutWorker(spec, None) for _ in range(count)]
        self.calls: list[list[Prompt]] = []
        """Prompts of each round."""
        self.by_step: dict[int, int] = {}
        """Which weights wrote each step."""

    def __enter__(self) -> "Together":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def write(self, weights: Weights, prompts: Sequence[Prompt]) -> Written:
        self.calls.append(list(prompts))
        self.by_step[prompts[0].step] = weights.step
        parts = [prompts[number :: len(self._workers)] for number in range(len(self._workers))]
        with ONE_AT_A_TIME:
            written = [worker.write(weights, part) for worker, part in zip(self._workers, parts, strict=True)]
        responses = [written[row % len(written)].responses[row // len(written)] for row in range(len(prompts))]
        return Written(responses, 0.0, worst_of([one.hand_over for one in written]))

    def logprobs(self, weights: Weights, texts: Sequence[np.ndarray]) -> Read:
        return self._workers[-1].logprobs(weights, texts)


def mixed_writers(student: SamplerSpec, teacher: ModelSource, share: float) -> MixedWriters:
    """Both, of whom the teacher draws a share of the tokens."""
    return MixedWriters(Together(student), Together(replace(student, model=teacher)), share)  # type: ignore[arg-type]
