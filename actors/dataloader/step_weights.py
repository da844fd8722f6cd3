"""The weights of an optimizer step's targets: what the loss makes of the teacher's scores of all its rows."""

from collections.abc import Sequence

import torch

from actors.config.models import needs_complete_store
from actors.dataloader.sampler import Layout
from actors.dataloader.scored_rows import FileRows, RowBatch
from actors.dataloader.store_split import StoreSplit, split_store
from actors.score_store.store import ScoreStore
from losses.config import AtkdLoss, DistillationLoss, LossConfig, PolicyGradientLoss
from losses.loss_state import LossState
from losses.policy_gradient import DrawnTokens, policy_gradient_weights
from losses.token_weights import TokenWeights, easy_border, split_easy, token_weights
from losses.weighing import sample_weights, selection_factor
from losses.weighing_config import AllTokens, TeacherLossSamples


class StepWeights:
    """Weighs the targets of each step.

    Every worker weighs all rows of a step, not only its own: the ranking is the teacher's alone, so that it needs no
    communication, and the loss of a step does not depend on how it is cut into forward passes, but for scope ``microbatch``,
    which ranks each pass by itself and takes the mean over passes, as the authors' code does.

    Args:
        loss: the loss.
        seed: draws random splits, together with the step.
        store: the scores of all rows, for scope ``dataset``, which ranks over them; None where the loss needs no teacher.
    """

    def __init__(self, loss: LossConfig, seed: int, store: ScoreStore | None) -> None:
        self._loss, self._seed, self._store = loss, seed, store
        self._split: StoreSplit | None = None  # of the whole store

    def wait_for_scores(self, batch: RowBatch, timeout_seconds: float) -> float:
        """Wait until all scores are there that the weights of a batch depend on; return the seconds waited."""
        if not needs_complete_store(self._loss):
            return batch.wait(timeout_seconds)
        assert self._store is not None, "a loss that ranks over the store has one"
        return 0.0 if self._split is not None else self._store.wait_until_complete(timeout_seconds)

    def of_step(self, batch: RowBatch, layout: Layout, step: int, state: LossState) -> list[TokenWeights]:
        """Return the weights of each row's targets, normalised over the step; ``layout`` matters to scope ``microbatch``."""
        if isinstance(self._loss, PolicyGradientLoss):
            tokens = [batch.drawn(row) for row in range(len(batch))]
            counts = [len(row) for row in tokens]
            return policy_gradient_weights(DrawnTokens.concatenate(tokens), counts, self._loss).split(counts)
        uncertainties = [batch.uncertainty(row) for row in range(len(batch))]
        if isinstance(self._loss, AtkdLoss) and self._loss.scope == "microbatch":
            passes = [rows for worker in layout for rows in worker if rows]
            of_row: dict[int, TokenWeights] = {}
            for rows in passes:
                of_pass = self._weights(batch, [uncertainties[row] for row in rows], rows, step)
                of_row |= {row: of_one.scaled(1 / len(passes)) for row, of_one in zip(rows, of_pass, strict=True)}
            weights = [of_row[row] for row in range(len(batch))]
        else:
            weights = self._weights(batch, uncertainties, range(len(batch)), step)
        return self._weighed(weights, batch, state)

    def easy_border(self, batch: RowBatch) -> dict[str, float]:
        """Return the highest UNC of the step's easy targets, by the name it is recorded under.

        Nothing where UNC does not part a step's targets in two: another split, or one for each forward pass.
        """
        if not isinstance(self._loss, AtkdLoss) or self._loss.split != "uncertainty" or self._loss.scope == "microbatch":
            return {}
        together = torch.cat([batch.uncertainty(row) for row in range(len(batch))])
        if self._loss.scope == "dataset":
            easy = together[self._easy_of(batch, range(len(batch)))]
            border = float(easy.max()) if len(easy) else None
        else:
            border = easy_border(together, self._loss)
        return {} if border is None else {"easy_border": border}

    def _weights(
        self, batch: RowBatch, uncertainties: Sequence[torch.Tensor], rows: Sequence[int], step: int
    ) -> list[TokenWeights]:
        together = torch.cat(list(uncertainties))
        easy = None
        if isinstance(self._loss, AtkdLoss) and self._loss.scope == "dataset":
            easy = self._easy_of(batch, rows)
        elif isinstance(self._loss, AtkdLoss):
            easy = split_easy(together, self._loss, seed=self._seed + step)
        return token_weights(together, self._loss, easy).split([len(one) for one in uncertainties])

    def _weighed(self, weights: list[TokenWeights], batch: RowBatch, state: LossState) -> list[TokenWeights]:
        """Make up for targets that will not be taught, and weigh the rows among each other."""
        if not isinstance(self._loss, DistillationLoss):
            return weights
        if not isinstance(self._loss.tokens, AllTokens):
            factor = selection_factor([len(row) for row in weights], state.kept_fraction)
            weights = [row.times(factor, 1.0) for row in weights]
        if isinstance(self._loss.samples, TeacherLossSamples):
            shares = sample_weights(batch.teacher_losses(), self._loss.samples, state).tolist()
            weights = [row.times(share, 1.0 - share) for row, share in zip(weights, shares, strict=True)]
        return weights

    def _easy_of(self, batch: RowBatch, rows: Sequence[int]) -> torch.Tensor:
        """Return a bool [N] mask of the targets of some rows that are easy among those of the whole dataset."""
        assert isinstance(batch, FileRows), "rows that are written on the way have no place in a dataset"
        if self._split is None:
            assert isinstance(self._loss, AtkdLoss) and self._store is not None, "a loss that ranks over the store has one"
            self._split = split_store(self._store, self._loss, self._seed)
        return torch.cat([self._split.easy(int(batch.positions[row])) for row in rows])
