"""One classifier over the held-out rows: how well it predicts their labels, how near it is to the teacher, and how fast it is."""

import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.config.models import EvaluateConfig
from actors.dataloader.class_rows import row_logits
from actors.dataloader.scored_rows import all_rows
from actors.evaluation.class_metrics import measures_of, view_of
from actors.evaluation.evaluator import Evaluation, Metrics, load_for_evaluation, require_scores_of
from actors.evaluation.metrics import HeldoutMetrics, HeldoutRows, batches_by_length, most_likely
from actors.examples import ExampleFile
from actors.model_source import ModelSource
from actors.score_store.store import ScoreStore

TIMED_ROWS = 30
"""Rows that are predicted one by one, after one that is not counted; the median is the latency."""


@torch.inference_mode()
def evaluate_classifier(
    model: ModelSource, examples_path: str, store_path: str, rows_path: str, labels: tuple[str, ...], ordered: bool,
    evaluate: EvaluateConfig, top_k: int, temperature: float = 1.0,
) -> Evaluation:  # fmt: skip
    """Measure one classifier on the held-out rows, on the GPU if ``evaluate.gpus`` says so, else on the CPU.

    Args:
        model: folder or hub name.
        examples_path: the held-out rows as this model reads them.
        store_path: the complete store of the teacher's scores of these rows.
        rows_path: their groups (JSON lines: row, label, group).
        labels: their names.
        ordered: whether they are grades.
        evaluate: how large passes are.
        top_k: how many of the store's K are used, all.
        temperature: by which its logits are divided.

    Raises:
        ValueError: if store and rows do not belong together, or the model's logits are not finite.
    """
    examples, store = ExampleFile(Path(examples_path)), ScoreStore(store_path)
    require_scores_of(store, examples)
    network = load_for_evaluation(model, evaluate)
    rows, heldout = HeldoutRows(examples, store, top_k, len(labels)), HeldoutMetrics(len(labels), ordered)
    predicted, right = np.zeros(len(examples), dtype=np.int64), np.zeros(len(examples), dtype=np.int64)
    started = time.perf_counter()
    for positions in batches_by_length(examples.lengths, evaluate.batch_rows):
        batch = rows.batch(positions).to(network.device)
        logits = row_logits(network, batch) / temperature
        heldout.add_logits(logits, batch)
        predicted[positions], right[positions] = logits.argmax(dim=1).cpu().numpy(), batch.targets.cpu().numpy()
    heldout.require_finite(model.name)
    seconds, measures = time.perf_counter() - started, measures_of(heldout.confusion, ordered)
    metrics = Metrics(
        **heldout.measures(), exact_match=None, rouge_l=None,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        targets=heldout.targets, seconds=seconds, tokens_per_second=int(examples.lengths.sum()) / seconds,
        accuracy=measures.accuracy, macro_f1=measures.macro_f1, weighted_kappa=measures.weighted_kappa,
        rows_per_second=len(examples) / seconds, milliseconds_a_row=1000 * latency(network, rows, len(examples)),
        bytes=sum(path.stat().st_size for path in Path(model.name).glob("*.safetensors")) or None,
    )  # fmt: skip
    return Evaluation(metrics, (), (), view_of(right, predicted, labels, groups_of(rows_path), ordered))


def classes_from_scores(
    examples_path: str, store_path: str, rows_path: str, labels: tuple[str, ...], ordered: bool, top_k: int, parameters: int
) -> Evaluation:
    """Measure the teacher by its own scores of the held-out rows; nothing is loaded, so that nothing is timed.

    Args:
        examples_path: the held-out rows as the teacher reads them.
        store_path: the complete store of its scores of these rows.
        rows_path: their groups (JSON lines: row, label, group).
        labels: their names.
        ordered: whether they are grades.
        top_k: how many of the store's K are used, all.
        parameters: weights of the teacher.

    Raises:
        ValueError: if store and rows do not belong together.
    """
    started = time.perf_counter()
    examples, store = ExampleFile(Path(examples_path)), ScoreStore(store_path)
    require_scores_of(store, examples)
    teacher = all_rows(examples, store, top_k).teacher(range(len(examples)))
    heldout = HeldoutMetrics(len(labels), ordered)
    assert teacher is not None, "the rows have a store"
    right = torch.tensor([int(examples[row].targets[0]) for row in range(len(examples))])
    heldout.add_teacher(teacher, right)
    predicted = most_likely(teacher, right).numpy()
    seconds, measures = time.perf_counter() - started, measures_of(heldout.confusion, ordered)
    metrics = Metrics(
        **heldout.measures(), exact_match=None, rouge_l=None, parameters=parameters, targets=heldout.targets, seconds=seconds,
        tokens_per_second=int(examples.lengths.sum()) / seconds, accuracy=measures.accuracy, macro_f1=measures.macro_f1,
        weighted_kappa=measures.weighted_kappa,
    )  # fmt: skip
    return Evaluation(metrics, (), (), view_of(right.numpy(), predicted, labels, groups_of(rows_path), ordered))


def groups_of(rows_path: str) -> list[str | None]:
    """Return the group of each held-out row."""
    return [json.loads(line)["group"] for line in Path(rows_path).read_text().splitlines()]


def latency(network: PreTrainedModel, rows: HeldoutRows, count: int) -> float:
    """Return the median seconds of one row by itself, its tensors being there."""
    seconds = []
    for row in range(min(TIMED_ROWS + 1, count)):
        batch = rows.batch(np.array([row])).to(network.device)
        started = time.perf_counter()
        row_logits(network, batch).cpu()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:] or seconds))
