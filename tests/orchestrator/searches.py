"""Ledgers of made-up searches and comparisons, written as the real ones are."""

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.search.ledger import Ledger
from orchestrator.search.ledger_records import SearchSpec

RUNGS = (125, 250, 375, 500)
EASY_RATIO = {"low": 0.1, "high": 0.9, "step": 0.2}
EVIL = "<script>document.title='broken'</script> & \"more\""
ARMS = {
    "forward_kl": 0.0, "atkd": -0.06, "reverse_kl": 0.08, "decoupled": -0.01, "cross_entropy": 0.15, "random split": -0.02,
}  # fmt: skip
"""Arms and by how much their held-out loss differs from the baseline's, the first."""


def measures(loss: float, step: int) -> dict[str, float]:
    """What a trial whose loss ends at ``loss`` measures after ``step`` steps."""
    now = loss + 2.0 * math.exp(-step / 150)
    return {"heldout_loss": now, "kl_to_teacher": now - 1.9, "top1_agreement": 0.9 - 0.1 * now, "calibration_error": 0.02 * now}


def run_trial(
    ledger: Ledger, number: int, point: Mapping[str, Any], loss: float, rungs: int = 4, seed: int = 0, arm: str | None = None,
    parameters: int | None = None,
) -> None:  # fmt: skip
    """Write a trial that is measured at ``rungs`` rungs: completed if at all four, stopped else."""
    ledger.begun(number, point, seed, arm)
    for rung, step in enumerate(RUNGS[:rungs]):
        decision = "stop" if rung + 1 == rungs < len(RUNGS) else "continue"
        ledger.rung(number, rung, step, measures(loss, step), decision, 10.0 * (rung + 1))
    step = RUNGS[rungs - 1]
    status = "completed" if rungs == len(RUNGS) else "stopped"
    ledger.ended(number, status, step, measures(loss, step), 10.0 * rungs + 1, step * 1000, parameters=parameters)


def fail_trial(
    ledger: Ledger, number: int, point: Mapping[str, Any], error: str = EVIL, arm: str | None = None, seed: int = 0
) -> None:
    """Write a trial that failed before its first rung."""
    ledger.begun(number, point, seed, arm)
    ledger.ended(number, "failed", 10, {}, 3.0, 10_000, error)


def begin(folder: Path, **changes: Any) -> Ledger:
    """Begin a ledger in the folder; ``changes`` are made to a plan of a search of easy_ratio and easy_weight."""
    spec: dict[str, Any] = {
        "kind": "tune", "name": "tiny_cpu", "metric": "heldout_loss", "mode": "min", "total_steps": 500, "rungs": RUNGS,
        "space": {"loss.easy_ratio": EASY_RATIO, "loss.easy_weight": {"low": 0.0, "high": 0.8, "step": 0.2}}, "trials": 12,
    }  # fmt: skip
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.begin_search(SearchSpec(**{**spec, **changes}))
    return ledger


def surface(ratio: float, weight: float) -> float:
    """The made-up loss of a point, least at 0.5 and 0.2."""
    return 2.2 + (ratio - 0.5) ** 2 + 0.5 * (weight - 0.2) ** 2 + 0.02 * math.sin(37 * ratio + 11 * weight)


def tuned_on_a_grid(folder: Path, stop_some: bool = False) -> Ledger:
    """25 points; two failed; with ``stop_some`` only every third goes to the end."""
    ledger = begin(folder, trials=25)
    points = [(round(0.1 + 0.2 * i, 1), round(0.2 * j, 1)) for i in range(5) for j in range(5)]
    for number, (ratio, weight) in enumerate(points):
        point = {"loss.easy_ratio": ratio, "loss.easy_weight": weight}
        if number in (3, 20):
            fail_trial(ledger, number, point, f"TrainingDiverged: loss is nan at step 10 {EVIL}")
        else:
            run_trial(ledger, number, point, surface(ratio, weight), 4 if not stop_some or number % 3 == 0 else 1 + number % 3)
    return ledger


def tuned_at_random(folder: Path) -> Ledger:
    """Scattered points on five numeric axes, one of them logarithmic, and one that is none."""
    axes = {
        "loss.easy_ratio": {"low": 0.1, "high": 0.9}, "train.optimizer.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        "train.batch_rows": [16, 32, 64], "train.optimizer.weight_decay": {"low": 0.0, "high": 0.1},
        "loss.scope": ["batch", "dataset"], "train.optimizer.warmup_ratio": {"low": 0.0, "high": 0.1},
    }  # fmt: skip
    ledger = begin(folder, trials=20, space=axes)
    dice = random.Random(3)
    for number in range(20):
        ratio, rate = dice.uniform(0.1, 0.9), 10 ** dice.uniform(-5, -2)
        point = {
            "loss.easy_ratio": ratio, "train.optimizer.learning_rate": rate, "train.batch_rows": dice.choice([16, 32, 64]),
            "train.optimizer.weight_decay": dice.uniform(0, 0.1), "loss.scope": dice.choice(["batch", "dataset"]),
            "train.optimizer.warmup_ratio": dice.uniform(0, 0.1),
        }  # fmt: skip
        run_trial(ledger, number, point, 2.2 + (ratio - 0.5) ** 2 + 0.1 * (math.log10(rate) + 3) ** 2, 4 if number % 2 else 2)
    ledger.begun(20, {"loss.easy_ratio": 0.5}, 0)
    return ledger


def compared(folder: Path, seeds: int = 4, **changes: Any) -> Ledger:
    """Six arms with a few seeds each; one seed of an arm failed."""
    ledger = begin(folder, **{"kind": "compare", "space": {}, "trials": len(ARMS) * seeds, "baseline": "forward_kl", **changes})
    dice = random.Random(5)
    number = 0
    for seed in range(seeds):
        of_seed = dice.gauss(0, 0.04)
        for arm, effect in ARMS.items():
            point = {"loss": {"kind": arm}}
            loss = 2.3 + of_seed + effect + dice.gauss(0, 0.01)
            if (arm, seed) == ("decoupled", 1):
                fail_trial(ledger, number, point, "TrainingDiverged: loss is nan", arm, seed)
            else:
                run_trial(ledger, number, point, loss, 4, seed, arm)
            number += 1
    return ledger
