"""What a student in training hands to its samplers: its weights, as an ordinary model folder, and how many rows they write."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.attention import exact
from actors.config.models import TrainConfig
from actors.config.rollouts import AdaptiveShareConfig
from actors.dataloader.row_sources import AdaptiveShares, Change, steps_written_by
from actors.examples import ExampleFile
from actors.lora import merge_adapters
from actors.rollouts.weights import Proof, WeightFolders
from actors.rounding import generator_of, rounded
from actors.score_store.rollout_log import RolloutLog
from actors.student.causal_lm import CausalStudent, prepare_model
from actors.student.checkpoint import whole_weights
from actors.student.finished_model import PROOF_TOKENS, every_token, trained_logprobs
from actors.student.ranks import Worker
from actors.student.task import TrainingTask
from actors.student.validation import HeldoutPasses


class ShareKeeper:
    """Decides how many rows the student writes, where that adapts to its loss on held-out rows (DistiLLM, arXiv 2402.03898).

    The share grows by ``raise_by`` each time the loss lies ``tolerance`` above what it was when the share last changed, or at the
    beginning. What was decided stands in a file and is not decided again by a training that resumes.

    Args:
        task: of the training.
        worker: this one; all call ``after`` together, and the first one writes.
        vocab_size: of the student.
    """

    def __init__(self, task: TrainingTask, worker: Worker, vocab_size: int) -> None:
        self._worker, self._policy = worker, task.rollouts.policy if task.rollouts else None
        if self._policy is None or self._policy.shares is None:
            return
        rollouts = task.rollouts
        assert rollouts is not None and rollouts.heldout is not None and rollouts.heldout_store is not None
        self._shares = AdaptiveShares(self._policy.shares)
        examples, store = Path(rollouts.heldout), rollouts.heldout_store
        self._heldout = HeldoutPasses(task, worker, examples, store, task.top_k, rollouts.heldout_batch_rows, vocab_size)

    def after(self, student: nn.Module, step: int) -> None:
        """Decide the share of the rows that are written by the weights after a step, if that is due and not decided yet."""
        policy = self._policy
        if policy is None or policy.adaptive is None or step % policy.window_steps:
            return
        decided, changes = self._shares.read()
        if self._worker.agree(decided < step and (not changes or step % policy.adaptive.every_steps == 0)):
            loss = self._heldout.counted(student).measures()["heldout_loss"]
            changes += next_change(policy.adaptive, policy.student_share, step, loss, changes)
        if self._worker.rank == 0 and decided < step:
            self._shares.write(step, changes)


def next_change(
    adaptive: AdaptiveShareConfig, most: float, step: int, loss: float, changes: Sequence[Change]
) -> list[Change]:
    """Return the first share, or the next, if the loss after a step has risen enough; none if it stays."""
    if not changes:
        return [Change(step, adaptive.first, loss)]
    last = changes[-1]
    if loss < last.loss + adaptive.tolerance or last.share >= most:
        return []
    return [Change(step, min(last.share + adaptive.raise_by, most), loss)]


class WeightPublisher:
    """Writes the student's weights for its samplers; does nothing where none wait.

    Args:
        task: of the training.
        worker: this one; all call ``after`` together, and the first one writes.
        total_steps: of the training; where rows are learned from several times, those of the first time.
    """

    def __init__(self, task: TrainingTask, worker: Worker, total_steps: int) -> None:
        self._task, self._worker, self._total_steps = task, worker, total_steps
        self._rollouts = task.rollouts
        self._log = RolloutLog(task.rollouts.log) if task.rollouts else None
        self._folders = WeightFolders(task.rollouts.weights) if task.rollouts else None
        self._copy: CausalStudent | None = None  # on the first worker's CPU, in the samplers' type

    def after(self, student: nn.Module, step: int) -> None:
        """Write the weights after a step, unless nobody waits for them or they are there."""
        if step == 0 or self._folders is None or not self._is_awaited(step):
            return
        row = ExampleFile(Path(self._task.examples))[0].token_ids[:PROOF_TOKENS]
        token_ids = torch.from_numpy(row.astype(np.int64))[None]  # [1, T]
        logprobs = trained_logprobs(student, self._task, every_token(token_ids), self._worker)  # [T, V]
        weights = whole_weights(student)
        if self._worker.rank > 0:
            return
        plain = self._in_their_type(weights, step)
        proof = Proof(row, logprobs[:-1].gather(1, token_ids[0, 1:, None])[:, 0].float().numpy())

        def save(folder: Path) -> None:
            plain.save_pretrained(folder)
            proof.write(folder)

        self._folders.write(step, save)

    def _is_awaited(self, step: int) -> bool:
        """Whether somebody waits for the weights; the first worker looks, for the others might see what it has not seen."""
        return self._worker.agree(self._worker.rank == 0 and self._are_missing(step))

    def _are_missing(self, step: int) -> bool:
        rollouts, log, folders = self._rollouts, self._log, self._folders
        assert rollouts is not None and log is not None and folders is not None
        policy = rollouts.policy
        steps = steps_written_by(step, policy.refresh_steps, policy.lag, self._total_steps, policy.inner_epochs)
        if not steps or policy.share(steps[0]) == 0:  # a window has one share
            return False
        return not folders.is_there(step) and any(not log.is_there(one) for one in steps)

    def _in_their_type(self, weights: Mapping[str, Tensor], step: int) -> PreTrainedModel:
        """Return an ordinary model with the weights, adapters merged, in the type in which samplers compute."""
        assert self._rollouts is not None
        dtype, generator = getattr(torch, self._rollouts.dtype), generator_of(self._task.seed, step)
        if self._task.lora is not None:
            whole = self._empty_copy(torch.float32)  # made anew: merged adapters are gone
            whole.load_state_dict(weights)
            plain = merge_adapters(whole.model)
            for weight in plain.parameters():
                weight.data = rounded(weight.data, dtype, generator)
            return plain.to(dtype)
        if self._copy is None:
            self._copy = self._empty_copy(dtype)
        self._copy.load_state_dict({name: rounded(weight, dtype, generator) for name, weight in weights.items()})
        return self._copy.model

    def _empty_copy(self, dtype: torch.dtype) -> CausalStudent:
        model = prepare_model(exact(self._task.model), self._task.lora, TrainConfig())
        return CausalStudent(model.to(dtype), self._task.loss)
