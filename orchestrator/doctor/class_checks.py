"""What the doctor concludes of labels, words, tables and their scores: numbers in, findings out. C classes.

What may be meant so, such as a rare label, is called unclear: it ends no command, and says what to look at.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from actors.config.models import DType
from actors.format import plural
from actors.teacher.class_parity import ClassParity
from orchestrator.doctor.checks import check_batch, explained
from orchestrator.run.score_parity import MASS_TOLERANCE, TOLERANCES, Finding, Tolerance, check_raw, check_served

RARE_ROWS = 10
"""Training rows below which a label is called rare; or it has less than ``RARE_SHARE`` of an even share."""
RARE_SHARE = 0.1
SHOWN_LABELS = 10
FLAT = 0.05
"""Share of log C: of distributions nearer to the uniform one than this, little can be learned."""
HARD = 1e-3
"""Nats: distributions of less entropy say no more than the labels."""
LEAST_SPREAD: dict[DType, float] = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.02}
"""Nats, by the type of the engine's weights: on what lies nearer together no slope is measured. Two passes in float32 are at
most about 1e-5 apart, a hundredth of it; those in 16 bits more, a table's up to 0.01."""
SHARPEN = {
    "autoencoder": "a lower teacher.model.temperature, or a higher teacher.model.diagonal_boost",
    "uniform": "a lower teacher.model.smoothing", "file": "a sharper teacher.model.table",
}  # fmt: skip
"""What makes a table less flat, by ``teacher.model.similarity``."""


def check_labels(train: Mapping[str, int], heldout: Mapping[str, int]) -> Finding:
    """Check whether each label has rows enough to be learned and measured.

    Args:
        train: training rows of each label.
        heldout: the same of the held-out rows.
    """
    numbers = f"training rows by label: {_shown(train)}; held out: {_shown(heldout)}"
    bound = max(RARE_ROWS, math.ceil(RARE_SHARE * sum(train.values()) / len(train)))
    rare = [f"{label} ({plural(count, 'training row')})" for label, count in train.items() if count < bound]
    missing = [label for label, count in heldout.items() if count == 0]
    said = []
    if missing:
        said.append(f"no held-out row is labelled {', '.join(missing[:SHOWN_LABELS])}, of which nothing is measured: "
                    "data.heldout_rows, or another data.seed, would change that")  # fmt: skip
    if rare:
        said.append(f"rare: {', '.join(rare[:SHOWN_LABELS])}; little is learned of fewer than {bound} rows: more rows would do")
    return Finding("labels", "unclear", numbers, "; ".join(said)) if said else Finding("labels", "ok", numbers)


def _shown(counts: Mapping[str, int]) -> str:
    if len(counts) <= SHOWN_LABELS:
        return ", ".join(f"{label} {count}" for label, count in counts.items())
    fewest, most = min(counts, key=lambda label: counts[label]), max(counts, key=lambda label: counts[label])
    return f"{len(counts)} labels, fewest {fewest} {counts[fewest]}, most {most} {counts[most]}"


def check_words(texts: Sequence[str], words: Sequence[Sequence[int]], longest: int, window: int | None) -> Finding:
    """Check whether the words of labels can be compared; that none begins another was seen to when rows were prepared.

    Args:
        texts: of the words.
        words: their tokens behind a prompt.
        longest: tokens of the longest prompt.
        window: tokens that the teacher reads; None where nothing limits them.
    """
    shared = [
        f"{one!r} and {other!r}" for (one, first), (other, second) in combinations(zip(texts, words, strict=True), 2)
        if first[0] == second[0]
    ]  # fmt: skip
    tokens = [f"{text!r} has {plural(len(word), 'token')}" for text, word in zip(texts, words, strict=True)]
    alike = f", {shared[0]} begin alike" if shared else ""
    read = f"longest prompt {plural(longest, 'token')}{f' of {window}' if window else ''}"
    numbers = f"{', '.join(tokens)}; none begins another{alike}; {read}"
    if len(set(map(len, words))) == 1:
        return Finding("words", "ok", numbers)
    return Finding(
        "words", "unclear", numbers,
        "a word of more tokens is less likely for that alone: teacher.label_words.words of equal length would be fairer, and "
        "teacher.calibrate helps a little",
    )  # fmt: skip


