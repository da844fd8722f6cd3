"""What is counted of predictions, against one target at a time; blocks, and sums that were spoiled."""

import math

import numpy as np
import pytest
import torch

from actors.evaluation.metrics import CALIBRATION_BINS, HeldoutMetrics, HeldoutRows, batches_by_length
from actors.examples import ExampleFile
from actors.score_store.store import ScoreStore
from losses.topk_teacher import TopkTeacher
from tests.worlds import VOCAB, scored_world

ROWS, TOP_K = 9, 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExampleFile, ScoreStore]:
    path, store = scored_world(tmp_path_factory.mktemp("metrics"), ROWS, TOP_K)
    return ExampleFile(path), store


def logits_of(positions: np.ndarray, examples: ExampleFile) -> torch.Tensor:
    """[N, V], random but the same for the same row."""
    rows = []
    for position in positions:
        targets = int(examples[position].loss_mask.sum())
        rows.append(2 * torch.randn(targets, VOCAB, generator=torch.Generator().manual_seed(int(position))))
    return torch.cat(rows)


def counted(world: tuple[ExampleFile, ScoreStore], batch_rows: int) -> HeldoutMetrics:
    examples, store = world
    rows, metrics = HeldoutRows(examples, store, TOP_K, VOCAB), HeldoutMetrics()
    for positions in batches_by_length(examples.lengths, batch_rows):
        metrics.add_logits(logits_of(positions, examples), rows.batch(positions))
    return metrics


def measured_slowly(examples: ExampleFile, store: ScoreStore) -> dict[str, float]:
    """The same measures, target by target."""
    losses, divergences, agreements, bins = [], [], [], np.zeros((CALIBRATION_BINS, 3))
    for position in range(ROWS):
        example = examples[position]
        scores = store.scores_at(position, TOP_K)
        logprobs = logits_of(np.array([position]), examples).double().log_softmax(dim=1).numpy()
        for index, target in enumerate(example.token_ids[example.loss_mask]):
            ours, ids = logprobs[index], scores.topk_ids[index]
            teacher = {int(target): float(scores.target_logprob[index])}
            teacher |= dict(zip(ids.tolist(), scores.topk_logprobs[index].astype(float).tolist(), strict=True))
            rest = math.log(sum(math.exp(ours[token]) for token in range(VOCAB) if token not in teacher))
            pairs = [(math.exp(value), math.exp(ours[token])) for token, value in teacher.items()]
            pairs.append((math.exp(float(scores.tail_logmass[index])), math.exp(rest)))
            whole = sum(p for p, _ in pairs)
            divergences.append(sum(p / whole * math.log(p / whole / q) for p, q in pairs if p > 0))
            losses.append(-ours[target])
            agreements.append(max(teacher, key=lambda token: teacher[token]) == int(ours.argmax()))
            confidence = math.exp(ours.max())
            place = next(bin for bin in range(CALIBRATION_BINS) if confidence <= (bin + 1) / CALIBRATION_BINS)
            bins[place] += 1, confidence, ours.argmax() == target
    return {
        "heldout_loss": float(np.mean(losses)),
        "kl_to_teacher": float(np.mean(divergences)),
        "top1_agreement": float(np.mean(agreements)),
        "calibration_error": float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum()),
    }


@pytest.mark.parametrize("batch_rows", [1, 4, ROWS])
def test_measures_are_those_of_one_target_after_the_other(world: tuple[ExampleFile, ScoreStore], batch_rows: int) -> None:
    assert counted(world, batch_rows).measures() == pytest.approx(measured_slowly(*world), rel=1e-6)


def test_blocks_of_targets_add_up(world: tuple[ExampleFile, ScoreStore], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = counted(world, 4).measures()
    monkeypatch.setattr("actors.evaluation.metrics.LOGPROBS_AT_ONCE", 3 * VOCAB)  # three targets at a time
    assert counted(world, 4).measures() == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("spoiled", [math.nan, math.inf])
def test_one_logit_that_is_not_finite_spoils_the_sums_for_good(world: tuple[ExampleFile, ScoreStore], spoiled: float) -> None:
    examples, store = world
    metrics, positions = counted(world, 4), np.arange(3)
    metrics.require_finite("student")
    logits = logits_of(positions, examples)
    logits[2, 5] = spoiled
    rows = HeldoutRows(examples, store, TOP_K, VOCAB)
    metrics.add_logits(logits, rows.batch(positions))
    metrics.add_logits(logits_of(positions, examples), rows.batch(positions))
    with pytest.raises(ValueError, match="the logits of student are not finite on the held-out rows; its training diverged"):
        metrics.require_finite("student")


def test_a_classifier_is_measured_by_its_labels_over_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    logprobs = torch.randn(50, 3, generator=generator).double().log_softmax(dim=1)
    labels, teacher = torch.randint(3, (50,), generator=generator), torch.randn(50, 3, generator=generator).log_softmax(dim=1)
    others = torch.stack([torch.tensor([other for other in range(3) if other != label]) for label in labels.tolist()])
    scores = TopkTeacher(
        teacher.gather(1, labels[:, None])[:, 0], others, teacher.gather(1, others), torch.full((50,), -torch.inf)
    )  # fmt: skip
    grades, names = HeldoutMetrics(3, ordered=True), HeldoutMetrics(3)
    for counted in (grades, names):
        for some in (slice(0, 20), slice(20, 50)):
            counted.add(logprobs[some], labels[some], scores.select(some))
    guessed = logprobs.argmax(dim=1)
    right = float((guessed == labels).double().mean())
    by_chance = float(((labels[:, None] - guessed[None]) ** 2).double().mean())  # every label met with every prediction
    kappa = 1 - float(((labels - guessed) ** 2).double().mean()) / by_chance
    hits = [(labels == one) & (guessed == one) for one in range(3)]
    halves = [(labels == one).double() / 2 + (guessed == one).double() / 2 for one in range(3)]
    f1 = float(np.mean([float(hit.sum() / half.sum()) for hit, half in zip(hits, halves, strict=True)]))
    assert grades.of_labels() == pytest.approx({"accuracy": right, "macro_f1": f1, "weighted_kappa": kappa})
    assert names.of_labels().keys() == {"accuracy", "macro_f1"} and HeldoutMetrics().of_labels() == {}

    monkeypatch.setattr("torch.distributed.all_reduce", lambda packed: packed.mul_(2))  # another worker counted the same
    alone, measures = grades.of_labels(), grades.measures()
    grades.sum_over_workers(torch.device("cpu"))
    assert grades.confusion.sum() == 100 and grades.targets == 100
    assert grades.of_labels() == pytest.approx(alone) and grades.measures() == pytest.approx(measures)


def test_batches_hold_every_row_once_the_longest_first() -> None:
    lengths = np.array([3, 9, 4, 9, 1])
    batches = list(batches_by_length(lengths, 2))
    assert [batch.tolist() for batch in batches] == [[1, 3], [2, 0], [4]]
