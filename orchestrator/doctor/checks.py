"""What the doctor concludes: numbers in, findings out. Needs neither Ray nor a model.

The first failure in the chain explains those behind it: what follows from it is called unclear, so that one fault is one
failed line. V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from actors.attention import ATTENTION_TOLERANCE
from actors.student.self_distillation import AttentionFound, SelfDistillationCheck
from actors.teacher.class_parity import ClassParity
from orchestrator.data.tokenizers import require_same_tokens
from orchestrator.run.score_parity import Finding, Tolerance, check_raw, check_served

SAME_SPREAD = 1e-4  # nats; below this the teacher says the same of every target

EXPLAINED_BY = {
    "raw": ("attention", "scores"),
    "served": ("attention", "scores", "raw"),
    "loss": ("attention", "scores", "raw", "served"),
    "teacher": ("scores", "raw", "served"),
}
"""For each check, those whose failure explains its own."""


def check_pair(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> Finding | None:
    """Return a failure if the ids of teacher and student mean different tokens, else nothing."""
    try:
        require_same_tokens(teacher, student)
    except ValueError as error:
        return Finding("tokens", "FAILED", str(error))
    return None


def check_tokens(
    data: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, *,
    largest_id: int, teacher_vocab: int, student_vocab: int,
) -> Finding:  # fmt: skip
    """Check whether rows, teacher and student share their tokens, and whether both models have every id of the rows."""
    if differing := check_pair(teacher, student):
        return differing
    rows_ids, teacher_ids = data.get_vocab(), teacher.get_vocab()
    if others := {token for token, _ in rows_ids.items() ^ teacher_ids.items()}:
        return Finding(
            "tokens",
            "FAILED",
            f"{len(others)} tokens of {len(rows_ids)} have other ids in the run's own tokenizer than for the teacher, such as "
            f"{min(others)!r}",
            "the rows were cut by another tokenizer: delete the run's folder and prepare it again",
        )
    numbers = (
        f"{len(rows_ids)} tokens, the same for rows, teacher and student; largest id of the rows {largest_id}, "
        f"V {teacher_vocab} (teacher) and {student_vocab} (student)"
    )
    for role, vocab in (("teacher", teacher_vocab), ("student", student_vocab)):
        if largest_id >= vocab:
            return Finding(
                "tokens",
                "FAILED",
                numbers,
                f"the {role} has no token {largest_id}, its config.json does not fit its tokenizer: name a {role}.model whose "
                f"vocab_size is at least {largest_id + 1}",
            )
    return Finding("tokens", "ok", numbers)


def check_refused(reason: str) -> Finding:
    """Return the failure of scores that no store takes: not finite, uniform, of the wrong shape."""
    return Finding(
        "scores",
        "FAILED",
        reason,
        "nothing else can be checked; try teacher.engine.dtype=float32 or teacher.engine.kind=transformers, and look at the "
        "files of teacher.model",
    )


def check_scores(found: SelfDistillationCheck, tolerance: Tolerance, teacher_vocab: int, student_vocab: int) -> list[Finding]:
    """Check what was measured, check by check; a failure that another one explains is called unclear."""
    findings = [
        check_attention("teacher", found.attention, _side_that_is_off(found, tolerance)),
        check_values(found, student_vocab),
        check_batch(found, tolerance),
        check_raw(found),
        check_served(found, tolerance),
        check_loss(found, tolerance),
        check_teacher(found, teacher_vocab),
    ]
    return explained(findings)


def explained(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings of which a failure that another one explains is called unclear."""
    failed = {finding.check for finding in findings if finding.state == "FAILED"}
    return [_explained(finding, failed) for finding in findings]


def _explained(finding: Finding, failed: set[str]) -> Finding:
    causes = [cause for cause in EXPLAINED_BY.get(finding.check, ()) if cause in failed]
    if finding.state != "FAILED" or not causes:
        return finding
    return replace(finding, state="unclear", advice=f"follows from {causes[0]}")


