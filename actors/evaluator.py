"""One model over the held-out rows: how well it predicts them, how near it is to the teacher, what it answers.

N targets, K top-k, V vocabulary, B rows. Logarithms are natural; sums over targets are kept in float64.
"""

import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from actors.answers import Answer, AnswerComparison, HeldoutText, read_heldout_texts
from actors.collate import PADDING, Collator, MicroBatch
from actors.config import EvaluateConfig
from actors.examples import ExampleFile
from actors.sampler import GlobalBatch, SamplerState
from actors.score_store import ScoreStore
from actors.training_task import ModelSource
from losses.config import CoupledLoss
from losses.support import TeacherSupport

CALIBRATION_BINS = 15
LOGPROBS_AT_ONCE = 1 << 25  # float64 numbers of one [N, V] block: 256 MiB


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


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that is kept of one model's evaluation."""

    metrics: Metrics
    answers: tuple[Answer, ...]


def evaluate_model(
    model: ModelSource, tokenizer_path: str, examples_path: str, store_path: str, texts_path: str, evaluate: EvaluateConfig,
    top_k: int,
) -> Evaluation:  # fmt: skip
    """Measure one model on the held-out rows, on the GPU if ``evaluate.gpus`` says so, else on the CPU.

    Args:
        model: folder or hub name of a causal language model.
        tokenizer_path: folder of its tokenizer.
        examples_path: the held-out rows as token ids.
        store_path: the complete store of the teacher's scores of these rows.
        texts_path: the same rows as text (JSON lines: row, task, prompt, response).
        evaluate: how much, how large.
        top_k: how many of the store's K are used.

    Raises:
        ValueError: if store, texts and examples do not belong together, a reference has no answer, the tokenizer has no
            end-of-sequence token, a GPU is asked for and there is none, or the model's logits are not finite.
    """
    examples, store = ExampleFile(Path(examples_path)), ScoreStore(Path(store_path))
    require_scores_of(store, examples)
    texts = read_heldout_texts(Path(texts_path), examples.rows)[: evaluate.generate_rows]
    comparison = AnswerComparison(evaluate.answer_pattern)
    comparison.require_answers(texts)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=model.trust_remote_code)
    network = load_for_evaluation(model, evaluate)

    started = time.perf_counter()
    tally = predict_rows(network, examples, store, top_k, evaluate.batch_rows, model.name)
    predicted = time.perf_counter()
    answers = [
        comparison.compare(text, generated)
        for text, generated in zip(texts, generate_answers(network, tokenizer, examples, texts, evaluate), strict=True)
    ]
    rouge = [answer.rouge_l for answer in answers if answer.rouge_l is not None]
    metrics = Metrics(
        heldout_loss=tally.cross_entropy / tally.targets,
        kl_to_teacher=tally.forward_kl / tally.targets,
        top1_agreement=tally.agreements / tally.targets,
        calibration_error=tally.calibration_error(),
        exact_match=float(np.mean([answer.correct for answer in answers])) if answers else None,
        rouge_l=float(np.mean(rouge)) if rouge else None,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        targets=tally.targets,
        seconds=time.perf_counter() - started,
        tokens_per_second=int(examples.lengths.sum()) / (predicted - started),
    )
    return Evaluation(metrics, tuple(answers))


def require_scores_of(store: ScoreStore, examples: ExampleFile) -> None:
    """Refuse a store that does not cover the examples; their keys are compared as scores are read."""
    if store.rows != len(examples):
        raise ValueError(f"the store at {store.path} is planned for {store.rows} rows, but there are {len(examples)} held out")
    if missing := store.missing_shards():
        raise ValueError(f"the store at {store.path} lacks {len(missing)} of {store.shard_count} shards; score the rest first")


def load_for_evaluation(source: ModelSource, evaluate: EvaluateConfig) -> PreTrainedModel:
    """Return the model on its device, ready to predict."""
    if evaluate.gpus and not torch.cuda.is_available():
        raise ValueError("evaluate.gpus is 1, but this process sees no GPU; evaluate.gpus=0 would do")
    model = AutoModelForCausalLM.from_pretrained(
        source.name, revision=source.revision, trust_remote_code=source.trust_remote_code,
        dtype=getattr(torch, evaluate.precision),
    )  # fmt: skip
    return model.to("cuda" if evaluate.gpus else "cpu").eval()


class Tally:
    """Sums over targets."""

    def __init__(self) -> None:
        self.targets = 0
        self.cross_entropy = 0.0
        self.forward_kl = 0.0
        self.agreements = 0
        self._bins = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64)  # count, sum of confidences, number right

    def add(self, logprobs: Tensor, targets: Tensor, teacher: TeacherSupport) -> None:
        """Add the model's log-probabilities [N, V] at the targets [N]."""
        confidence, predicted = logprobs.max(dim=1)
        self.targets += len(targets)
        self.cross_entropy -= float(logprobs.gather(1, targets[:, None]).sum())
        self.forward_kl += float(forward_kl_to_teacher(logprobs, targets, teacher).sum())
        self.agreements += int((predicted == most_likely(teacher, targets)).sum())
        self._bins += calibration_bins(confidence.exp(), predicted == targets).cpu()

    def calibration_error(self) -> float:
        """Mean over targets of the distance, in their bin, between mean confidence and share right."""
        _, confidences, right = self._bins
        return float((confidences - right).abs().sum() / self.targets)


