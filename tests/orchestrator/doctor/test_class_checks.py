"""What the doctor concludes of labels, words, tables and scores of labels from numbers alone."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.config.models import DType
from actors.teacher.class_parity import ClassParity
from orchestrator.doctor.class_checks import check_class_scores, check_labels, check_table, check_words
from orchestrator.run.score_parity import Finding

SOUND = ClassParity(
    rows=8, targets=8, set_aside=0, largest_target_error=1e-6, furthest_row=7, mean_target_error=1e-7, high_target_error=5e-7,
    error_one_earlier=math.nan, error_one_later=math.nan, topk_agreement=1.0, mass_error=1e-5, slope=1.0, correlation=1.0,
    others_error=1e-6, batch_error=1e-6, lowest_entropy=0.1, highest_entropy=0.9, spread=1.0, teacher_loss=0.5,
)  # fmt: skip
LABELS = ["wrong", "partly", "right"]


def judged(found: ClassParity, of_words: bool = False, of_table: bool = False, dtype: DType = "float32") -> list[Finding]:
    return check_class_scores(found, dtype, 3, of_words=of_words, of_table=of_table)


@pytest.mark.parametrize(
    ("numbers", "check", "state", "said"),
    [
        ({"largest_target_error": 2e-3}, "served", "FAILED", "is not what the teacher's own forward pass says"),
        ({"others_error": 2e-3}, "served", "FAILED", "other labels differ by at most 2.0e-03 nats (may 0.001)"),
        ({"others_error": math.nan}, "served", "FAILED", "other labels differ by at most nan nats"),
        ({"slope": 0.5}, "raw", "FAILED", "slope 0.5000"),
        ({"mass_error": 0.1, "spread": 0.001}, "raw", "FAILED", "mass off by at most 1.0e-01"),
        ({"batch_error": 0.1}, "batch", "FAILED", "set teacher.engine.rows_per_call=1"),
        ({"teacher_loss": 1.2}, "teacher", "unclear", "loss 1.200 nats a row on 8 rows, guessing has 1.099; entropy of a row"),
    ],
)
def test_a_number_beyond_its_bound_is_one_finding(numbers: dict[str, Any], check: str, state: str, said: str) -> None:
    assert {finding.state for finding in judged(SOUND)} == {"ok"}
    found = {finding.check: finding for finding in judged(replace(SOUND, **numbers))}
    assert found.pop(check).line().startswith(f"{state} {check}: ") and {one.state for one in found.values()} == {"ok"}
    (line,) = [one.line() for one in judged(replace(SOUND, **numbers)) if one.check == check]
    assert said in line


def test_of_nearly_uniform_labels_the_slope_is_rounding() -> None:
    raw = judged(replace(SOUND, spread=9e-4, slope=0.8, correlation=0.9))[1]
    assert raw.line() == "ok raw: mass off by at most 1.0e-05; labels are 9.0e-04 nats apart, too near for a slope"
    near = replace(SOUND, spread=0.01, slope=0.8)
    assert judged(near)[1].state == "FAILED", "in float32 it says something"
    assert judged(near, dtype="bfloat16")[1].line().endswith("labels are 1.0e-02 nats apart, too near for a slope")


def test_a_table_is_not_asked_what_it_knows_and_words_have_engines() -> None:
    assert [finding.check for finding in judged(SOUND, of_table=True)] == ["batch", "raw", "served"]
    engine = judged(replace(SOUND, largest_target_error=0.5, correlation=0.1), of_words=True)[2]
    assert "set teacher.engine.kind=transformers" in engine.advice
    others = judged(replace(SOUND, others_error=0.5), of_words=True)[2]
    assert "a row's own label is right, but not the others: set teacher.engine.kind=transformers" in others.advice


def test_labels_that_are_rare_or_missing_are_named() -> None:
    assert check_labels({"a": 40, "b": 60}, {"a": 4, "b": 6}).line() == (
        "ok labels: training rows by label: a 40, b 60; held out: a 4, b 6"
    )
    rare = check_labels({"a": 9, "b": 60}, {"a": 4, "b": 6})
    assert rare.state == "unclear" and "rare: a (9 training rows); little is learned of fewer than 10 rows" in rare.advice
    share = check_labels({"a": 49, "b": 951}, {"a": 4, "b": 6})
    assert share.state == "unclear" and "a (49 training rows); little is learned of fewer than 50 rows" in share.advice
    missing = check_labels({"a": 40, "b": 60}, {"a": 10, "b": 0})
    assert missing.state == "unclear" and "no held-out row is labelled b, of which nothing is measured" in missing.advice
    many = check_labels({str(label): 20 + label for label in range(12)}, dict.fromkeys(map(str, range(12)), 5))
    assert many.numbers.startswith("training rows by label: 12 labels, fewest 0 20, most 11 31; held out: ")


def test_words_of_unequal_length_are_named() -> None:
    fair = check_words([" a", " b"], [(1,), (2,)], 30, 64)
    assert fair.line() == (
        "ok words: ' a' has 1 token, ' b' has 1 token; none begins another; longest prompt 30 tokens of 64"
    )
    found = check_words([" a", " b", " bc"], [(1,), (2, 5), (2, 4)], 30, None)
    assert found.state == "unclear" and "' b' and ' bc' begin alike; longest prompt 30 tokens; a word of more" in found.line()


def table(*rows: tuple[float, float, float]) -> np.ndarray:
    return np.log(np.array(rows))


@pytest.mark.parametrize(
    ("rows", "similarity", "state", "said"),
    [
        ([(0.8, 0.1, 0.1), (0.2, 0.6, 0.2), (0.1, 0.2, 0.7)], "file", "ok", "a label gives itself 0.600 to 0.800; entropy 0.63"),
        ([(0.34, 0.33, 0.33)] * 3, "autoencoder", "unclear", "nearly uniform, so that little is taught: a lower teacher.model."),
        ([(0.34, 0.33, 0.33)] * 3, "uniform", "unclear", "a lower teacher.model.smoothing would make it sharper"),
        ([(1.0, 1e-12, 1e-12), (1e-12, 1.0, 1e-12), (1e-12, 1e-12, 1.0)], "file", "unclear", "as sure as the labels themselves"),
        ([(0.8, 0.1, 0.1), (0.6, 0.2, 0.2), (0.1, 0.2, 0.7)], "file", "unclear", "of partly another label is the likelier one"),
        ([(0.8, 0.1, 0.2), (0.2, 0.6, 0.2), (0.1, 0.2, 0.7)], "file", "FAILED", "mass off by at most 1.0e-01; these are no"),
        ([(0.8, 0.1, math.nan), (0.2, 0.6, 0.2), (0.1, 0.2, 0.7)], "file", "FAILED", "these are no probabilities"),
    ],
)  # fmt: skip
def test_a_table_holds_distributions_that_say_something(
    rows: list[tuple[float, float, float]], similarity: str, state: str, said: str
) -> None:
    found = check_table(table(*rows), LABELS, similarity)
    assert found.state == state and said in found.line()
