"""What a loss remembers from step to step: plain numbers, the same on every worker, kept in checkpoints.

Most losses remember nothing. The interpolated target moves towards the teacher, the Hellinger selection follows the loss,
and thresholds move with the run; all of them advance once a step, from the step's loss summed over all workers.
"""

import math
from dataclasses import dataclass, replace

from losses.config import DistillationLoss, LossConfig
from losses.divergence_config import InterpolatedTarget
from losses.weighing_config import AllTokens, DistantTokens

NEAR_ZERO = 1e-8  # keeps relative changes of a vanished loss finite


@dataclass(frozen=True, slots=True)
class LossState:
    """Where a loss stands before a step."""

    progress: float = 0.0
    """Share of the run's steps that are done."""

    teacher_share: float = 1.0
    """t of the interpolated target: 0 is the student itself, 1 the teacher."""

    kept_fraction: float = 1.0
    """Share of each row's targets that is taught."""

    improvement: float = 0.0
    """Running mean of the loss's relative improvement."""

    previous_loss: float | None = None
    """Loss of the step before."""

    mean_loss: float | None = None
    """Running mean of the loss."""

    reference_loss: float | None = None
    """The running mean when ``kept_fraction`` last changed."""

    @staticmethod
    def first(loss: LossConfig) -> "LossState":
        """Return the state before the first step."""
        if not isinstance(loss, DistillationLoss):
            return LossState()
        share = loss.divergence.start if isinstance(loss.divergence, InterpolatedTarget) else 1.0
        fraction = 1.0 if isinstance(loss.tokens, AllTokens) else loss.tokens.fraction
        return LossState(teacher_share=share, kept_fraction=fraction)

    def after(self, loss: LossConfig, step: int, total_steps: int, value: float) -> "LossState":
        """Return the state after ``step`` (counted from 1) of ``total_steps``, whose loss was ``value``."""
        state = replace(self, progress=step / total_steps)
        if not isinstance(loss, DistillationLoss):
            return state
        if isinstance(loss.divergence, InterpolatedTarget):
            state = state._towards_the_teacher(loss.divergence, value)
        if isinstance(loss.tokens, DistantTokens) and loss.tokens.step_size > 0:
            state = state._following_the_loss(loss.tokens, value)
        return state

    def numbers(self, loss: LossConfig) -> dict[str, float]:
        """Return, for the log, those that move under this loss."""
        if not isinstance(loss, DistillationLoss):
            return {}
        moving = {}
        if isinstance(loss.divergence, InterpolatedTarget):
            moving["teacher_share"] = self.teacher_share
        if isinstance(loss.tokens, DistantTokens) and loss.tokens.step_size > 0:
            moving["kept_fraction"] = self.kept_fraction
        return moving

    def _towards_the_teacher(self, target: InterpolatedTarget, value: float) -> "LossState":
        """arXiv 2501.16937: ahead of the straight line by as much as the loss improves.

        A relative change counts at most 1: a loss that rises from nearly nothing, as it does where t begins at 0, would
        otherwise be remembered for the rest of the run.
        """
        improvement, share = self.improvement, self.teacher_share
        if self.previous_loss is not None:
            relative = (self.previous_loss - value) / (abs(self.previous_loss) + NEAR_ZERO)
            improvement = target.momentum * improvement + (1 - target.momentum) * max(-1.0, min(relative, 1.0))
            share += target.rate / (1 + math.exp(-improvement)) * (1 - share)
        line = target.start + (target.end - target.start) * self.progress
        return replace(self, teacher_share=max(line, min(share, target.end)), improvement=improvement, previous_loss=value)

    def _following_the_loss(self, tokens: DistantTokens, value: float) -> "LossState":
        """arXiv 2510.11615, adaptive token focusing: fewer tokens once the loss has fallen, more once it has risen."""
        if self.mean_loss is None or self.reference_loss is None:
            return replace(self, mean_loss=value, reference_loss=value)
        mean = tokens.momentum * self.mean_loss + (1 - tokens.momentum) * value
        factor = 1.0
        if mean < self.reference_loss * (1 - tokens.tolerance):
            factor = 1 - tokens.step_size
        elif mean > self.reference_loss * (1 + tokens.tolerance):
            factor = 1 + tokens.step_size
        if factor == 1.0:
            return replace(self, mean_loss=mean)
        fraction = min(max(self.kept_fraction * factor, tokens.floor), 1.0)
        return replace(self, kept_fraction=fraction, mean_loss=mean, reference_loss=mean)
