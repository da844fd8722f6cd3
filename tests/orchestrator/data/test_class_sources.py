"""Rows for classifiers that come with the project, or with scikit-learn."""

import builtins
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from orchestrator.config.data import DigitsSource, GradingSource
from orchestrator.data.grading import GRADES, QUESTIONS, make_graded_answers
from orchestrator.data.sources import read_rows


def test_graded_answers_are_distinct_even_and_the_same_for_a_seed() -> None:
    rows = read_rows(GradingSource(kind="builtin_grading", rows=300), seed=3)
    assert rows == make_graded_answers(300, 3) and rows != make_graded_answers(300, 4)
    assert len({(row["question"], row["answer"]) for row in rows}) == 300
    assert Counter(row["grade"] for row in rows) == dict.fromkeys(GRADES, 100)
    assert {row["question"] for row in rows} == {question.text for question in QUESTIONS}


def test_a_grade_is_the_number_of_points_that_are_made() -> None:
    questions = {question.text: question for question in QUESTIONS}
    spelt = 0
    for row in make_graded_answers(400, 0):
        question, points = questions[row["question"]], GRADES.index(row["grade"])
        made = [any(way in row["answer"] for way in ways) for ways in (question.first, question.second)]
        assert sum(made) <= points, row
        spelt += sum(made) == points
    assert spelt > 300  # the others are misspelt


def test_digits_are_images_with_their_labels() -> None:
    pytest.importorskip("sklearn")
    rows = read_rows(DigitsSource(kind="digits"), seed=0)
    images = np.array([row["image"] for row in rows])
    assert images.shape == (1797, 8, 8) and (images.min(), images.max()) == (0, 16)
    assert {row["label"] for row in rows} == set(range(10)) and type(rows[0]["label"]) is int


def test_without_scikit_learn_digits_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *given: Any, **named: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *given, **named)

    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"data\.source\.kind digits comes with scikit-learn: pip install scikit-learn"):
        read_rows(DigitsSource(kind="digits"), seed=0)
