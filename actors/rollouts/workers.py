"""Actors that write responses by the student's latest weights, and the driver's way to them. T tokens of a proof."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import numpy as np
import ray

from actors.config.models import DType
from actors.handles import RemoteMethod
from actors.model_source import ModelSource
from actors.records import NO_TOKEN
from actors.rollouts.base import Prompt, Response, Sampler, SamplerFactory, SamplerSpec, most_tokens
from actors.rollouts.build import build_sampler
from actors.rollouts.sampling_actors import CLOSE_SECONDS, actor_options, failures_in_words, process_ends_with_engine
from actors.rollouts.weight_copies import on_this_node
from actors.rollouts.weights import Proof
from actors.teacher.replica import print_into

Work = TypeVar("Work")

MOST_NATS: dict[DType, float] = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.1}
"""Between sampler and trainer, averaged over the tokens of a proof, by the type in which the sampler computes. SmolLM2-135M in
vLLM on a CPU lay 1e-5, 0.004 and 0.03 from float32."""


class HandOverFailed(ValueError):
    """A sampler does not predict what the student whose weights it was given predicts."""


@dataclass(frozen=True, slots=True)
class Weights:
    """By which weights a response is written."""

    step: int
    """After which optimizer step they were taken."""
    model: ModelSource
    """Where they are; those in object storage are copied to the sampler's node."""
    proof: Proof | None = None
    """What the student itself predicts with them; None for those it begins with."""


@dataclass(frozen=True, slots=True)
class HandOver:
    """How weights came to a sampler."""

    seconds: float = 0.0
    """To load them and to compare."""
    mean_gap: float = 0.0
    """Between the log-probabilities of sampler and trainer, over the tokens of the proof, in nats."""
    largest_gap: float = 0.0
    """The same, of one token."""


@dataclass(frozen=True, slots=True)
class Written:
    """Responses of a call."""

    responses: list[Response]
    """In the order of the prompts."""
    seconds: float
    """Spent sampling, by the worker that took longest."""
    hand_over: HandOver | None = None
    """Of the weights, if they were new; the worst of the workers'."""


@dataclass(frozen=True, slots=True)
class Read:
    """What a call read."""

    logprobs: list[np.ndarray]
    """Of each token of each text but its first, float32 [T-1]."""
    hand_over: HandOver | None = None
    """Of the weights, if they were new; the worst of the workers'."""


class RolloutWorker:
    """One engine that writes by the weights it is given. Becomes a Ray actor."""

    def __init__(self, spec: SamplerSpec, log: Path | None, sampler_factory: SamplerFactory = build_sampler) -> None:
        if log is not None:
            print_into(log)
        self._spec, self._sampler_factory = spec, sampler_factory
        self._sampler: Sampler | None = None
        self._loaded = 0

    def write(self, weights: Weights, prompts: Sequence[Prompt]) -> Written:
        """Respond to prompts, by these weights.

        Raises:
            HandOverFailed: if the engine, once it has them, predicts something else than the student.
            ValueError: naming the row of a response that cannot come from a working sampler.
        """
        with process_ends_with_engine():
            sampler, hand_over = self._with(weights)
            started = time.perf_counter()
            responses = sampler.sample(prompts)
        seconds = time.perf_counter() - started
        for prompt, response in zip(prompts, responses, strict=True):
            require_sound(prompt, response, self._spec)
        return Written(responses, seconds, hand_over)

    def logprobs(self, weights: Weights, texts: Sequence[np.ndarray]) -> Read:
        """Return the log-probability of each token of texts but their first, by these weights.

        Raises:
            HandOverFailed: if the engine, once it has them, predicts something else than the student.
        """
        with process_ends_with_engine():
            sampler, hand_over = self._with(weights)
            return Read([sampler.logprobs(text) for text in texts], hand_over)

    def start(self) -> None:
        """Build the engine, not yet in the constructor, so that its error arrives as it was raised; ``write`` does so too."""
        with process_ends_with_engine():
            self._started()

    def close(self) -> None:
        """Give the device back."""
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None

    def _with(self, weights: Weights) -> tuple[Sampler, HandOver | None]:
        """Return the engine with these weights, and how they came to it if they were new."""
        sampler = self._started()
        return sampler, self._load(sampler, weights) if weights.step != self._loaded else None

    def _started(self) -> Sampler:
        if self._sampler is None:
            self._sampler = self._sampler_factory(self._spec)
        return self._sampler

    def _load(self, sampler: Sampler, weights: Weights) -> HandOver:
        started = time.perf_counter()
        sampler.load(on_this_node(weights.model))
        self._loaded = weights.step
        if weights.proof is None:
            return HandOver(time.perf_counter() - started)
        gaps = np.abs(sampler.logprobs(weights.proof.token_ids) - weights.proof.logprobs)
        mean, largest, most = float(gaps.mean()), float(gaps.max()), MOST_NATS[self._spec.engine.dtype]
        if not mean <= most:
            raise HandOverFailed(
                f"the weights after step {weights.step} did not arrive: on {len(gaps)} tokens sampler and student are "
                f"{mean:.2e} nats apart (may {most:g} in {self._spec.engine.dtype}), at most {largest:.2e}; "
                "rollouts.engine.kind=transformers would do, if vLLM does not serve this model as it is"
            )
        return HandOver(time.perf_counter() - started, mean, largest)


