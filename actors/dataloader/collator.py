"""From rows and scores to the tensors of one forward pass. The only place where targets are shifted against predictions.

B rows, T tokens of a row, N targets, K top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from actors.config.models import needs_complete_store
from actors.dataloader.sampler import GlobalBatch
from actors.examples import ExampleFile
from actors.records import NO_TOKEN, Example, TeacherScores
from actors.score_store.store import ScoreStore
from losses.config import AtkdLoss, HardLabelLoss, LossConfig
from losses.loss_state import LossState
from losses.token_weights import TokenWeights, easy_border, split_easy, token_weights
from losses.topk_teacher import TopkTeacher, check_target_ids
from losses.weighing import sample_weights, selection_factor
from losses.weighing_config import AllTokens, TeacherLossSamples

PADDING = 0  # any id will do: padding is neither attended to nor a target

Layout = Sequence[Sequence[Sequence[int]]]
"""For each worker, for each of its forward passes, the rows of the step it takes."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass needs; positions are flat, row by row."""

    token_ids: torch.Tensor
    """int64 [B, T], padded on the right."""

    attention_mask: torch.Tensor
    """int64 [B, T], 0 on padding."""

    predicting: torch.Tensor
    """int64 [N], flat positions in [B * T] whose output predicts a target: one before the target's own."""

    targets: torch.Tensor
    """int64 [N], the targets in the same order."""

    teacher: TopkTeacher | None
    """The teacher's scores of the same N targets; None where the loss needs no teacher."""

    weights: TokenWeights
    """The weights of the same N targets, normalised over the whole optimizer step."""

    row_counts: tuple[int, ...]
    """Number of targets of each row; they add up to N."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Return a copy on another device."""
        return MicroBatch(
            self.token_ids.to(device), self.attention_mask.to(device), self.predicting.to(device), self.targets.to(device),
            self.teacher.to(device) if self.teacher else None, self.weights.to(device), self.row_counts,
        )  # fmt: skip


