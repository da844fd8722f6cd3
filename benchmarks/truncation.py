"""How far a truncated teacher is off the whole one: value and gradient of each loss, on a trained teacher and student.

    python -m benchmarks.truncation RUN [--targets 2000]

RUN is the folder of a run whose teacher is fine-tuned (``python -m orchestrator finetune CONFIG``). Its held-out rows are read by
the teacher and by the student that would be taught; each loss is computed with the teacher's full logits and with the
truncated ones. Off by: |value - dense| / dense, and the norm of the gradients' difference over the dense one's; for ATKD also of
the easy and of the hard tokens alone. No bar: what is lost depends on the teacher.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.examples import ExampleFile
from benchmarks.bars import print_table
from losses.config import AtkdLoss, CoupledLoss, DecoupledLoss, DiversityOnlyLoss, TeacherLoss
from losses.distillation import distillation_loss
from losses.divergence_config import JensenShannon, ReverseKL, TotalVariation
from losses.teachers import DenseTeacher, Teacher
from losses.token_weights import TokenWeights, split_easy, token_weights
from losses.topk_teacher import TopkTeacher

TOP_KS = (8, 16, 32, 64, 128)
TOP_MASSES = (0.99, 0.999)
WIDEST = 1024  # top_mass looks no further
TARGETS_AT_ONCE = 256

LOSSES: dict[str, TeacherLoss] = {
    "forward KL": CoupledLoss(kind="coupled"),
    "reverse KL": CoupledLoss(kind="coupled", divergence=ReverseKL()),
    "Jensen-Shannon": CoupledLoss(kind="coupled", divergence=JensenShannon()),
    "total variation": CoupledLoss(kind="coupled", divergence=TotalVariation()),
    "decoupled": DecoupledLoss(kind="decoupled"),
    "diversity only": DiversityOnlyLoss(kind="diversity_only"),
    "ATKD": AtkdLoss(kind="atkd"),
    "ATKD, renormalised": AtkdLoss(kind="atkd", tail="renormalize"),
    "ATKD, reverse": AtkdLoss(kind="atkd", divergence=ReverseKL()),
}


@dataclass(frozen=True)
class Sample:
    """Both models' logits at N held-out targets."""

    teacher: DenseTeacher
    student_logits: Tensor
    """[N, V]"""


@torch.no_grad()
def read_run(run: Path, targets_wanted: int) -> Sample:
    """Return the logits of a run's fine-tuned teacher and of its student before distillation, at its first held-out targets."""
    models = run / "models"
    student_folder = next(folder for name in ("student_finetuned", "student_scratch") if (folder := models / name).exists())
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder) for folder in (models / "teacher_finetuned", student_folder))
    examples = ExampleFile(run / "data" / "heldout.arrow")
    logits: list[tuple[Tensor, Tensor]] = []
    targets: list[Tensor] = []
    for position in range(len(examples)):
        example = examples[position]
        token_ids = torch.from_numpy(example.token_ids.astype("int64"))[None]
        before = torch.from_numpy(example.target_positions - 1)
        logits.append(tuple(model(token_ids).logits[0, before] for model in (teacher, student)))
        targets.append(torch.from_numpy(example.targets.astype("int64")))
        if sum(len(part) for part in targets) >= targets_wanted:
            break
    teacher_logits, student_logits = (torch.cat(parts)[:targets_wanted] for parts in zip(*logits, strict=True))
    return Sample(DenseTeacher(teacher_logits, torch.cat(targets)[:targets_wanted]), student_logits)


def truncations(teacher: DenseTeacher) -> dict[str, TopkTeacher]:
    """Return the teacher cut in each way, by name."""
    vocab_size = teacher.logits.shape[1]
    cut = {
        f"K = {top_k}": TopkTeacher.from_logits(teacher.logits, teacher.targets, top_k) for top_k in TOP_KS if top_k < vocab_size
    }
    widest = TopkTeacher.from_logits(teacher.logits, teacher.targets, min(WIDEST, vocab_size - 1))
    for share in TOP_MASSES:
        kept = widest.keep_mass(share)
        cut[f"top_mass {share} (K {int(kept.named.sum(dim=1).median())} in the median)"] = kept
    return cut


def value_and_gradient(sample: Sample, teacher: Teacher, weights: TokenWeights, loss: TeacherLoss) -> tuple[float, Tensor]:
    """Return the loss of all targets together and its gradient [N, V] to the student's logits."""
    value = 0.0
    gradients: list[Tensor] = []
    for start in range(0, len(weights), TARGETS_AT_ONCE):
        some = slice(start, start + TARGETS_AT_ONCE)
        logits = sample.student_logits[some].clone().requires_grad_()
        sums = distillation_loss(logits, sample.teacher.targets[some], teacher.select(some), weights.select(some), loss)
        gradients += torch.autograd.grad(sums.loss, logits)
        value += sums.loss.item()
    return value, torch.cat(gradients)


def off_by(sample: Sample, cut: Teacher, loss: TeacherLoss, group: str = "all") -> str:
    """Return, as text, how far value and gradient of the cut teacher are off the dense one's, over a group of tokens."""
    uncertainty = sample.teacher.uncertainty
    easy = split_easy(uncertainty, loss, seed=0) if isinstance(loss, AtkdLoss) else None
    weights = token_weights(uncertainty, loss, easy)
    if group != "all":
        assert easy is not None
        chosen = easy if group == "easy" else ~easy
        weights = weights.times(chosen.float(), 1.0)
    dense_value, dense_gradient = value_and_gradient(sample, sample.teacher, weights, loss)
    value, gradient = value_and_gradient(sample, cut, weights, loss)
    return f"{abs(value - dense_value) / dense_value:.1%} / {(gradient - dense_gradient).norm() / dense_gradient.norm():.1%}"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--targets", type=int, default=2000)
    arguments = parser.parse_args()
    sample = read_run(arguments.run, arguments.targets)
    cuts = truncations(sample.teacher)
    held = {name: 1 - (cut.tail_logmass - cut.log_uncertainty).exp() for name, cut in cuts.items()}
    easy = split_easy(sample.teacher.uncertainty, AtkdLoss(kind="atkd"), seed=0)
    rows = [
        ["mass off the target that is held: easy / hard tokens"]
        + [f"{share[easy].mean():.1%} / {share[~easy].mean():.1%}" for share in held.values()]
    ]
    for name, loss in LOSSES.items():
        rows.append([name, *(off_by(sample, cut, loss) for cut in cuts.values())])
    for group in ("easy", "hard"):
        rows.append([f"ATKD, {group} tokens alone", *(off_by(sample, cut, LOSSES["ATKD"], group) for cut in cuts.values())])
    count, vocab_size = sample.student_logits.shape
    print(f"\n{count} held-out targets, V = {vocab_size}; value off by / gradient off by\n")
    print_table(["loss", *cuts], rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