class RolloutWorkerHandle(Protocol):
    """Handle of the actor that a ``RolloutWorker`` becomes."""

    @property
    def write(self) -> RemoteMethod[[Weights, Sequence[Prompt]], Written]:
        """See ``RolloutWorker.write``."""
        ...

    @property
    def logprobs(self) -> RemoteMethod[[Weights, Sequence[np.ndarray]], Read]:
        """See ``RolloutWorker.logprobs``."""
        ...

    @property
    def start(self) -> RemoteMethod[[], None]:
        """See ``RolloutWorker.start``."""
        ...

    @property
    def close(self) -> RemoteMethod[[], None]:
        """See ``RolloutWorker.close``."""
        ...


@dataclass
class RolloutWorkers:
    """All samplers of a run. A context manager; it ends its actors."""

    spec: SamplerSpec
    """What each is built from."""
    count: int
    """How many there are."""
    logs: Path
    """Folder in which each leaves what its engine prints."""
    sampler_factory: SamplerFactory = build_sampler
    """Builds the engine inside the actor; picklable."""
    name: str = "sampler"
    """What each is called in errors, and in the name of what it prints."""
    _actors: list[RolloutWorkerHandle] = field(default_factory=list)

    def __enter__(self) -> "RolloutWorkers":
        actor = ray.remote(RolloutWorker).options(**actor_options(self.spec.engine))
        self._actors = [
            actor.remote(self.spec, self.logs / f"{self.name.replace(' ', '-')}-{number}.log", self.sampler_factory)
            for number in range(self.count)
        ]
        for one in self._actors:
            one.start.remote()  # whoever writes first waits for it, and has its error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            ray.wait([actor.close.remote() for actor in self._actors], num_returns=self.count, timeout=CLOSE_SECONDS)
        for actor in self._actors:
            ray.kill(actor)

    def write(self, weights: Weights, prompts: Sequence[Prompt]) -> Written:
        """Respond to prompts, each worker to a part of them; a worker that dies is started again and begins its part anew.

        Raises:
            WritingFailed: if one died too often, or raised.
        """
        calls = [actor.write.remote(weights, part) for actor, part in self._dealt(prompts)]
        with failures_in_words(f"a {self.name}", self.spec.engine, self.logs):
            written: list[Written] = ray.get(calls)
        return Written(
            [response for one in written for response in one.responses],
            max(one.seconds for one in written),
            worst_of([one.hand_over for one in written]),
        )

    def logprobs(self, weights: Weights, texts: Sequence[np.ndarray]) -> Read:
        """Read texts by these weights, each worker a part of them.

        Raises:
            WritingFailed: if one died too often, or raised.
        """
        calls = [actor.logprobs.remote(weights, part) for actor, part in self._dealt(texts)]
        with failures_in_words(f"a {self.name}", self.spec.engine, self.logs):
            read: list[Read] = ray.get(calls)
        return Read([logprobs for one in read for logprobs in one.logprobs], worst_of([one.hand_over for one in read]))

    def _dealt(self, work: Sequence[Work]) -> list[tuple[RolloutWorkerHandle, Sequence[Work]]]:
        """Return each worker with its part of the work; those for whom there is none are left out."""
        bounds = np.linspace(0, len(work), self.count + 1).round().astype(int)
        parts = [work[first:last] for first, last in zip(bounds, bounds[1:], strict=False)]
        return [(actor, part) for actor, part in zip(self._actors, parts, strict=True) if len(part)]


def worst_of(hand_overs: Sequence[HandOver | None]) -> HandOver | None:
    """Return the one of the largest mean gap; None where there was none."""
    return max((one for one in hand_overs if one is not None), key=lambda one: one.mean_gap, default=None)


def require_sound(prompt: Prompt, response: Response, spec: SamplerSpec) -> None:
    """Raise if no working sampler writes such a response.

    Raises:
        ValueError: naming the row and what is wrong.
    """
    ids, logprobs, most = response.token_ids, response.logprobs, most_tokens(spec.sampling, prompt)
    if not 1 <= len(ids) <= most:
        raise ValueError(f"row {prompt.row}: the response has {len(ids)} tokens; 1 to {most} were asked for")
    if spec.candidates:
        require_sound_candidates(prompt, response, spec)
    if spec.ids_below is not None and (ids >= spec.ids_below).any():
        raise ValueError(f"row {prompt.row}: the response has token {ids.max()}; all are below {spec.ids_below}")
    if len(logprobs) != len(ids) or not np.isfinite(logprobs).all() or (logprobs > 1e-3).any():
        raise ValueError(
            f"row {prompt.row}: the sampler's log-probabilities of {len(ids)} tokens are not all finite and negative: "
            f"{np.array2string(logprobs, precision=3, threshold=8)}"
        )


def require_sound_candidates(prompt: Prompt, response: Response, spec: SamplerSpec) -> None:
    """Raise if the tokens that a response says were most likely cannot be.

    Raises:
        ValueError: naming the row and what is wrong.
    """
    found, shape = response.candidates, (len(response.token_ids), spec.candidates)
    if found is None or found.shape != shape:
        seen = "none" if found is None else f"those of the shape {list(found.shape)}"
        raise ValueError(f"row {prompt.row}: the response has {seen} of the most likely tokens; {list(shape)} were asked for")
    lowest, highest = int(found.min()), int(found.max())
    if lowest < NO_TOKEN or (spec.ids_below is not None and highest >= spec.ids_below):
        wrong = lowest if lowest < NO_TOKEN else highest
        raise ValueError(f"row {prompt.row}: a most likely token is {wrong}; all are from 0 and below {spec.ids_below}")