class Collator:
    """Reads examples and scores, weighs the tokens of a step, and lays rows out for the model."""

    def __init__(
        self, examples: ExampleFile, store: ScoreStore | None, loss: LossConfig, top_k: int, seed: int, vocab_size: int
    ) -> None:
        self.examples, self.store, self.loss, self.top_k, self.seed = examples, store, loss, top_k, seed
        self.vocab_size = vocab_size  # the student's
        self._easy_in_dataset: list[torch.Tensor] | None = None  # bool [N] per row

    def wait_for(self, batch: GlobalBatch, timeout_seconds: float) -> float:
        """Wait until the scores of a batch are there; return the seconds waited."""
        if self.store is None:
            return 0.0
        if needs_complete_store(self.loss):
            return sum(self.store.wait_for(shard, timeout_seconds) for shard in range(self.store.shard_count))
        shards = np.unique(batch.positions // self.store.rows_per_shard)
        return sum(self.store.wait_for(int(shard), timeout_seconds) for shard in shards)

    def weights(self, batch: GlobalBatch, layout: Layout, step: int, state: LossState) -> list[TokenWeights]:
        """Return the weights of each row's targets, normalised over the whole step.

        Every worker computes this for all rows, not only its own: the ranking is the teacher's alone, so that it needs no
        communication, and the loss of a step does not depend on ``layout``, how the step is cut into forward passes, but
        for scope ``microbatch``, which ranks each pass by itself and takes the mean over passes, as the authors' code does.
        """
        uncertainties = [self._uncertainty(int(position)) for position in batch.positions]
        if isinstance(self.loss, AtkdLoss) and self.loss.scope == "microbatch":
            passes = [rows for worker in layout for rows in worker if rows]
            of_row: dict[int, TokenWeights] = {}
            for rows in passes:
                of_pass = self._weights(batch, [uncertainties[row] for row in rows], rows, step)
                of_row |= {row: of_one.scaled(1 / len(passes)) for row, of_one in zip(rows, of_pass, strict=True)}
            weights = [of_row[row] for row in range(len(uncertainties))]
        else:
            weights = self._weights(batch, uncertainties, range(len(uncertainties)), step)
        return self._weighed(weights, batch, state)

    def _weighed(self, weights: list[TokenWeights], batch: GlobalBatch, state: LossState) -> list[TokenWeights]:
        """Make up for targets that will not be taught, and weigh the rows among each other."""
        if isinstance(self.loss, HardLabelLoss):
            return weights
        if not isinstance(self.loss.tokens, AllTokens):
            factor = selection_factor([len(row) for row in weights], state.kept_fraction)
            weights = [row.times(factor, 1.0) for row in weights]
        if isinstance(self.loss.samples, TeacherLossSamples):
            assert self.store is not None, "a loss with a teacher has a store"
            losses = torch.tensor([self.store.teacher_loss_at(int(position)) for position in batch.positions])
            shares = sample_weights(losses, self.loss.samples, state).tolist()
            weights = [row.times(share, 1.0 - share) for row, share in zip(weights, shares, strict=True)]
        return weights

    def _weights(
        self, batch: GlobalBatch, uncertainties: Sequence[torch.Tensor], rows: Sequence[int], step: int
    ) -> list[TokenWeights]:
        together = torch.cat(list(uncertainties))
        easy = None
        if isinstance(self.loss, AtkdLoss) and self.loss.scope == "dataset":
            easy = self._easy_of(batch.positions[list(rows)])
        elif isinstance(self.loss, AtkdLoss):
            easy = split_easy(together, self.loss, seed=self.seed + step)
        return token_weights(together, self.loss, easy).split([len(one) for one in uncertainties])

    def easy_border(self, batch: GlobalBatch) -> dict[str, float]:
        """Return the highest UNC of the step's easy targets, by the name it is recorded under.

        Nothing where UNC does not part a step's targets in two: another split, or one for each forward pass.
        """
        if not isinstance(self.loss, AtkdLoss) or self.loss.split != "uncertainty" or self.loss.scope == "microbatch":
            return {}
        together = torch.cat([self._uncertainty(int(position)) for position in batch.positions])
        if self.loss.scope == "dataset":
            easy = together[self._easy_of(batch.positions)]
            border = float(easy.max()) if len(easy) else None
        else:
            border = easy_border(together, self.loss)
        return {} if border is None else {"easy_border": border}

    def micro_batch(self, batch: GlobalBatch, rows: Sequence[int], weights: Sequence[TokenWeights]) -> MicroBatch:
        """Return the tensors of one forward pass over some rows of a step; ``weights`` are those of all its rows.

        Targets and scores are looked at here, on the CPU, so that the loss need not: an accelerator would have to wait.
        """
        examples = [self.examples[int(batch.positions[row])] for row in rows]
        length = max(len(example.token_ids) for example in examples)
        token_ids = np.full((len(examples), length), PADDING, dtype=np.int64)
        attention_mask = np.zeros_like(token_ids)
        for index, example in enumerate(examples):
            token_ids[index, : len(example.token_ids)] = example.token_ids
            attention_mask[index, : len(example.token_ids)] = 1
        predicting = [index * length + example.target_positions - 1 for index, example in enumerate(examples)]
        targets = torch.from_numpy(np.concatenate([example.targets for example in examples]).astype(np.int64))
        check_target_ids(targets, len(targets), self.vocab_size, where="the rows")
        teacher = self._teacher(examples, [int(batch.positions[row]) for row in rows])
        if teacher is not None:
            teacher.check(targets, self.vocab_size)
        return MicroBatch(
            token_ids=torch.from_numpy(token_ids),
            attention_mask=torch.from_numpy(attention_mask),
            predicting=torch.from_numpy(np.concatenate(predicting)),
            targets=targets,
            teacher=teacher,
            weights=TokenWeights.concatenate([weights[row] for row in rows]),
            row_counts=tuple(len(example.targets) for example in examples),
        )

    def weightless(self, batch: GlobalBatch) -> MicroBatch:
        """Return a pass over the batch's first row that adds nothing to loss and gradients."""
        targets = int(self.examples[int(batch.positions[0])].loss_mask.sum())
        return self.micro_batch(batch, [0], [TokenWeights.zero(targets)])

    def _teacher(self, examples: Sequence[Example], positions: Sequence[int]) -> TopkTeacher | None:
        if self.store is None:
            return None
        scores = [self.store.scores_at(position, self.top_k) for position in positions]
        for example, score in zip(examples, scores, strict=True):
            _require_same_row(example, score)
        topk_ids = np.concatenate([score.topk_ids for score in scores])
        kept = topk_ids.shape[1] if self.store.top_mass is None else max(1, int((topk_ids != NO_TOKEN).sum(axis=1).max()))
        return TopkTeacher(
            target_logprob=torch.from_numpy(np.concatenate([score.target_logprob for score in scores])),
            topk_ids=torch.from_numpy(topk_ids[:, :kept].astype(np.int64)),
            topk_logprobs=torch.from_numpy(np.concatenate([score.topk_logprobs[:, :kept] for score in scores])),
            tail_logmass=torch.from_numpy(np.concatenate([score.tail_logmass for score in scores])),
        )

    def _uncertainty(self, position: int) -> torch.Tensor:
        if self.store is None:
            return torch.zeros(int(self.examples[position].loss_mask.sum()))
        return torch.from_numpy(self.store.uncertainty_at(position).copy())

    def _easy_of(self, positions: np.ndarray) -> torch.Tensor:
        """Say which targets of some rows are easy among those of the whole dataset, bool [N]."""
        return torch.cat([self._easy_rows()[int(position)] for position in positions])

    def _easy_rows(self) -> list[torch.Tensor]:
        if self._easy_in_dataset is None:
            assert isinstance(self.loss, AtkdLoss)
            rows = [self._uncertainty(position) for position in range(len(self.examples))]
            easy = split_easy(torch.cat(rows), self.loss, seed=self.seed)
            self._easy_in_dataset = list(easy.split([len(row) for row in rows]))
        return self._easy_in_dataset


def _require_same_row(example: Example, score: TeacherScores) -> None:
    if example.key != score.key:
        raise ValueError(
            f"row {example.row} has key {example.key[:12]}, but the store holds scores of {score.key[:12]} at its place; "
            "the store belongs to other data: score again"
        )