def forward_kl_to_teacher(logprobs: Tensor, targets: Tensor, teacher: TeacherSupport) -> Tensor:
    """KL(teacher || model) [N] in nats, over the classes target, each of the top-K, and everything else.

    The teacher's classes are normalised to one: its stored log-probabilities are rounded, and a divergence of masses that
    do not add up may be negative.
    """
    ids = torch.cat([targets[:, None], teacher.topk_ids], dim=1)  # [N, K+1]
    ours = logprobs.gather(1, ids)
    theirs = torch.cat([teacher.target_logprob[:, None], teacher.topk_logprobs], dim=1).double()
    if ids.shape[1] < logprobs.shape[1]:  # else the named tokens are all there are, and nothing else is a class
        our_tail = logprobs.scatter(1, ids, -torch.inf).logsumexp(dim=1, keepdim=True)
        ours = torch.cat([ours, our_tail], dim=1)
        theirs = torch.cat([theirs, teacher.tail_logmass[:, None].double()], dim=1)
    theirs = theirs.log_softmax(dim=1)
    return torch.where(theirs == -torch.inf, 0.0, theirs.exp() * (theirs - ours)).sum(dim=1)


def most_likely(teacher: TeacherSupport, targets: Tensor) -> Tensor:
    """int64 [N], the token the teacher finds most likely; the target, where another ties with it."""
    best_other, column = teacher.topk_logprobs.max(dim=1)
    other = teacher.topk_ids.gather(1, column[:, None]).squeeze(1)
    return torch.where(teacher.target_logprob >= best_other, targets, other)


def calibration_bins(confidence: Tensor, right: Tensor) -> Tensor:
    """float64 [3, bins]: count, sum of confidences and number right in each bin (i/15, (i+1)/15] of confidence [N]."""
    index = (confidence * CALIBRATION_BINS).ceil().long().sub(1).clamp(0, CALIBRATION_BINS - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, right.to(confidence.dtype)]).double()
    return torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64, device=confidence.device).index_add(1, index, values)


def batches_by_length(lengths: np.ndarray, batch_rows: int) -> Iterator[np.ndarray]:
    """Yield the positions of ``lengths`` in batches of like length, the longest first: a lack of memory shows at once."""
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_rows):
        yield order[start : start + batch_rows]


@torch.inference_mode()
def predict_rows(
    model: PreTrainedModel, examples: ExampleFile, store: ScoreStore, top_k: int, batch_rows: int, name: str
) -> Tally:
    """Return the sums over all targets of the rows; ``name`` says which model, should its logits not be finite."""
    # The student's own collator lays rows out and shifts predictions against targets; the weights of its loss are not used.
    collator = Collator(examples, store, CoupledLoss(teaching="coupled"), top_k, seed=0)
    tally = Tally()
    for positions in batches_by_length(examples.lengths, batch_rows):
        batch = GlobalBatch(positions, SamplerState(seed=0))
        rows = range(len(positions))
        micro_batch = collator.micro_batch(batch, rows, collator.weights(batch, layout=[], step=0)).to(model.device)
        logits = target_logits(model, micro_batch)
        assert micro_batch.teacher is not None, "the collator was given a store"
        micro_batch.teacher.check(micro_batch.targets, logits.shape[1])
        targets_at_once = max(1, LOGPROBS_AT_ONCE // logits.shape[1])
        for start in range(0, len(logits), targets_at_once):
            some = slice(start, start + targets_at_once)
            logprobs = logits[some].double().log_softmax(dim=1)
            if logprobs.isnan().any():
                raise ValueError(f"the logits of {name} are not finite on the held-out rows; its training diverged")
            tally.add(logprobs, micro_batch.targets[some], micro_batch.teacher.select(some))
    return tally


def target_logits(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Return the logits [N, V] that predict the targets; where the model allows, no others are computed but for padding."""
    rows, columns = batch.predicting // batch.token_ids.shape[1], batch.predicting % batch.token_ids.shape[1]
    inputs = {"input_ids": batch.token_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return model(**inputs).logits[rows, columns]
    kept = columns.unique()  # ascending
    return model(**inputs, logits_to_keep=kept).logits[rows, torch.searchsorted(kept, columns)]


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: ExampleFile, texts: list[HeldoutText],
    evaluate: EvaluateConfig,
) -> list[str]:  # fmt: skip
    """Return the greedy answers to the prompts of the first ``len(texts)`` rows, in their order.

    A prompt is all tokens of its row before the last stretch of targets: the last answer of a conversation is asked for.
    """
    if not texts:
        return []
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no end-of-sequence token, so no answer would end")
    # A model's own generation settings may sample or penalise repetition; what is not said here must not come from there.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=evaluate.max_new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=PADDING
    )
    prompts = [prompt_tokens(examples, position) for position in range(len(texts))]
    answers = [""] * len(prompts)
    for positions in batches_by_length(np.array([len(prompt) for prompt in prompts]), evaluate.batch_rows):
        chosen = [prompts[position] for position in positions]
        width = max(len(prompt) for prompt in chosen)
        token_ids = torch.full((len(chosen), width), PADDING)
        attention_mask = torch.zeros_like(token_ids)
        for index, prompt in enumerate(chosen):
            token_ids[index, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            attention_mask[index, width - len(prompt) :] = 1
        generated = model.generate(token_ids.to(model.device), attention_mask=attention_mask.to(model.device))
        for position, tokens in zip(positions, generated[:, width:].tolist(), strict=True):
            ends = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
            answers[position] = tokenizer.decode(tokens[:ends], skip_special_tokens=True)
    return answers


def prompt_tokens(examples: ExampleFile, position: int) -> np.ndarray:
    """int32, the tokens of a row before its last stretch of targets."""
    example = examples[position]
    targets = example.target_positions
    last_start = int(np.flatnonzero(np.diff(targets, prepend=-1) > 1)[-1])
    return example.token_ids[: targets[last_start]]
