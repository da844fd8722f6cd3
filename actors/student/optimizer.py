"""AdamW, its schedule, and clipping that also knows sharded gradients."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from actors.config.models import OptimizerConfig


def make_optimizer(student: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over the trained weights; only matrices decay."""
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    matrices = {"params": [weight for weight in trained if weight.ndim >= 2], "weight_decay": config.weight_decay}
    vectors = {"params": [weight for weight in trained if weight.ndim < 2], "weight_decay": 0.0}
    groups = [group for group in (matrices, vectors) if group["params"]]
    return AdamW(groups, lr=config.learning_rate, betas=config.betas)


def make_schedule(optimizer: Optimizer, config: OptimizerConfig, total_steps: int) -> LRScheduler:
    """Linear warm-up, then the configured decay, over all steps of the run."""
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    schedule: LRScheduler = get_scheduler(
        config.schedule, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps
    )
    return schedule


def clip_gradients(student: nn.Module, largest_norm: float | None) -> float:
    """Scale the gradients so that their norm over all weights and workers is at most ``largest_norm``; return the norm."""
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), math.inf if largest_norm is None else largest_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
