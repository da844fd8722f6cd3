"""What is counted of a model's predictions on held-out rows, wherever the logits come from.

N targets, K top-k, V vocabulary. Logarithms are natural; sums over targets are kept in float64.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from actors.dataloader.collator import MicroBatch, collate
from actors.dataloader.scored_rows import FileRows
from actors.evaluation.class_metrics import confusion_of, measures_of
from actors.examples import ExampleFile
from actors.score_store.store import ScoreStore
from losses.terms import categorical_kl
from losses.topk_teacher import TopkTeacher

CALIBRATION_BINS = 15
LOGPROBS_AT_ONCE = 1 << 25  # float64 numbers of one [N, V] block: 256 MiB


class HeldoutRows:
    """Held-out rows with the teacher's scores of them, laid out for a model."""

    def __init__(self, examples: ExampleFile, store: ScoreStore, top_k: int, vocab_size: int) -> None:
        self._examples, self._store, self._top_k, self._vocab_size = examples, store, top_k, vocab_size

    def batch(self, positions: np.ndarray) -> MicroBatch:
        """Return the tensors of one forward pass over some of the rows."""
        return collate(FileRows(self._examples, self._store, self._top_k, positions), range(len(positions)), self._vocab_size)


class HeldoutMetrics:
    """Sums over targets.

    Args:
        classes: of a classifier, how many labels it tells apart; 0 for a language model.
        ordered: whether the labels are grades.
    """

    def __init__(self, classes: int = 0, ordered: bool = False) -> None:
        self.confusion = np.zeros((classes, classes), dtype=np.int64)
        """[C, C] numbers of rows: a line for each label that is right, a column for each that was predicted."""
        self._ordered = ordered
        self.targets = 0
        self.cross_entropy = 0.0
        self.forward_kl = 0.0
        self.agreements = 0
        self._bins = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64)  # count, sum of confidences, number right

    def add(self, logprobs: Tensor, targets: Tensor, teacher: TopkTeacher) -> None:
        """Add the model's log-probabilities [N, V] at the targets [N]."""
        confidence, predicted = logprobs.max(dim=1)
        self.targets += len(targets)
        self.cross_entropy -= float(logprobs.gather(1, targets[:, None]).sum())
        self.forward_kl += float(forward_kl_to_teacher(logprobs, targets, teacher).sum())
        self.agreements += int((predicted == most_likely(teacher, targets)).sum())
        self._bins += calibration_bins(confidence.exp(), predicted == targets).cpu()
        self._count(predicted, targets)

    def add_logits(self, logits: Tensor, batch: MicroBatch) -> None:
        """Add a model's logits [N, V] at the targets of a batch; where they are not finite, ``require_finite`` says so."""
        assert isinstance(batch.teacher, TopkTeacher), "the rows come with scores from a store"
        targets_at_once = max(1, LOGPROBS_AT_ONCE // logits.shape[1])
        for start in range(0, len(logits), targets_at_once):
            some = slice(start, start + targets_at_once)
            logprobs = logits[some].double().log_softmax(dim=1)
            if logprobs.isnan().any():
                self.cross_entropy = math.nan  # it stays so, whatever is added
                return
            self.add(logprobs, batch.targets[some], batch.teacher.select(some))

    def add_teacher(self, teacher: TopkTeacher, targets: Tensor) -> None:
        """Add the teacher itself at the targets [N], from its stored scores: its most likely token is target or top-K."""
        predicted, best = most_likely(teacher, targets), torch.maximum(teacher.target_logprob, teacher.topk_logprobs.amax(dim=1))
        self.targets += len(targets)
        self.cross_entropy -= float(teacher.target_logprob.double().sum())
        self.agreements += len(targets)
        self._bins += calibration_bins(best.exp(), predicted == targets)
        self._count(predicted, targets)

    def sum_over_workers(self, device: torch.device) -> None:
        """Add up what the workers of a distributed run have counted; all of them call it together."""
        counts = torch.tensor([self.targets, self.cross_entropy, self.forward_kl, self.agreements], dtype=torch.float64)
        packed = torch.cat([counts, self._bins.flatten(), torch.from_numpy(self.confusion).double().flatten()]).to(device)
        torch.distributed.all_reduce(packed)
        targets, self.cross_entropy, self.forward_kl, agreements = packed[:4].tolist()
        self.targets, self.agreements = round(targets), round(agreements)
        bins, confusion = packed[4:].cpu().split([self._bins.numel(), self.confusion.size])
        self._bins = bins.reshape(self._bins.shape)
        self.confusion = confusion.numpy().round().astype(np.int64).reshape(self.confusion.shape)

    def require_finite(self, name: str) -> None:
        """Raise if a logit was not finite; after ``sum_over_workers`` on all workers alike, so that none waits for another.

        Raises:
            ValueError: naming the model, ``name``.
        """
        if math.isnan(self.cross_entropy):
            raise ValueError(f"the logits of {name} are not finite on the held-out rows; its training diverged")

    def measures(self) -> dict[str, float]:
        """Return the means over the targets, by the names that ``Metrics`` has for them."""
        return {
            "heldout_loss": self.cross_entropy / self.targets,
            "kl_to_teacher": self.forward_kl / self.targets,
            "top1_agreement": self.agreements / self.targets,
            "calibration_error": self.calibration_error(),
        }

    def of_labels(self) -> dict[str, float | None]:
        """Return what is measured of classifiers alone, by the names that ``Metrics`` has; nothing of a language model."""
        if not self.confusion.size:
            return {}
        found = measures_of(self.confusion, self._ordered)
        grades = {"weighted_kappa": found.weighted_kappa} if self._ordered else {}
        return {"accuracy": found.accuracy, "macro_f1": found.macro_f1, **grades}

    def calibration_error(self) -> float:
        """Mean over targets of the distance, in their bin, between mean confidence and share right."""
        _, confidences, right = self._bins
        return float((confidences - right).abs().sum() / self.targets)

    def _count(self, predicted: Tensor, targets: Tensor) -> None:
        if self.confusion.size:
            self.confusion += confusion_of(targets.cpu().numpy(), predicted.cpu().numpy(), len(self.confusion))


def forward_kl_to_teacher(logprobs: Tensor, targets: Tensor, teacher: TopkTeacher) -> Tensor:
    """KL(teacher || model) [N] in nats, over the classes target, each of the top-K, and everything else.

    The teacher's classes are normalised to one: its stored log-probabilities are rounded, and a divergence of masses that
    do not add up may be negative.
    """
    # Where a column names no token the target stands in; the teacher's mass there is 0, so that it counts for nothing.
    ids = torch.cat([targets[:, None], torch.where(teacher.named, teacher.topk_ids, targets[:, None])], dim=1)  # [N, K+1]
    ours = logprobs.gather(1, ids)
    theirs = torch.cat([teacher.target_logprob[:, None], teacher.topk_logprobs], dim=1).double()
    # Else the named tokens are all there are, and nothing else is a class.
    if ids.shape[1] < logprobs.shape[1] or not bool(teacher.named.all()):
        our_tail = logprobs.scatter(1, ids, -torch.inf).logsumexp(dim=1, keepdim=True)
        ours = torch.cat([ours, our_tail], dim=1)
        theirs = torch.cat([theirs, teacher.tail_logmass[:, None].double()], dim=1)
    theirs = theirs.log_softmax(dim=1)
    empty = theirs == -torch.inf  # a class of no mass costs nothing, whatever the model gives it
    return categorical_kl(theirs.masked_fill(empty, 0.0), ours.masked_fill(empty, 0.0))


def most_likely(teacher: TopkTeacher, targets: Tensor) -> Tensor:
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
