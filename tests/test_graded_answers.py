"""Grades of answers to word problems: by result, by what was reached on the way, and by nothing that the question states."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.graded_answers import grade, graded_rows, key_of, main
from orchestrator.config.load import load_config

QUESTION = "Tom has 3 boxes of 12 pens and gives 6 pens away. How many are left?"
WORKED = "He has 3*12=<<3*12=36>>36 pens.\nSo 36-6=<<36-6=30>>30 are left.\n#### 30"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (WORKED, "right"),
        ("It is so.\n#### 30", "right"),
        ("#### 7\nno:\n#### 30.0", "right"),  # the last one counts
        ("#### $30", "right"),
        ("He has 3*12=<<3*12=36>>36 pens.\n#### 36", "partly"),
        ("3*12=<<3*12=36.0>>36 and 36+6=<<36+6=42>>42\n#### 42", "partly"),
        ("#### 36", "partly"),
        ("So 36-6=<<36-6=30>>30 are left.\n#### 31", "wrong"),  # the result itself is no step on the way
        ("12-6=<<12-6=6>>6\n#### 6", "wrong"),  # stated in the question
        ("He has 36 pens, 30 are left.", "wrong"),  # nothing calculated and no result
        ("#### -30", "wrong"),
        ("#### 1,030", "wrong"),
        ("", "wrong"),
    ],
)
def test_an_answer_gets_the_grade_that_a_reader_would_give(answer: str, expected: str) -> None:
    assert grade(QUESTION, WORKED, answer) == expected


@pytest.mark.parametrize(("worked", "answer"), [("#### 1,234", "#### 1234"), ("#### 0.5", "#### .50"), ("#### -3", "#### -3.00")])
def test_numbers_are_compared_by_value(worked: str, answer: str) -> None:
    assert grade("?", worked, answer) == "right"


def test_a_number_of_the_question_is_nothing_that_was_reached_even_if_it_is_calculated() -> None:
    worked = "2*6=<<2*6=12>>12, 12+1=<<12+1=13>>13\n#### 13"
    assert grade("What is 2*6+1?", worked, "2*6=<<2*6=12>>12\n#### 14") == "partly"
    assert grade("What is 2*6+1? 12 is no answer.", worked, "2*6=<<2*6=12>>12\n#### 14") == "wrong"


def test_the_key_has_calculations_and_result() -> None:
    assert key_of(WORKED) == "3*12=36 36-6=30 #### 30"


def answers(*texts: str, row: int = 0) -> list[dict[str, Any]]:
    return [{"row": row, "prompt": f"<user>\n{QUESTION}\n", "response": text} for text in texts]


def test_the_same_answer_to_a_question_is_graded_once() -> None:
    questions = [{"question": QUESTION, "answer": WORKED}]
    rows = list(graded_rows(questions, [("one", answers("#### 30", "#### 36")), ("two", answers("#### 36", "#### 9"))]))
    assert [row["grade"] for row in rows] == ["right", "partly", "wrong"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"row": 0, "label": "wrong"}, r"line 1 of a.jsonl holds no answer; what predict of a language model wrote would do"),
        ({"row": 0, "prompt": "What?", "response": ""}, r"line 1 of a.jsonl answers another question than row 0; the file"),
        ({"row": 1, "prompt": QUESTION, "response": ""}, r"line 1 of a.jsonl answers another question than row 1"),
    ],
)
def test_answers_to_other_questions_are_refused(answer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(graded_rows([{"question": QUESTION, "answer": WORKED}], [("a.jsonl", [answer])]))


def test_a_worked_answer_without_a_result_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a worked answer has no result: 'about five'; '... #### 42' would do"):
        grade("?", "about five", "5")


def test_the_command_writes_rows_that_the_configuration_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": QUESTION, "answer": WORKED}) + "\n")
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers("#### 30", "#### 36", "#### 1")))
    names = ["questions.jsonl", "answers.jsonl"]
    asked = [*(str(tmp_path / name) for name in names), "--output", str(tmp_path / "graded.jsonl")]
    monkeypatch.setattr("sys.argv", ["graded_answers", *asked])
    assert main() == 0
    assert capsys.readouterr().out == "3 answers: wrong 1, partly 1, right 1\n"
    rows = [json.loads(line) for line in (tmp_path / "graded.jsonl").read_text().splitlines()]
    config = load_config("configs/grading_gsm8k.yaml")
    assert config.classes is not None and config.task.kind == "classification"
    assert {row["grade"] for row in rows} == set(config.task.labels) and config.task.field == "grade"
    assert set(rows[0]) >= {"key", "answer"}, "what its template reads"

    monkeypatch.setattr("sys.argv", ["graded_answers", str(tmp_path / "none.jsonl"), *asked[1:]])
    assert main() == 2
    assert "none.jsonl" in capsys.readouterr().err
