"""Text that student and teacher write by token: drawn from the mixture of the two, and the same whoever is asked."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.config.models import EngineConfig
from actors.dataloader.row_sources import written_by_student
from actors.model_source import ModelSource
from actors.rollouts.base import Prompt, Response, SamplerSpec, Sampling
from actors.rollouts.mixed_writing import MixedWriters, mixture_logprobs, tossed_to_teacher
from actors.rollouts.sampling_actors import WritingFailed
from actors.rollouts.step_writer import numbers_of, sampled_from
from actors.rollouts.transformers_sampler import TransformersSampler
from actors.rollouts.weights import Proof
from actors.rollouts.workers import RolloutWorkers, Weights
from tests.actors.rollouts.mixed_world import Together
from tests.actors.rollouts.step_world import TOP_K
from tests.fakes import expected_scores, fake_examples
from tests.worlds import tiny_llama

ENGINE = EngineConfig(kind="transformers", dtype="float32", cpus=0.1, max_restarts=1)
ROW = np.arange(1, 13, dtype=np.int32)
ENDS = (0, 7, 19)
SHARE = 0.3


def specs_in(folder: Path, most: int = 12, ids_below: int | None = None, ends: tuple[int, ...] = ENDS) -> list[SamplerSpec]:
    """Of student and teacher."""
    return [
        SamplerSpec(ENGINE, ModelSource(str(tiny_llama(folder / name, seed=seed))), Sampling(most, seed=5), ends, 12, ids_below)
        for name, seed in (("student", 1), ("teacher", 2))
    ]


def writers(specs: list[SamplerSpec], counts: tuple[int, int] = (1, 1), share: float = SHARE) -> MixedWriters:
    student, teacher = (Together(spec, count) for spec, count in zip(specs, counts, strict=True))
    return MixedWriters(student, teacher, share)  # type: ignore[arg-type]


def prompts(count: int, step: int = 4) -> list[Prompt]:
    return [Prompt(ROW[: 2 + row % 5], row, step=step) for row in range(count)]


def whole(responses: list[Response]) -> list[tuple[list[int], list[float], bool]]:
    return [(one.token_ids.tolist(), one.logprobs.tolist(), one.ended) for one in responses]


def test_who_draws_a_token_follows_from_numbers_alone() -> None:
    sampling = Sampling(2000, seed=5)
    tosses = tossed_to_teacher(sampling, Prompt(ROW, 3, step=2), 0.2)
    assert tosses.shape == (2000,) and abs(tosses.mean() - 0.2) < 0.05
    assert np.array_equal(tosses, tossed_to_teacher(sampling, Prompt(ROW[:4], 3, step=2), 0.2))
    others = [Prompt(ROW, 4, step=2), Prompt(ROW, 3, step=3), Prompt(ROW, 3, 1, step=2)]
    assert not any(np.array_equal(tosses, tossed_to_teacher(sampling, other, 0.2)) for other in others)
    rows = written_by_student(5, 2, 2000, 0.2)
    assert not np.array_equal(rows, tossed_to_teacher(sampling, Prompt(ROW, 0, step=2), 0.2)), "those are tosses for rows"


def test_each_token_is_drawn_by_whom_its_toss_says(tmp_path: Path) -> None:
    specs = specs_in(tmp_path)
    found = writers(specs).write(Weights(0, specs[0].model), prompts(6)).responses
    student, teacher = (TransformersSampler(spec) for spec in specs)
    for prompt, response in zip(prompts(6), found, strict=True):
        tosses, text = tossed_to_teacher(specs[0].sampling, prompt, SHARE), prompt.token_ids
        for place, token in enumerate(response.token_ids):
            sampler = teacher if tosses[place] else student
            run = next((other for other in range(place, -1, -1) if tosses[other] != tosses[place]), -1) + 1
            begun = np.concatenate([prompt.token_ids, response.token_ids[:run]]).astype(np.int32)
            again = sampler.sample([Prompt(begun, prompt.row, step=4, written=run, most=place - run + 1)])[0]
            assert again.token_ids[-1] == token
            text = np.append(text, token)
        assert response.ended == (response.token_ids[-1] in ENDS) and (response.ended or len(response.token_ids) == 12)
        assert not np.isin(response.token_ids[:-1], ENDS).any()


def test_all_log_probabilities_are_the_students(tmp_path: Path) -> None:
    specs = specs_in(tmp_path)
    found = writers(specs).write(Weights(0, specs[0].model), prompts(6)).responses
    student = TransformersSampler(specs[0])
    for prompt, response in zip(prompts(6), found, strict=True):
        read = student.logprobs(np.concatenate([prompt.token_ids, response.token_ids]).astype(np.int32))
        np.testing.assert_allclose(response.logprobs, read[-len(response.token_ids) :], atol=1e-5)
    assert any(tossed_to_teacher(specs[0].sampling, prompt, SHARE)[: len(one.token_ids)].any()
               for prompt, one in zip(prompts(6), found, strict=True))  # fmt: skip


def test_any_number_of_samplers_writes_the_same(tmp_path: Path) -> None:
    specs = specs_in(tmp_path)
    weights = Weights(3, ModelSource(str(tiny_llama(tmp_path / "weights", seed=9))))
    found = [whole(writers(specs, counts).write(weights, prompts(7)).responses) for counts in ((1, 1), (3, 2))]
    assert found[0] == found[1]
    assert found[0] != whole(writers(specs).write(Weights(0, specs[0].model), prompts(7)).responses)
    beside = writers(specs).write(weights, prompts(7)[2:3]).responses
    assert whole(beside) == found[0][2:3], "whatever is written beside it"


def test_new_weights_are_compared_with_their_proof(tmp_path: Path) -> None:
    specs = specs_in(tmp_path)
    model = ModelSource(str(tiny_llama(tmp_path / "weights", seed=9)))
    proof = Proof(ROW, TransformersSampler(SamplerSpec(ENGINE, model, Sampling(6), ENDS, 12)).logprobs(ROW) + np.float32(1e-4))
    both = writers(specs)
    first = both.write(Weights(3, model, proof), prompts(5)).hand_over
    assert first is not None and first.mean_gap == pytest.approx(1e-4, rel=0.05)
    assert both.write(Weights(3, model, proof), prompts(5)).hand_over is None


def distribution(model: PreTrainedModel, text: list[int], below: int) -> np.ndarray:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([text])).logits[0, -1, :below]
    masses: np.ndarray = logits.double().softmax(dim=0).numpy()
    return masses


def probability(models: list[PreTrainedModel], prompt: list[int], text: tuple[int, ...], share: float, below: int) -> float:
    """Of a response being drawn, token by token, from share p + (1 - share) s."""
    student, teacher = models
    found = 1.0
    for place, token in enumerate(text):
        begun = [*prompt, *text[:place]]
        mixture = share * distribution(teacher, begun, below) + (1 - share) * distribution(student, begun, below)
        found *= float(mixture[token])
    return found


@pytest.mark.slow
def test_responses_come_as_often_as_the_mixture_has_them(tmp_path: Path) -> None:
    below, most, share, draws = 4, 3, 0.4, 3000
    specs = specs_in(tmp_path, most, ids_below=below, ends=(0,))
    texts = [
        text
        for length in range(1, most + 1)
        for text in itertools.product(range(below), repeat=length)
        if 0 not in text[:-1] and (text[-1] == 0 or length == most)
    ]
    models = [AutoModelForCausalLM.from_pretrained(spec.model.name).eval() for spec in specs]
    wanted = np.array([probability(models, ROW[:3].tolist(), text, share, below) for text in texts])
    assert wanted.sum() == pytest.approx(1, rel=1e-9)
    alone = np.array([probability(models, ROW[:3].tolist(), text, 0.0, below) for text in texts])
    asked = [Prompt(ROW[:3], 0, sample) for sample in range(draws)]
    responses = writers(specs, share=share).write(Weights(0, specs[0].model), asked).responses
    counts = Counter(tuple(one.token_ids.tolist()) for one in responses)
    found = np.array([counts[text] for text in texts])
    assert found.sum() == draws
    freedom = len(texts) - 1
    bound = freedom + 5 * (2 * freedom) ** 0.5
    assert chi_square(found, wanted * draws) < bound
    assert chi_square(found, alone * draws) > 3 * bound, "the student alone would be told from it"


def chi_square(found: np.ndarray, expected: np.ndarray) -> float:
    return float(((found - expected) ** 2 / expected).sum())


def test_the_mixtures_log_probabilities_are_added_up_as_they_are() -> None:
    student, teacher = np.array([-0.1, -30.0, -2.0], np.float32), np.array([-3.0, -0.5, -120.0], np.float32)
    found = mixture_logprobs(student, teacher, 0.2)
    expected = np.log(0.2 * np.exp(teacher.astype(float)) + 0.8 * np.exp(student.astype(float)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_the_log_keeps_and_what_is_recorded_of_a_mixture() -> None:
    examples = fake_examples(3, seed=1)
    scores = [expected_scores(one, TOP_K) for one in examples]
    generator = np.random.default_rng(0)
    responses = [Response(one.targets, -generator.exponential(2, len(one.targets)).astype(np.float32), True) for one in examples]
    alone = [sampled_from(*pair, 6, 0.0) for pair in zip(responses, scores, strict=True)]
    assert all(one.drawn_logprobs is None and one.weights_step == 6 for one in alone)
    assert "effective_share" not in numbers_of(responses, scores, alone)
    mixed = [sampled_from(*pair, 6, 0.2) for pair in zip(responses, scores, strict=True)]
    student, teacher = (
        np.concatenate(values).astype(float)
        for values in ([one.logprobs for one in responses], [score.target_logprob for score in scores])
    )
    weights = np.exp(student) / (0.2 * np.exp(teacher) + 0.8 * np.exp(student))
    np.testing.assert_allclose(np.exp(student - np.concatenate([one.drawn_logprobs for one in mixed])), weights, rtol=1e-5)
    numbers = numbers_of(responses, scores, mixed)
    assert numbers["reverse_kl"] == pytest.approx((weights * (student - teacher)).mean(), rel=1e-5)
    assert numbers["effective_share"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / len(weights), rel=1e-5)


class Missing(TransformersSampler):
    """Cannot be built."""

    def __init__(self, spec: SamplerSpec) -> None:
        raise ImportError("there is no such engine")


@pytest.mark.ray
def test_actors_of_both_write_what_engines_here_do(tmp_path: Path, local_ray: None) -> None:
    specs = specs_in(tmp_path, most=6)
    weights = Weights(3, ModelSource(str(tiny_llama(tmp_path / "weights", seed=9))))
    logs = tmp_path / "logs"
    logs.mkdir()
    expected = whole(writers(specs).write(weights, prompts(5)).responses)
    student = RolloutWorkers(specs[0], 2, logs)
    with MixedWriters(student, RolloutWorkers(specs[1], 1, logs, name="teacher sampler"), SHARE) as both:
        assert whole(both.write(weights, prompts(5)).responses) == expected
    assert {path.name for path in logs.glob("*.log")} == {"sampler-0.log", "sampler-1.log", "teacher-sampler-0.log"}
    broken: dict[str, Any] = {"sampler_factory": Missing, "name": "teacher sampler"}
    with (
        MixedWriters(RolloutWorkers(specs[0], 1, logs), RolloutWorkers(specs[1], 1, logs, **broken), SHARE) as both,
        pytest.raises(WritingFailed, match="a teacher sampler failed: ImportError: there is no such engine"),
    ):
        both.write(weights, prompts(5))