def check_table(logprobs: np.ndarray, labels: Sequence[str], similarity: str) -> Finding:
    """Check whether a table of soft labels holds distributions, and whether these say something.

    Args:
        logprobs: float [C, C], a distribution for each label.
        labels: their names.
        similarity: how the table was made (``teacher.model.similarity``).
    """
    table = np.exp(logprobs.astype(np.float64))
    error = float(np.abs(table.sum(axis=1) - 1).max())
    numbers = f"{len(table)} distributions over {len(table)} labels, mass off by at most {error:.1e}"
    if not error <= MASS_TOLERANCE:
        return Finding("table", "FAILED", numbers, "these are no probabilities: delete the run's folder, and have it made again")
    entropies, most, own = -(table * logprobs).sum(axis=1), math.log(len(table)), table.diagonal()
    numbers += (
        f"; a label gives itself {own.min():.3f} to {own.max():.3f}; entropy {entropies.min():.3f} to {entropies.max():.3f} "
        f"nats, of {most:.3f}"
    )
    said = []
    if most - entropies.mean() < FLAT * most:
        said.append(f"nearly uniform, so that little is taught: {SHARPEN[similarity]} would make it sharper")
    if entropies.max() < HARD:
        said.append("as sure as the labels themselves, so that nothing is taught beside them: a softer table would do")
    if others := [label for label, row, mine in zip(labels, table, own, strict=True) if row.max() > mine]:
        said.append(f"of {others[0]} another label is the likelier one, and it would be learned so")
    return Finding("table", "unclear", numbers, "; ".join(said)) if said else Finding("table", "ok", numbers)


def check_class_scores(
    found: ClassParity, dtype: DType, classes: int, *, of_words: bool, of_table: bool
) -> list[Finding]:
    """Check what was measured of served scores; a failure that another one explains is called unclear.

    Args:
        found: the numbers.
        dtype: of the engine's weights.
        classes: C.
        of_words: whether a language model answers with label words, whose engine can be another.
        of_table: whether the teacher is a table, which is given the label.
    """
    tolerance = TOLERANCES[dtype]
    findings = [check_batch(found, tolerance), _check_raw(found, LEAST_SPREAD[dtype]), _check_served(found, tolerance)]
    if not of_words:
        findings = [_without_engines(finding) for finding in findings]
    if not of_table:
        findings.append(check_class_teacher(found, classes))
    return explained(findings)


def _check_raw(found: ClassParity, least_spread: float) -> Finding:
    """Check mass and slope; of distributions that are nearly uniform the slope is rounding, and only the mass says something."""
    if found.spread >= least_spread or not found.mass_error <= MASS_TOLERANCE:
        return check_raw(found)
    return Finding(
        "raw", "ok", f"mass off by at most {found.mass_error:.1e}; labels are {found.spread:.1e} nats apart, too near for a slope"
    )


def _check_served(found: ClassParity, tolerance: Tolerance) -> Finding:
    """Check the log-probabilities of the rows' labels, and of all the others, which a row is taught as well."""
    of_labels = check_served(found, tolerance)
    numbers = f"{of_labels.numbers}; other labels differ by at most {found.others_error:.1e} nats (may {tolerance.largest:g})"
    if of_labels.state == "FAILED" or found.others_error <= tolerance.largest:
        return replace(of_labels, numbers=numbers)
    advice = "a row's own label is right, but not the others: set teacher.engine.kind=transformers"
    return Finding("served", "FAILED", numbers, advice)


def _without_engines(finding: Finding) -> Finding:
    """Return a finding with advice for classifiers, which have one engine."""
    if finding.state != "FAILED" or finding.check == "batch":
        return finding
    return replace(
        finding,
        advice="what is served is not what the teacher's own forward pass says: look at the files of teacher.model, try "
        "teacher.engine.dtype=float32, and have the versions installed that were tested (make setup)",
    )


def check_class_teacher(found: ClassParity, classes: int) -> Finding:
    """Check whether the teacher knows more of the labels than how many there are; few rows cannot prove that it does not."""
    guessing = math.log(classes)
    numbers = (
        f"loss {found.teacher_loss:.3f} nats a row on {plural(found.rows, 'row')}, guessing has {guessing:.3f}; entropy of a row "
        f"{found.lowest_entropy:.3f} to {found.highest_entropy:.3f}"
    )
    if found.teacher_loss < guessing:
        return Finding("teacher", "ok", numbers)
    return Finding(
        "teacher", "unclear", numbers,
        "no better than guessing on these few rows; if its row of the table says so of all, it has little to teach: "
        "teacher.finetune, teacher.calibrate, or another teacher.model would help",
    )  # fmt: skip
