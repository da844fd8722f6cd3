"""The evaluator against slow readings of its metrics, one target after the other, on a tiny model with random weights."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from actors.config.models import EvaluateConfig
from actors.evaluation.metrics import batches_by_length, calibration_bins, most_likely
from actors.records import Example
from actors.score_store.store import ScoreStore
from losses.topk_teacher import TopkTeacher
from tests.evaluation_world import (
    ROWS,
    V,
    World,
    load,
    logprobs_at_targets,
    make_world,
    ranked_others,
    save_tokenizer,
    write_scores,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def slow_kl(teacher: np.ndarray, student: np.ndarray, target: int, top_k: int, top_mass: float = 1.0) -> float:
    """KL(teacher || student) of one target from both full distributions, all but target and kept tokens put into one class."""
    kept, enough = [target], top_mass * (1 - math.exp(teacher[target]))
    for token in ranked_others(teacher, target)[:top_k]:
        if sum(math.exp(teacher[i]) for i in kept[1:]) < enough:
            kept.append(token)
    rest = [i for i in range(V) if i not in kept]
    total = sum(math.exp(teacher[i]) * (teacher[i] - student[i]) for i in kept)
    p, q = sum(math.exp(teacher[i]) for i in rest), sum(math.exp(student[i]) for i in rest)
    return total + (p * math.log(p / q) if rest else 0.0)


@pytest.mark.parametrize("top_k", [5, V - 1])
def test_metrics_are_those_of_a_slow_reading(world: World, top_k: int) -> None:
    losses, divergences, agreements = [], [], []
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for example in world.examples():
        pairs = zip(
            example.targets, logprobs_at_targets(world.folder / "teacher", example),
            logprobs_at_targets(world.folder / "student", example), strict=True,
        )  # fmt: skip
        for target, teacher, student in pairs:
            losses.append(-student[target])
            divergences.append(slow_kl(teacher, student, int(target), top_k))
            agreements.append(teacher.argmax() == student.argmax())
            confidence = math.exp(student.max())
            place = next(i for i in range(15) if confidence <= (i + 1) / 15)
            bins[place].append((confidence, bool(student.argmax() == target)))
    error = sum(abs(sum(c for c, _ in inside) - sum(r for _, r in inside)) for inside in bins) / len(losses)

    metrics = world.evaluate("student", top_k).metrics
    assert metrics.targets == len(losses)
    assert metrics.heldout_loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert metrics.kl_to_teacher == pytest.approx(np.mean(divergences), abs=1e-3)  # scores are stored to 2.5e-4 nats
    assert metrics.top1_agreement == pytest.approx(np.mean(agreements))
    assert metrics.calibration_error == pytest.approx(error, abs=1e-6)
    assert 0.0 < metrics.top1_agreement < 1.0, "neither end would show much"
    assert metrics.exact_match is None and metrics.rouge_l is None
    assert metrics.parameters == V * 16 * 2 + 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16
    assert metrics.seconds > 0 and metrics.tokens_per_second > 0


@pytest.mark.parametrize("top_k", [5, V - 1])
def test_a_store_that_keeps_a_share_gives_the_slow_reading_of_that_share(world: World, tmp_path: Path, top_k: int) -> None:
    write_scores(tmp_path / "share", world.examples(), world.folder / "teacher", top_k, top_mass=0.5)
    divergences = [
        slow_kl(teacher, student, int(target), top_k, 0.5)
        for example in world.examples()
        for target, teacher, student in zip(
            example.targets, logprobs_at_targets(world.folder / "teacher", example),
            logprobs_at_targets(world.folder / "student", example), strict=True,
        )
    ]  # fmt: skip
    stores = (str(tmp_path / "share"), f"scores-{top_k}")
    found, whole = (world.evaluate("student", top_k, store=store).metrics for store in stores)
    assert found.kl_to_teacher == pytest.approx(np.mean(divergences), abs=1e-3)
    assert found.kl_to_teacher < whole.kl_to_teacher
    assert found.top1_agreement == whole.top1_agreement


@pytest.mark.parametrize("top_k", [5, V - 1])
def test_a_student_that_is_the_teacher_has_no_distance_from_it(world: World, top_k: int) -> None:
    metrics = world.evaluate("teacher", top_k).metrics
    assert 0.0 <= metrics.kl_to_teacher < 1e-6
    assert metrics.top1_agreement == 1.0


def test_the_batch_does_not_change_the_numbers(world: World) -> None:
    alone, together = (world.evaluate("student", 5, batch_rows=rows).metrics for rows in (1, 64))
    for name in ("heldout_loss", "kl_to_teacher", "calibration_error"):
        assert getattr(alone, name) == pytest.approx(getattr(together, name), abs=1e-6)


def test_a_store_of_larger_k_serves_a_smaller_one(world: World) -> None:
    wide = world.evaluate("student", 5, store=f"scores-{V - 1}").metrics.kl_to_teacher
    assert wide == pytest.approx(world.evaluate("student", 5).metrics.kl_to_teacher, abs=1e-4)


def test_less_precision_changes_little(world: World) -> None:
    rounded = world.evaluate("student", 5, precision="bfloat16").metrics
    exact = world.evaluate("student", 5).metrics
    assert rounded.heldout_loss != exact.heldout_loss
    assert rounded.heldout_loss == pytest.approx(exact.heldout_loss, rel=0.05)


def greedy(folder: Path, prompt: np.ndarray, length: int) -> list[int]:
    """The most likely token after the prompt, again and again, without batches, padding, caches or an end."""
    tokens = torch.from_numpy(prompt.astype(np.int64))[None]
    with torch.no_grad():
        for _ in range(length):
            tokens = torch.cat([tokens, load(folder)(tokens).logits[:, -1].argmax(dim=1, keepdim=True)], dim=1)
    return tokens[0, len(prompt) :].tolist()


def last_prompt(example: Example) -> np.ndarray:
    start = len(example.token_ids)
    while example.loss_mask[start - 1]:
        start -= 1
    return example.token_ids[:start]


def test_answers_are_greedy_and_end_where_the_tokenizer_says(world: World) -> None:
    endless = [greedy(world.folder / "student", last_prompt(example), 8) for example in world.examples()]
    eos = endless[0][3]  # a token the model itself comes to say
    save_tokenizer(world.folder / "tokenizer-ends", eos=f"w{eos}")
    wanted = [" ".join(f"w{token}" for token in (tokens[: tokens.index(eos)] if eos in tokens else tokens)) for tokens in endless]
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "tokenizer-ends")
    assert tokenizer.eos_token_id == eos

    answers = world.evaluate("student", 5, tokenizer="tokenizer-ends", generate_rows=100, max_new_tokens=8).answers
    assert [answer.generated for answer in answers] == wanted
    assert [answer.row for answer in answers] == list(range(100, 100 + ROWS))
    assert len(wanted[0].split()) <= 3
    assert any(len(one.split()) == 8 for one in wanted), "some answer runs to its limit"


def test_exact_match_counts_right_answers(world: World) -> None:
    first = world.evaluate("student", 5, generate_rows=4, max_new_tokens=3)
    texts = [json.loads(line) for line in (world.folder / "texts.jsonl").read_text().splitlines()]
    texts[1]["response"] = first.answers[1].generated
    (world.folder / "texts-right.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    evaluation = world.evaluate("student", 5, texts="texts-right.jsonl", generate_rows=4, max_new_tokens=3)
    assert [answer.correct for answer in evaluation.answers] == [False, True, False, False]
    assert evaluation.metrics.exact_match == 0.25
    assert evaluation.metrics.rouge_l is not None and evaluation.metrics.rouge_l >= 0.25


def test_calibration_error_of_numbers_by_hand() -> None:
    bins = calibration_bins(torch.tensor([1.0, 0.9, 0.96, 1 / 15, 0.0]), torch.tensor([True, False, True, False, True]))
    assert bins[:, 14].tolist() == pytest.approx([2, 1.96, 2])
    assert bins[:, 13].tolist() == pytest.approx([1, 0.9, 0])
    assert bins[:, 0].tolist() == pytest.approx([2, 1 / 15, 1])


def test_the_teacher_prefers_the_target_in_a_tie() -> None:
    half = math.log(0.4)
    teacher = TopkTeacher(
        torch.tensor([half, half - 1, half]), torch.tensor([[7], [8], [9]]), torch.tensor([[half], [half], [half - 1]]),
        torch.full((3,), -math.inf),
    )  # fmt: skip
    assert most_likely(teacher, torch.tensor([1, 2, 3])).tolist() == [1, 8, 3]


def test_batches_hold_rows_of_like_length() -> None:
    batches = [batch.tolist() for batch in batches_by_length(np.array([3, 9, 4, 8, 1]), 2)]
    assert batches == [[1, 3], [2, 0], [4]]


def test_scores_of_other_rows_are_refused(world: World, tmp_path: Path) -> None:
    few = world.examples()[:3]
    write_scores(tmp_path / "few", few, world.folder / "teacher", 5)
    with pytest.raises(ValueError, match="is planned for 3 rows, but there are 11 held out"):
        world.evaluate("student", 5, store=str(tmp_path / "few"))
    write_scores(tmp_path / "turned", world.examples()[::-1], world.folder / "teacher", 5)
    with pytest.raises(ValueError, match="the store belongs to other data"):
        world.evaluate("student", 5, store=str(tmp_path / "turned"))


def test_an_incomplete_store_is_refused(world: World, tmp_path: Path) -> None:
    write_scores(tmp_path / "store", world.examples(), world.folder / "teacher", 5)
    ScoreStore(tmp_path / "store").discard_shard(1)
    with pytest.raises(ValueError, match="lacks 1 of 3 shards"):
        world.evaluate("student", 5, store=str(tmp_path / "store"))


def test_a_model_that_diverged_is_refused(world: World) -> None:
    model = LlamaForCausalLM.from_pretrained(world.folder / "student")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    model.save_pretrained(world.folder / "diverged")
    with pytest.raises(ValueError, match="the logits of .*diverged are not finite"):
        world.evaluate("diverged", 5)


def test_a_tokenizer_without_an_end_is_refused(world: World) -> None:
    save_tokenizer(world.folder / "endless", eos=None)
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        world.evaluate("student", 5, tokenizer="endless", generate_rows=1)


def test_a_reference_without_an_answer_is_refused_before_the_model_is_loaded(world: World) -> None:
    with pytest.raises(ValueError, match="row 100: evaluate.answer_pattern"):
        world.evaluate("no such model", 5, generate_rows=2, answer_pattern=r"#### (\d+)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="evaluate.gpus is 1, but this process sees no GPU"):
        world.evaluate("student", 5, gpus=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_numbers(world: World) -> None:
    on_gpu, on_cpu = (world.evaluate("student", 5, gpus=gpus, generate_rows=4, max_new_tokens=4) for gpus in (1, 0))
    assert on_gpu.metrics.heldout_loss == pytest.approx(on_cpu.metrics.heldout_loss, abs=1e-4)
    assert on_gpu.metrics.kl_to_teacher == pytest.approx(on_cpu.metrics.kl_to_teacher, abs=1e-4)


@pytest.mark.parametrize(("pattern", "complaint"), [("(", "is no regular expression"), ("abc", "has no group for the answer")])
def test_a_pattern_that_cannot_serve_is_refused(pattern: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        EvaluateConfig(answer_pattern=pattern)
