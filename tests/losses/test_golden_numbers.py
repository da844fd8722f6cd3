"""Values and gradients against numbers computed with the paper authors' published functions."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from losses.config import AtkdLoss, CoupledLoss, DiversityOnlyLoss, LossConfig, TargetOnlyLoss
from losses.distillation import distillation_loss
from losses.divergence_config import ReverseKL
from losses.token_weights import split_easy, token_weights
from losses.topk_teacher import TopkTeacher

FOLDER = Path(__file__).parent.parent / "data" / "golden"
INFO: dict[str, dict[str, Any]] = json.loads((FOLDER / "golden_info.json").read_text())

AUTHORS_ATKD = AtkdLoss(kind="atkd", scope="microbatch")
MIXTURES: dict[str, list[tuple[float, LossConfig]]] = {
    "forward": [(1.0, CoupledLoss(kind="coupled"))],
    "reverse": [(1.0, CoupledLoss(kind="coupled", divergence=ReverseKL()))],
    "jsd": [
        (0.9, CoupledLoss(kind="coupled")),
        (0.1, CoupledLoss(kind="coupled", divergence=ReverseKL())),
    ],
    "dkd": [(0.2, TargetOnlyLoss(kind="target_only")), (1.0, DiversityOnlyLoss(kind="diversity_only"))],
    "atkd": [(1.0, AUTHORS_ATKD)],
    "atkd_reverse": [(1.0, AtkdLoss(kind="atkd", scope="microbatch", divergence=ReverseKL()))],
}
PORTABLE = [(case, kind) for case in sorted(INFO) for kind in MIXTURES if INFO[case][kind]["portable"]]
OTHERS = [(case, kind) for case in sorted(INFO) for kind in MIXTURES if not INFO[case][kind]["portable"]]


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "golden.npz") as archive:
        return dict(archive)


def our_loss(case: str, kind: str) -> tuple[float, torch.Tensor, np.ndarray]:
    """The loss in float32, its gradient [N, V], and which positions [B, T] the N targets are predicted at."""
    arrays = golden()
    predicted = np.zeros_like(arrays[f"{case}/masked"])
    predicted[:, :-1] = ~arrays[f"{case}/masked"][:, 1:]
    following = np.roll(arrays[f"{case}/ids"], -1, axis=1)
    targets = torch.from_numpy(following[predicted]).long()
    student = torch.from_numpy(arrays[f"{case}/student"][predicted]).requires_grad_()
    teacher_logits = torch.from_numpy(arrays[f"{case}/teacher"][predicted])
    if case == "hard_logits_1e3":  # half of its uncertainties are below 1e-38: all tied in float32, so no ranking to compare
        teacher_logits = teacher_logits.double()
    teacher = TopkTeacher.from_logits(teacher_logits, targets)
    total = torch.zeros(())
    for share, loss in MIXTURES[kind]:
        easy = split_easy(teacher.uncertainty, loss, seed=0) if isinstance(loss, AtkdLoss) else None
        weights = token_weights(teacher.uncertainty, loss, easy)
        total = total + share * distillation_loss(student, targets, teacher, weights, loss).loss
    total.backward()
    assert student.grad is not None
    return total.item(), student.grad, predicted


@pytest.mark.parametrize(("case", "kind"), PORTABLE)
def test_the_authors_value_and_gradient_where_they_are_right(case: str, kind: str) -> None:
    value, gradient, predicted = our_loss(case, kind)
    assert value == pytest.approx(float(golden()[f"{case}/{kind}/loss64"]), rel=1e-4)
    if f"{case}/{kind}/grad" in golden():
        theirs = golden()[f"{case}/{kind}/grad"][predicted]
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(gradient.numpy(), theirs, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize(("case", "kind"), OTHERS)
def test_finite_and_right_where_their_code_is_not(case: str, kind: str) -> None:
    value, gradient, _ = our_loss(case, kind)
    assert math.isfinite(value)
    assert gradient.isfinite().all()
    reference = INFO[case][kind]["ref64"]
    if reference is not None and math.isfinite(reference):
        assert value == pytest.approx(reference, rel=1e-4)


def test_terms_of_each_token() -> None:
    case = "rand03_4x12x48_right"
    arrays = golden()
    predicted = ~arrays[f"{case}/masked"][:, 1:]
    targets = torch.from_numpy(arrays[f"{case}/ids"][:, 1:][predicted]).long()
    student = torch.from_numpy(arrays[f"{case}/student"][:, :-1][predicted])
    teacher = TopkTeacher.from_logits(torch.from_numpy(arrays[f"{case}/teacher"][:, :-1][predicted]), targets)
    loss = CoupledLoss(kind="coupled")
    sums = distillation_loss(student, targets, teacher, token_weights(teacher.uncertainty, loss), loss)
    np.testing.assert_allclose(teacher.uncertainty.numpy(), arrays[f"{case}/unc64"], rtol=1e-5)
    assert sums.target_term.item() == pytest.approx(arrays[f"{case}/tkd64"].sum(), rel=1e-5)
    assert sums.diversity_term.item() == pytest.approx(arrays[f"{case}/dkd64"].sum(), rel=1e-5)


def test_there_are_cases_of_both_sorts() -> None:
    assert len(PORTABLE) > 120 and len(OTHERS) > 20
