"""How much a distillation loss costs, from hidden states to gradients, beside plain cross entropy of the same targets.

    python -m benchmarks.losses [--vocabulary 32000 152000] [--rounds 5]

The baseline is ``cross_entropy(hidden @ head.T, targets)``, forward and backward. N targets, H hidden size, V vocabulary.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from benchmarks.bars import Bar, alternating_seconds, median_ratio, peak_bytes, print_table, report
from losses.config import AtkdLoss, CoupledLoss, LossConfig, TeacherLoss
from losses.divergence_config import (
    AdaptiveKL,
    AlphaBeta,
    InterpolatedTarget,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TopOneCrossEntropy,
    TotalVariation,
)
from losses.fused_linear import chunked_distillation_loss
from losses.lm_head import LMHead
from losses.teachers import DenseTeacher, HiddenTeacher, Teacher
from losses.token_weights import TokenWeights, split_easy, token_weights
from losses.topk_teacher import TopkTeacher

TARGETS, HIDDEN, TOP_K = 512, 512, 64

KLS: dict[str, TeacherLoss] = {
    "forward KL": CoupledLoss(kind="coupled"),
    "reverse KL": CoupledLoss(kind="coupled", divergence=ReverseKL()),
    "ATKD": AtkdLoss(kind="atkd"),
}
MIXED: dict[str, TeacherLoss] = {
    "Jensen-Shannon": CoupledLoss(kind="coupled", divergence=JensenShannon()),
    "skew forward KL": CoupledLoss(kind="coupled", divergence=SkewForwardKL()),
    "skew reverse KL": CoupledLoss(kind="coupled", divergence=SkewReverseKL()),
    "adaptive KL": CoupledLoss(kind="coupled", divergence=AdaptiveKL()),
}
OTHERS: dict[str, TeacherLoss] = {
    "total variation": CoupledLoss(kind="coupled", divergence=TotalVariation()),
    "alpha-beta": CoupledLoss(kind="coupled", divergence=AlphaBeta()),
    "top-1 cross entropy": CoupledLoss(kind="coupled", divergence=TopOneCrossEntropy()),
    "interpolated target": CoupledLoss(kind="coupled", divergence=InterpolatedTarget()),
}


@dataclass(frozen=True)
class Problem:
    """Hidden states, head, targets and teachers of one vocabulary."""

    hidden: Tensor
    head: LMHead
    targets: Tensor
    truncated: TopkTeacher
    dense: DenseTeacher
    hidden_teacher: HiddenTeacher

    @staticmethod
    def make(vocab_size: int, device: torch.device, dtype: torch.dtype) -> "Problem":
        """Return random numbers whose distributions are about as peaked as a trained model's."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(TARGETS, HIDDEN, generator=generator)
        weight = torch.randn(vocab_size, HIDDEN, generator=generator) * 3 / HIDDEN**0.5
        near = weight + 0.5 * weight.std() * torch.randn(vocab_size, HIDDEN, generator=generator)
        targets = torch.randint(vocab_size, (TARGETS,), generator=generator)
        teacher_logits = linear(hidden, near)
        return Problem(
            hidden.to(device, dtype).requires_grad_(),
            LMHead(weight.to(device, dtype).requires_grad_()),
            targets.to(device),
            TopkTeacher.from_logits(teacher_logits, targets, TOP_K).to(device),
            DenseTeacher(teacher_logits.to(device, dtype), targets.to(device)),
            HiddenTeacher(hidden.to(device, dtype), LMHead(near.to(device, dtype)), targets.to(device)),
        )

    def forget_gradients(self) -> None:
        """Drop what the last pass left."""
        self.hidden.grad = self.head.weight.grad = None


def plain_cross_entropy(problem: Problem) -> Callable[[], object]:
    """Return the baseline."""

    def run() -> None:
        problem.forget_gradients()
        cross_entropy(linear(problem.hidden, problem.head.weight).float(), problem.targets).backward()

    return run


def distillation(problem: Problem, teacher: Teacher, loss: LossConfig) -> Callable[[], object]:
    """Return one pass of our loss; the step's token weights are made once, as the loop makes them, outside."""
    weights = weights_of(teacher, loss)

    def run() -> None:
        problem.forget_gradients()
        chunked_distillation_loss(problem.hidden, problem.head, problem.targets, teacher, weights, loss).loss.backward()

    return run


def weights_of(teacher: Teacher, loss: LossConfig) -> TokenWeights:
    """Return the token weights of a step that is this one pass."""
    uncertainty = teacher.uncertainty
    easy = split_easy(uncertainty, loss, seed=0) if isinstance(loss, AtkdLoss) else None
    return token_weights(uncertainty, loss, easy)


def measure(vocab_size: int, rounds: int, device: torch.device, dtype: torch.dtype) -> list[Bar]:
    """Print the table of one vocabulary and return its bars."""
    problem = Problem.make(vocab_size, device, dtype)
    tasks = {"cross entropy": plain_cross_entropy(problem)}
    limits: dict[str, tuple[float, float] | None] = {}
    for name, loss in KLS.items():
        for kind, teacher, time_limit in (("K=64", problem.truncated, 1.25), ("dense", problem.dense, 1.6)):
            tasks[f"{name}, {kind}"] = distillation(problem, teacher, loss)
            limits[f"{name}, {kind}"] = (time_limit, 0.25 if kind == "K=64" else float("inf"))
    for name, loss in MIXED.items():
        tasks[f"{name}, dense"] = distillation(problem, problem.dense, loss)
        limits[f"{name}, dense"] = (2.5, float("inf"))
    for name, loss in OTHERS.items():
        tasks[f"{name}, dense"] = distillation(problem, problem.dense, loss)
    tasks["ATKD, hidden states and teacher head"] = distillation(problem, problem.hidden_teacher, KLS["ATKD"])
    seconds = alternating_seconds(tasks, rounds)
    weight_gradient = problem.head.weight.numel() * problem.head.weight.element_size()
    extra = {name: peak_after(problem, task) - weight_gradient for name, task in tasks.items()}
    rows, bars = [], []
    for name in tasks:
        time_ratio = median_ratio(seconds[name], seconds["cross entropy"])
        memory_ratio = extra[name] / extra["cross entropy"]
        rows.append([
            name, f"{min(seconds[name]) * 1e3:.0f}", f"{time_ratio:.2f}", f"{extra[name] / 2**20:.0f}", f"{memory_ratio:.2f}"
        ])  # fmt: skip
        if limit := limits.get(name):
            bars.append(Bar(f"time {name}, V={vocab_size}", time_ratio, limit[0]))
            if limit[1] < float("inf"):
                bars.append(Bar(f"memory {name}, V={vocab_size}", memory_ratio, limit[1]))
    print(f"\nV = {vocab_size}, N = {TARGETS}, H = {HIDDEN}, {dtype} on {device}, {torch.get_num_threads()} threads\n")
    print_table(["loss", "ms", "time ratio", "extra MiB", "memory ratio"], rows)
    return bars


def peak_after(problem: Problem, task: Callable[[], object]) -> int:
    """Return the peak of a pass that begins without gradients."""
    problem.forget_gradients()
    return peak_bytes(task)


def main() -> int:
    """Measure, print and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 152_000])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    bars = [bar for vocab_size in arguments.vocabulary for bar in measure(vocab_size, arguments.rounds, device, dtype)]
    return report(bars)


if __name__ == "__main__":
    raise SystemExit(main())
