"""What the doctor concludes from numbers alone: one fault, one failed line."""

import math
from dataclasses import replace
from typing import Any

import pytest

from actors.config.models import DType
from actors.student.self_distillation import AttentionFound, SelfDistillationCheck
from orchestrator.doctor.checks import check_attention, check_scores, check_tokens
from orchestrator.run.score_parity import TOLERANCES, Finding
from tests.worlds import VOCAB, word_tokenizer

SOUND = SelfDistillationCheck(
    rows=4, targets=100, set_aside=0, largest_target_error=1e-5, furthest_row=7, mean_target_error=1e-6, high_target_error=5e-6,
    error_one_earlier=2.0, error_one_later=2.0,
    topk_agreement=1.0, mass_error=1e-5, slope=1.0, correlation=1.0, self_divergence=1e-6, self_refusal="", batch_error=1e-6,
    likeliest_spread=2.0, lowest_row_entropy=0.5, highest_row_entropy=1.5, teacher_loss=1.0, largest_topk_id=VOCAB - 1,
    attention=AttentionFound("sdpa", 1e-6), eager_target_error=None,
)  # fmt: skip


def judged(found: SelfDistillationCheck, dtype: DType = "float32", student_vocab: int = VOCAB) -> list[Finding]:
    return check_scores(found, TOLERANCES[dtype], VOCAB, student_vocab)


def the_failed(findings: list[Finding]) -> Finding:
    """Return the one finding that failed."""
    (failed,) = [finding for finding in findings if finding.state == "FAILED"]
    return failed


@pytest.mark.parametrize(
    ("numbers", "check", "said"),
    [
        ({"mass_error": 0.01}, "raw", "mass off by at most 1.0e-02"),
        ({"mass_error": math.nan}, "raw", "must hold a mass of 1"),
        ({"slope": 0.5}, "raw", "divides logits by about 2.00"),
        ({"largest_target_error": 2e-3}, "served", "all by at most 2.0e-03 (may 0.001), furthest in row 7"),
        ({"high_target_error": 8e-4, "set_aside": 1}, "served", "99 % of them by at most 8.0e-04 (may 0.0005)"),
        ({"largest_target_error": math.nan, "mean_target_error": math.nan}, "served", "by nan nats in the mean"),
        ({"largest_target_error": 2.0, "mean_target_error": 1.0, "error_one_earlier": 1e-6}, "served", "one position before"),
        ({"topk_agreement": 0.5}, "served", "top-K agree to 50.0 %; targets are right, but not the tokens named beside them"),
        ({"self_divergence": -0.01}, "loss", "learns 1.0e-02 nats a target from itself (may 0.001)"),
        ({"batch_error": math.nan}, "batch", "scores depend on the rows beside them"),
        ({"likeliest_spread": 0.0}, "scores", "likeliest tokens 0.0e+00 nats apart; the teacher says the same everywhere"),
        ({"teacher_loss": 5.0}, "teacher", "loss 5.000 nats a target on the data, guessing has 4.564; a teacher worse than"),
    ],
)
def test_a_number_beyond_its_bound_fails_one_check(numbers: dict[str, Any], check: str, said: str) -> None:
    assert {finding.state for finding in judged(SOUND)} == {"ok"}
    failed = the_failed(judged(replace(SOUND, **numbers)))
    assert failed.check == check and said in failed.line() and failed.line().startswith(f"FAILED {check}: ")


@pytest.mark.parametrize(
    ("served", "eager", "said"),
    [
        (0.3, 1e-6, "and the engine is right (mean error 3.0e-01 nats, of eager 1.0e-06)"),
        (1e-6, 0.3, "and the engine serves the same (mean error 1.0e-06 nats, of eager 3.0e-01)"),
        (0.3, 0.4, "and the engine serves neither (mean error 3.0e-01 nats, of eager 4.0e-01)"),
    ],
)
def test_the_side_whose_attention_is_off_is_named(served: float, eager: float, said: str) -> None:
    numbers: dict[str, Any] = {
        "mean_target_error": served,
        "largest_target_error": 2 * served,
        "self_divergence": served,
        "slope": 0.9,
    }
    found = replace(SOUND, attention=AttentionFound("sdpa", 0.3), eager_target_error=eager, **numbers)
    failed = the_failed(judged(found))
    assert failed.line().startswith("FAILED attention: the teacher's is sdpa, 3.0e-01 nats from eager (may 0.001); ")
    assert said in failed.advice and failed.advice.endswith("set teacher.model.attention=eager")


def test_the_attention_of_a_student_is_judged_by_itself() -> None:
    failed = check_attention("student", AttentionFound("sdpa", math.nan))
    assert failed.line() == (
        "FAILED attention: the student's is sdpa, nan nats from eager (may 0.001); transformers' sdpa leaves out something of "
        "this model: set student.model.attention=eager"
    )
    assert check_attention("student", AttentionFound("eager", 0.0)).line() == (
        "ok attention: the student's is eager, the model's own definition"
    )


def test_a_top_k_token_the_student_lacks_is_reported() -> None:
    failed = the_failed(judged(SOUND, student_vocab=90))
    assert failed.check == "scores"
    assert "token 95, the student knows 90" in failed.advice and "vocab_size is at least 96" in failed.advice


def test_a_bound_belongs_to_the_type_of_the_engine() -> None:
    rough = replace(SOUND, largest_target_error=0.2, mean_target_error=0.04, topk_agreement=0.98, batch_error=0.1)
    assert {finding.state for finding in judged(rough, "bfloat16")} == {"ok"}
    assert {finding.check for finding in judged(rough, "float32") if finding.state == "FAILED"} == {"batch", "served"}


def tokens_judged(data: int = VOCAB, teacher: int = VOCAB, student: int = VOCAB, **numbers: int) -> Finding:
    settings = {"largest_id": VOCAB - 1, "teacher_vocab": VOCAB, "student_vocab": VOCAB, **numbers}
    return check_tokens(word_tokenizer(data), word_tokenizer(teacher), word_tokenizer(student), **settings)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"student": VOCAB - 1}, "FAILED tokens: teacher and student do not speak the same tokens: 1 tokens of 96"),
        ({"data": VOCAB + 1}, "FAILED tokens: 1 tokens of 97 have other ids in the run's own tokenizer than for the teacher"),
        ({"teacher_vocab": 90}, "the teacher has no token 95, its config.json does not fit its tokenizer"),
        ({"student_vocab": 90}, "name a student.model whose vocab_size is at least 96"),
        ({}, "ok tokens: 96 tokens, the same for rows, teacher and student; largest id of the rows 95"),
    ],
)
def test_tokenizers_and_vocabularies_must_agree(numbers: dict[str, int], said: str) -> None:
    line = tokens_judged(**numbers).line()
    assert said in line and "\n" not in line
