"""Hands the student's weights to its samplers: after the steps at which some wait for them, as an ordinary model folder."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from actors.attention import exact
from actors.config.models import TrainConfig
from actors.examples import ExampleFile
from actors.files import whole_folder
from actors.lora import merge_adapters
from actors.rollouts.weights import Proof, WeightFolders, steps_written_by
from actors.score_store.rollout_log import RolloutLog
from actors.student.causal_lm import CausalStudent, prepare_model
from actors.student.checkpoint import whole_weights
from actors.student.finished_model import PROOF_TOKENS, trained_logprobs
from actors.student.ranks import Worker
from actors.student.task import TrainingTask


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
        self._log = RolloutLog(Path(task.rollouts.log)) if task.rollouts else None
        self._copy: CausalStudent | None = None  # on the first worker's CPU, in the samplers' type

    def after(self, student: nn.Module, step: int) -> None:
        """Write the weights after a step, unless nobody waits for them or they are there."""
        if step == 0 or self._rollouts is None or not self._is_awaited(step):
            return
        row = ExampleFile(Path(self._task.examples))[0].token_ids[:PROOF_TOKENS]
        token_ids = torch.from_numpy(row.astype(np.int64))[None]  # [1, T]
        logprobs = trained_logprobs(student, self._task, token_ids, self._worker)  # [T, V]
        weights = whole_weights(student)
        if self._worker.rank > 0:
            return
        copy = self._copy_to_fill()
        copy.load_state_dict(weights)
        plain = merge_adapters(copy.model) if self._task.lora else copy.model
        folder = WeightFolders(Path(self._rollouts.weights)).path(step)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as unfinished:
            plain.save_pretrained(unfinished)
            Proof(row, logprobs[:-1].gather(1, token_ids[0, 1:, None])[:, 0].float().numpy()).write(unfinished)

    def _is_awaited(self, step: int) -> bool:
        rollouts, log = self._rollouts, self._log
        assert rollouts is not None and log is not None
        steps = steps_written_by(step, rollouts.refresh_steps, rollouts.lag, self._total_steps, rollouts.inner_epochs)
        there = WeightFolders(Path(rollouts.weights)).is_there(step)
        return self._worker.agree(not there and any(not log.is_there(one) for one in steps))

    def _copy_to_fill(self) -> CausalStudent:
        """Return a model to put the weights into; adapters are merged into it, so that one that has them serves once."""
        assert self._rollouts is not None
        if self._copy is None or self._task.lora is not None:
            model = prepare_model(exact(self._task.model), self._task.lora, TrainConfig())
            self._copy = CausalStudent(model.to(getattr(torch, self._rollouts.dtype)), self._task.loss)
        return self._copy
