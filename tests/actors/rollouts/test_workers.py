"""Samplers as actors: they have the weights they are called with, whatever becomes of them, and bad ones are found out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.config.models import EngineConfig
from actors.engines.base import EngineDied
from actors.model_source import ModelSource
from actors.rollouts.base import Prompt, Response, Sampler, SamplerSpec, Sampling
from actors.rollouts.sampling_actors import WritingFailed
from actors.rollouts.transformers_sampler import TransformersSampler
from actors.rollouts.weights import Proof
from actors.rollouts.workers import (
    HandOverFailed,
    RolloutWorker,
    RolloutWorkers,
    Weights,
    require_sound,
)
from tests.worlds import tiny_llama

ENGINE = EngineConfig(kind="transformers", dtype="float32", cpus=0.1, max_restarts=1)
ROW = np.arange(1, 13, dtype=np.int32)


def spec_in(folder: Path, **changes: Any) -> SamplerSpec:
    settings: dict[str, Any] = {
        "engine": ENGINE, "model": ModelSource(str(tiny_llama(folder / "first", seed=1))), "sampling": Sampling(6, seed=5),
        "ends": (0,), "longest_prompt": 12,
    }  # fmt: skip
    return SamplerSpec(**{**settings, **changes})


def prompts(count: int, step: int = 4) -> list[Prompt]:
    return [Prompt(ROW[: 2 + row % 5], row, step=step) for row in range(count)]


def weights_of(folder: Path, step: int, seed: int) -> Weights:
    """A version of the weights, with the proof that its trainer would give."""
    model = ModelSource(str(tiny_llama(folder / f"weights-{step}", seed=seed)))
    return Weights(step, model, Proof(ROW, plain(model, folder).logprobs(ROW)))


def plain(model: ModelSource, folder: Path) -> TransformersSampler:
    return TransformersSampler(SamplerSpec(ENGINE, model, Sampling(6, seed=5), (0,), 12))


def texts(responses: Sequence[Response]) -> list[list[int]]:
    return [response.token_ids.tolist() for response in responses]


def test_a_worker_writes_by_the_weights_it_is_called_with(tmp_path: Path) -> None:
    spec = spec_in(tmp_path)
    worker, second = RolloutWorker(spec, None), weights_of(tmp_path, 3, seed=9)
    first = worker.write(Weights(0, spec.model), prompts(4))
    assert first.hand_over is None and texts(first.responses) == texts(plain(spec.model, tmp_path).sample(prompts(4)))
    later = worker.write(second, prompts(4))
    assert later.hand_over is not None and later.hand_over.mean_gap == later.hand_over.largest_gap == 0.0
    assert texts(later.responses) == texts(plain(second.model, tmp_path).sample(prompts(4))) != texts(first.responses)
    assert worker.write(second, prompts(4)).hand_over is None, "they are there already"


class Stale(TransformersSampler):
    """Keeps its first weights, whatever it is given."""

    loaded = False

    def load(self, model: ModelSource) -> None:
        if not self.loaded:
            super().load(model)
        self.loaded = True


def test_weights_that_do_not_arrive_stop_the_run_by_name(tmp_path: Path) -> None:
    worker = RolloutWorker(spec_in(tmp_path), None, Stale)
    with pytest.raises(HandOverFailed, match="the weights after step 3 did not arrive: on 11 tokens sampler and student are"):
        worker.write(weights_of(tmp_path, 3, seed=9), prompts(2))


@pytest.mark.parametrize(("ids", "logprobs", "message"), [
    ([], [], "row 2: the response has 0 tokens; 1 to 6 were asked for"),
    ([1] * 7, [-1.0] * 7, "row 2: the response has 7 tokens; 1 to 6 were asked for"),
    ([1, 90], [-1.0, -2.0], "row 2: the response has token 90; all are below 50"),
    ([1, 2], [-1.0, np.nan], r"row 2: the sampler's log-probabilities of 2 tokens are not all finite and negative: \[-1. nan\]"),
    ([1, 2], [-1.0, 0.5], "not all finite and negative"),
    ([1, 2], [-1.0], "not all finite and negative"),
])  # fmt: skip
def test_responses_that_no_sampler_writes_are_refused(
    tmp_path: Path, ids: list[int], logprobs: list[float], message: str
) -> None:
    response = Response(np.array(ids, np.int32), np.array(logprobs, np.float32), ended=False)
    spec = SamplerSpec(ENGINE, ModelSource("nowhere"), Sampling(6), (0,), 12, ids_below=50)
    with pytest.raises(ValueError, match=message):
        require_sound(Prompt(ROW, 2), response, spec)


@pytest.mark.ray
def test_any_number_of_workers_writes_the_same(tmp_path: Path, local_ray: None) -> None:
    spec, weights = spec_in(tmp_path), weights_of(tmp_path, 2, seed=4)
    expected = texts(plain(weights.model, tmp_path).sample(prompts(5)))
    for count in (1, 3):
        with RolloutWorkers(spec, count, tmp_path / "logs") as workers:
            assert texts(workers.write(weights, prompts(5)).responses) == expected


class DiesIn:
    """Builds samplers that end their process, by a fault of their engine, in a call that a file in the folder counts."""

    def __init__(self, folder: Path, calls: Sequence[int]) -> None:
        self._folder, self._calls = folder, calls

    def __call__(self, spec: SamplerSpec) -> Sampler:
        folder, calls = self._folder, self._calls

        class Dying(TransformersSampler):
            def sample(self, prompts: Sequence[Prompt]) -> list[Response]:
                number = len(list(folder.glob("call-*")))
                (folder / f"call-{number}").touch()
                if number in calls:
                    raise EngineDied("the device is gone")
                return super().sample(prompts)

        return Dying(spec)


@pytest.mark.ray
def test_a_worker_that_dies_is_started_again_and_has_the_latest_weights(tmp_path: Path, local_ray: None) -> None:
    spec, weights = spec_in(tmp_path), weights_of(tmp_path, 2, seed=4)
    (tmp_path / "logs").mkdir()
    with RolloutWorkers(spec, 1, tmp_path / "logs", DiesIn(tmp_path, calls=[1])) as workers:
        workers.write(weights, prompts(3))
        again = workers.write(weights, prompts(3, step=5))
    assert again.hand_over is not None, "it was given the weights anew"
    assert texts(again.responses) == texts(plain(weights.model, tmp_path).sample(prompts(3, step=5)))
    assert "the device is gone" in (tmp_path / "logs" / "sampler-0.log").read_text()


@pytest.mark.ray
def test_a_worker_that_dies_too_often_ends_the_rollouts(tmp_path: Path, local_ray: None) -> None:
    (tmp_path / "logs").mkdir()
    with (
        RolloutWorkers(spec_in(tmp_path), 1, tmp_path / "logs", DiesIn(tmp_path, calls=range(9))) as workers,
        pytest.raises(WritingFailed, match="a sampler died 2 times .* what it printed is in .*logs"),
    ):
        workers.write(weights_of(tmp_path, 2, seed=4), prompts(3))


class Nan(TransformersSampler):
    """Gives log-probabilities that are no numbers."""

    def sample(self, prompts: Sequence[Prompt]) -> list[Response]:
        return [Response(one.token_ids, one.logprobs * np.nan, one.ended) for one in super().sample(prompts)]


class Missing(TransformersSampler):
    """Cannot be built."""

    def __init__(self, spec: SamplerSpec) -> None:
        raise ImportError("there is no such engine")


@pytest.mark.ray
@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Nan, "a sampler failed: ValueError: row 0: the sampler's log-probabilities"),
        (Stale, "a sampler failed: HandOverFailed: the weights after step 2"),
        (Missing, "a sampler failed: ImportError: there is no such engine"),
    ],
    ids=["nan", "stale", "no engine"],
)
def test_what_a_worker_raises_ends_the_rollouts_in_its_words(
    tmp_path: Path, local_ray: None, factory: Callable[[SamplerSpec], Sampler], message: str
) -> None:
    (tmp_path / "logs").mkdir()
    with (
        RolloutWorkers(spec_in(tmp_path), 1, tmp_path / "logs", factory) as workers,
        pytest.raises(WritingFailed, match=message),
    ):
        workers.write(weights_of(tmp_path, 2, seed=4), prompts(3))