def check_attention(role: str, found: AttentionFound, side: str = "") -> Finding:
    """Check whether transformers computes a model's attention as it is defined; ``side`` says more of what is off."""
    numbers = f"the {role}'s is eager, the model's own definition"
    if found.used != "eager":
        numbers = f"the {role}'s is {found.used}, {found.error:.1e} nats from eager (may {ATTENTION_TOLERANCE:g})"
    if found.error <= ATTENTION_TOLERANCE:
        return Finding("attention", "ok", numbers)
    advice = f"transformers' {found.used} leaves out something of this model{side}: set {role}.model.attention=eager"
    return Finding("attention", "FAILED", numbers, advice)


def _side_that_is_off(found: SelfDistillationCheck, tolerance: Tolerance) -> str:
    """Return which of engine and reference is right, where the reference is not what the model is defined as."""
    if found.eager_target_error is None:
        return ""
    numbers = f"mean error {found.mean_target_error:.1e} nats, of eager {found.eager_target_error:.1e}"
    if found.eager_target_error <= tolerance.mean:
        return f", and the engine is right ({numbers})"
    if found.mean_target_error <= tolerance.mean:
        return f", and the engine serves the same ({numbers})"
    return f", and the engine serves neither ({numbers})"


def check_values(found: SelfDistillationCheck, student_vocab: int) -> Finding:
    """Check whether the scores say something, and of tokens that the student knows."""
    numbers = (
        f"{found.targets} targets, all finite; mean entropy of a row {found.lowest_row_entropy:.3f} to "
        f"{found.highest_row_entropy:.3f} nats, likeliest tokens {found.likeliest_spread:.1e} nats apart"
    )
    if not found.likeliest_spread >= SAME_SPREAD:
        advice = (
            "the teacher says the same everywhere and does not look at the row: its weights are not those of a trained model, "
            "so check teacher.model and its files"
        )
    elif found.largest_topk_id >= student_vocab:
        advice = (
            f"the top-K name token {found.largest_topk_id}, the student knows {student_vocab} and could not be trained: "
            f"name a student.model whose vocab_size is at least {found.largest_topk_id + 1}, or lower scores.top_k"
        )
    else:
        return Finding("scores", "ok", numbers)
    return Finding("scores", "FAILED", numbers, advice)


def check_batch(found: SelfDistillationCheck | ClassParity, tolerance: Tolerance) -> Finding:
    """Check whether a row's scores depend on the rows beside it."""
    numbers = f"a row alone and among others differs by at most {found.batch_error:.1e} nats (may {tolerance.largest:g})"
    if found.batch_error <= tolerance.largest:
        return Finding("batch", "ok", numbers)
    advice = "scores depend on the rows beside them: set teacher.engine.rows_per_call=1, or name another teacher.engine.kind"
    return Finding("batch", "FAILED", numbers, advice)


def check_loss(found: SelfDistillationCheck, tolerance: Tolerance) -> Finding:
    """Check whether the teacher, as its own student, has nothing to learn from its stored scores."""
    numbers = f"the teacher learns {abs(found.self_divergence):.1e} nats a target from itself (may {tolerance.divergence:g})"
    if found.self_refusal:
        return Finding("loss", "FAILED", found.self_refusal, "no student can be taught this: name another teacher.engine.kind")
    if abs(found.self_divergence) <= tolerance.divergence:
        return Finding("loss", "ok", numbers)
    advice = (
        "between engine and loss the scores lose their tokens or their places, and a student would be taught something else: "
        "name another teacher.engine.kind"
    )
    return Finding("loss", "FAILED", numbers, advice)


def check_teacher(found: SelfDistillationCheck, teacher_vocab: int) -> Finding:
    """Check whether the teacher knows more of the data than that there are V tokens."""
    guessing = math.log(teacher_vocab)
    numbers = f"loss {found.teacher_loss:.3f} nats a target on the data, guessing has {guessing:.3f}"
    if found.teacher_loss < guessing:
        return Finding("teacher", "ok", numbers)
    advice = (
        "a teacher worse than guessing teaches nothing: train it longer (teacher.finetune), or check teacher.model, and "
        "data.format, whose template it may not know"
    )
    return Finding("teacher", "FAILED", numbers, advice)
