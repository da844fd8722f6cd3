"""Whether served scores are the teacher's own: numbers in, findings out."""

import logging
from dataclasses import asdict, dataclass
from typing import Literal

from actors.config.models import DType
from actors.examples import ExampleFile, spread_over_lengths, with_shortest_prompts
from actors.format import plural
from actors.teacher.parity import LEAST_LIKELY, Probe, ScoreParity
from actors.teacher.pool import TeacherPool
from actors.teacher.reference_pass import beginning
from actors.teacher.replica_set import TeacherFailed
from orchestrator.config.run import RunConfig
from orchestrator.run.run_dir import RunDir

logger = logging.getLogger("atkd")

MASS_TOLERANCE = 1e-3
SLOPE_TOLERANCE = 0.01
FOLLOWS = 0.99  # correlation from which scores are the reference's own, perhaps scaled


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far scores may lie from the teacher in float32. Nats, but for ``agreement``."""

    largest: float
    """Of one target's log-probability, however unlikely the target: beyond this it is no rounding."""
    high: float
    """The 99 % quantile of the same, over targets that are likely enough."""
    mean: float
    """The same, averaged over them."""
    agreement: float
    """Least share of the top-K that both name."""
    divergence: float
    """Of the mean KL of the teacher from itself, per target."""


TOLERANCES: dict[DType, Tolerance] = {
    "float32": Tolerance(largest=1e-3, high=5e-4, mean=2e-4, agreement=0.99, divergence=1e-3),
    "float16": Tolerance(largest=0.3, high=0.05, mean=0.01, agreement=0.95, divergence=2e-3),
    "bfloat16": Tolerance(largest=1.0, high=0.3, mean=0.06, agreement=0.9, divergence=1e-2),
}
"""By the type of the engine's weights. Of SmolLM2-135M-Instruct in vLLM on a CPU, draws of 256 targets and more had means up to
1.2e-5, 0.005 and 0.043, 99 % quantiles up to 4e-5, 0.03 and 0.22, and at most 7e-5, 0.12 and 0.71 (docs/results.md)."""

State = Literal["ok", "FAILED", "unclear"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check came to."""

    check: str
    """Name of the check."""
    state: State
    """``unclear``: nothing can be concluded as long as another check fails, or what was found may be meant so."""
    numbers: str
    """What was measured."""
    advice: str = ""
    """What it means and what to do; empty where all is well."""

    def line(self) -> str:
        """Return the finding as one line."""
        text = f"{self.numbers}; {self.advice}" if self.advice else self.numbers
        return f"{self.state} {self.check}: {' '.join(text.split())}"


def check_raw(found: ScoreParity) -> Finding:
    """Check whether the scores are the log-softmax of the logits: mass one, and no temperature."""
    numbers = f"mass off by at most {found.mass_error:.1e}, slope {found.slope:.4f} (correlation {found.correlation:.4f})"
    if not found.mass_error <= MASS_TOLERANCE:
        advice = (
            "target, top-K and tail must hold a mass of 1: these are no log-probabilities; set teacher.engine.kind=transformers"
        )
        return Finding("raw", "FAILED", numbers, advice)
    if abs(found.slope - 1) <= SLOPE_TOLERANCE:
        return Finding("raw", "ok", numbers)
    if found.correlation >= FOLLOWS:
        advice = (
            f"the engine divides logits by about {1 / found.slope:.2f}, a temperature or a scale that the model does not have: "
            "set teacher.engine.kind=transformers, or install another version of the engine"
        )
        return Finding("raw", "FAILED", numbers, advice)
    return Finding("raw", "unclear", numbers, "the scores do not follow the teacher's own, so no temperature can be told")


def check_served(found: ScoreParity, tolerance: Tolerance) -> Finding:
    """Check whether the engine serves what the teacher's plain forward pass in float32 gives."""
    numbers = (
        f"targets differ from a plain forward pass by {found.mean_target_error:.1e} nats in the mean (may {tolerance.mean:g}), "
        f"99 % of them by at most {found.high_target_error:.1e} (may {tolerance.high:g}), "
        f"all by at most {found.largest_target_error:.1e} (may {tolerance.largest:g}), furthest in row {found.furthest_row}, "
        f"top-K agree to {100 * found.topk_agreement:.1f} %"
    )
    if found.set_aside:
        numbers += f"; mean and 99 % leave out {plural(found.set_aside, 'target')} below {LEAST_LIKELY:g} nats"
    near = (
        found.mean_target_error <= tolerance.mean
        and found.high_target_error <= tolerance.high
        and found.largest_target_error <= tolerance.largest
    )
    if near and found.topk_agreement >= tolerance.agreement:
        return Finding("served", "ok", numbers)
    return Finding("served", "FAILED", numbers, _why_unlike(found, tolerance, near))


def _why_unlike(found: ScoreParity, tolerance: Tolerance, near: bool) -> str:
    if near:
        return "targets are right, but not the tokens named beside them: set teacher.engine.kind=transformers"
    for where, error in (("before", found.error_one_earlier), ("after", found.error_one_later)):
        if error <= tolerance.mean:
            return (
                f"these are the predictions one position {where} the right one: engine and rows count positions differently; "
                "install another version of the engine, or set teacher.engine.kind=transformers"
            )
    if found.correlation >= FOLLOWS:
        return (
            "the model is the right one, computed less exactly than its type allows: set teacher.engine.dtype=float32, or see "
            "whether its weights are quantised"
        )
    return (
        "the engine serves another model than teacher.model, or reads its architecture differently: set "
        "teacher.engine.kind=transformers, and check revision and files"
    )


def probe_of(config: RunConfig, run_dir: RunDir) -> Probe:
    """Return the beginnings of a few rows, the shortest to the longest; and of as many with the shortest prompts."""
    if config.classes or config.teacher.similar_tokens is not None:  # whose engines are plain arithmetic themselves
        return Probe([], [])
    examples, count = ExampleFile(run_dir.path / "data" / "heldout.arrow"), config.scores.compare_rows
    rows, short = spread_over_lengths(examples, count), with_shortest_prompts(examples, count)
    return Probe([beginning(row) for row in rows], [beginning(row) for row in short])


def require_right(pool: TeacherPool, config: RunConfig, run_dir: RunDir) -> None:
    """Log how a teacher that has started comes to its scores.

    Raises:
        TeacherFailed: if they differ from the teacher's plain forward pass.
    """
    logger.log(logging.WARNING if pool.way.startswith("slow:") else logging.INFO, f"teacher: {pool.way}")
    found = pool.parity
    if not isinstance(found, ScoreParity):
        unasked = "a classifier's engine is that pass itself" if config.classes else "scores.compare_rows is 0"
        unasked = unasked if config.teacher.label_words is None else "label words have no probe"
        unasked = unasked if config.teacher.similar_tokens is None else "neighbours of tokens are taught, and no predictions"
        why = found or unasked
        logger.info(f"score: served scores are not compared with a plain forward pass: {why}")
        run_dir.event("not_compared", reason=why)
        return
    served = check_served(found, TOLERANCES[config.teacher.engine.dtype])
    run_dir.event("compared", **asdict(found), left_out=pool.parity_remark)
    for finding in (check_raw(found), served):
        if finding.state == "FAILED":
            raise TeacherFailed(f"the scores would not be the teacher's own. {finding.line()}")
    logger.info(f"score: {found.targets} {served.numbers}")
    if pool.parity_remark:
        logger.info(f"score: {pool.parity_remark}")
