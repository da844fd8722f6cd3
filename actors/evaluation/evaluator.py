"""One model over the held-out rows: how well it predicts them, how near it is to the teacher, what it answers.

N targets, K top-k, V vocabulary, B rows. Logarithms are natural; sums over targets are kept in float64.
"""

import inspect
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from actors.config.models import EvaluateConfig
from actors.dataloader.collator import MicroBatch
from actors.dataloader.scored_rows import all_rows
from actors.evaluation.answer_ends import read_answer_ends
from actors.evaluation.answers import AnswerComparison, GeneratedAnswer, HeldoutText, read_heldout_texts
from actors.evaluation.class_metrics import ClassView
from actors.evaluation.generation import generate_answers
from actors.evaluation.metrics import HeldoutMetrics, HeldoutRows, batches_by_length
from actors.evaluation.token_view import TokenView, view_tokens
from actors.examples import ExampleFile
from actors.model_source import ModelSource
from actors.models import load_model, vocab_size_of
from actors.score_store.store import ScoreStore


@dataclass(frozen=True, slots=True)
class Metrics:
    """What was measured of one model on the held-out rows."""

    heldout_loss: float
    """Cross entropy to the data's tokens, nats per target."""

    kl_to_teacher: float
    """KL(teacher || model) over target, top-K and tail, nats per target."""

    top1_agreement: float
    """Share of targets at which model and teacher find the same token most likely."""

    calibration_error: float
    """Expected calibration error of the most likely token, 15 bins of equal width (arXiv 1706.04599, equation 3)."""

    exact_match: float | None
    """Share of generated answers that are right; None if none were generated."""

    rouge_l: float | None
    """Mean Rouge-L of generated answers, 0 to 1; None if none could be measured."""

    parameters: int
    """Weights of the model; shared ones count once."""

    targets: int
    """Targets that were measured."""

    seconds: float
    """Time of prediction and generation together, loading aside."""

    tokens_per_second: float
    """Tokens of rows that went through the forward pass in a second."""

    accuracy: float | None = None
    """Of a classifier: share of rows whose most likely label is right."""

    macro_f1: float | None = None
    """Of a classifier: mean F1 over the labels."""

    weighted_kappa: float | None = None
    """Of a classifier whose labels are grades: quadratic weighted kappa."""

    rows_per_second: float | None = None
    """Of a classifier: rows of whole passes in a second."""

    milliseconds_a_row: float | None = None
    """Of a classifier: median time of one row by itself."""

    bytes: float | None = None
    """Of a classifier in a folder: size of its weights on disk."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that is kept of one model's evaluation."""

    metrics: Metrics
    answers: tuple[GeneratedAnswer, ...]
    views: tuple[TokenView, ...] = ()
    """A few rows token by token, the same for every model."""
    classes: ClassView | None = None
    """Of a classifier: its predictions, counted."""


def evaluate_model(
    model: ModelSource, tokenizer_source: ModelSource, examples_path: str, store_path: str, texts_path: str,
    evaluate: EvaluateConfig, top_k: int,
) -> Evaluation:  # fmt: skip
    """Measure one model on the held-out rows, on the GPU if ``evaluate.gpus`` says so, else on the CPU.

    Args:
        model: folder or hub name of a causal language model.
        tokenizer_source: its tokenizer.
        examples_path: the held-out rows as token ids.
        store_path: the complete store of the teacher's scores of these rows.
        texts_path: the same rows as text (JSON lines: row, task, prompt, response).
        evaluate: how much, how large.
        top_k: how many of the store's K are used.

    Raises:
        ValueError: if store, texts and examples do not belong together, a reference has no answer, the tokenizer has no
            end-of-sequence token, a GPU is asked for and there is none, or the model's logits are not finite.
    """
    examples, store = ExampleFile(Path(examples_path)), ScoreStore(store_path)
    require_scores_of(store, examples)
    all_texts = read_heldout_texts(Path(texts_path), examples.rows.tolist())
    texts = all_texts[: evaluate.generate_rows]
    comparison = AnswerComparison(evaluate.answer_pattern)
    comparison.require_answers(texts)
    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_source.name, revision=tokenizer_source.revision, trust_remote_code=tokenizer_source.trust_remote_code
    )
    ends = read_answer_ends(Path(tokenizer_source.name), tokenizer) if texts else ()
    network = load_for_evaluation(model, evaluate)

    started = time.perf_counter()
    heldout = predict_rows(network, examples, store, top_k, evaluate.batch_rows, model.name)
    predicted = time.perf_counter()
    prompts = [examples[position].last_prompt for position in range(len(texts))]
    with torch.inference_mode():
        generated = generate_answers(network, tokenizer, prompts, evaluate, ends)
    answers = [comparison.compare(text, answer) for text, answer in zip(texts, generated, strict=True)]
    rouge = [answer.rouge_l for answer in answers if answer.rouge_l is not None]
    metrics = Metrics(
        **heldout.measures(),
        exact_match=float(np.mean([answer.correct for answer in answers])) if answers else None,
        rouge_l=float(np.mean(rouge)) if rouge else None,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        targets=heldout.targets,
        seconds=time.perf_counter() - started,
        tokens_per_second=examples.tokens / (predicted - started),
    )
    return Evaluation(metrics, tuple(answers), view_rows(network, tokenizer, examples, store, all_texts, top_k))


def evaluate_from_scores(examples_path: str, store_path: str, top_k: int, parameters: int) -> Evaluation:
    """Measure the teacher by its own scores of the held-out rows; nothing is loaded, answered or shown token by token.

    Args:
        examples_path: the held-out rows as token ids.
        store_path: the complete store of the teacher's scores of these rows.
        top_k: how many of the store's K are used.
        parameters: weights of the teacher.

    Raises:
        ValueError: if store and examples do not belong together.
    """
    started = time.perf_counter()
    examples, store = ExampleFile(Path(examples_path)), ScoreStore(store_path)
    require_scores_of(store, examples)
    batch, heldout = all_rows(examples, store, top_k), HeldoutMetrics()
    for row in range(len(batch)):
        teacher = batch.teacher([row])
        assert teacher is not None, "the batch has a store"
        heldout.add_teacher(teacher, torch.from_numpy(batch.example(row).targets.astype(np.int64)))
    seconds = time.perf_counter() - started
    metrics = Metrics(
        **heldout.measures(), exact_match=None, rouge_l=None, parameters=parameters, targets=heldout.targets, seconds=seconds,
        tokens_per_second=examples.tokens / seconds,
    )  # fmt: skip
    return Evaluation(metrics, ())


def require_scores_of(store: ScoreStore, examples: ExampleFile) -> None:
    """Raise if a store does not cover the examples; keys are compared as scores are read."""
    if store.rows != len(examples):
        raise ValueError(f"the store at {store.place} is planned for {store.rows} rows, but there are {len(examples)} held out")
    if missing := store.missing_shards():
        raise ValueError(f"the store at {store.place} lacks {len(missing)} of {store.shard_count} shards; score the rest first")


def load_for_evaluation(source: ModelSource, evaluate: EvaluateConfig) -> PreTrainedModel:
    """Return the model on its device, ready to predict."""
    if evaluate.gpus and not torch.cuda.is_available():
        raise ValueError("evaluate.gpus is 1, but this process sees no GPU; evaluate.gpus=0 would do")
    model = load_model(source, getattr(torch, evaluate.precision))
    return model.to("cuda" if evaluate.gpus else "cpu").eval()


@torch.inference_mode()
def predict_rows(
    model: PreTrainedModel, examples: ExampleFile, store: ScoreStore, top_k: int, batch_rows: int, name: str
) -> HeldoutMetrics:
    """Return the sums over all targets of the rows; ``name`` says which model, should its logits not be finite."""
    rows, heldout = HeldoutRows(examples, store, top_k, vocab_size_of(model)), HeldoutMetrics()
    for positions in batches_by_length(examples.lengths, batch_rows):
        batch = rows.batch(positions).to(model.device)
        heldout.add_logits(target_logits(model, batch), batch)
    heldout.require_finite(name)
    return heldout


@torch.inference_mode()
def view_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: ExampleFile, store: ScoreStore,
    texts: list[HeldoutText], top_k: int,
) -> tuple[TokenView, ...]:  # fmt: skip
    """Return a few of the rows token by token, for the report; see ``view_tokens``."""

    def logits_of(batch: MicroBatch) -> Tensor:
        return target_logits(model, batch.to(model.device)).cpu()

    return view_tokens(logits_of, HeldoutRows(examples, store, top_k, vocab_size_of(model)), tokenizer, examples, store, texts)


def target_logits(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Return the logits [N, V] that predict the targets; where the model allows, no others are computed but for padding."""
    rows, columns = batch.predicting // batch.token_ids.shape[1], batch.predicting % batch.token_ids.shape[1]
    inputs = {"input_ids": batch.token_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return model(**inputs).logits[rows, columns]
    kept = columns.unique()  # ascending
    return model(**inputs, logits_to_keep=kept).logits[rows, torch.searchsorted(kept, columns)]
