"""What is counted of predictions, against definitions written out in plain Python."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.evaluation.class_metrics import confusion_of, measures_of, quadratic_weighted_kappa, view_of

CLASSES = 4
PREDICTIONS = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=40)
Pairs = list[tuple[int, int]]


def confusion(pairs: Pairs) -> np.ndarray:
    labels, predicted = np.array(pairs).T
    return confusion_of(labels, predicted, CLASSES)


def accuracy(pairs: Pairs) -> float:
    return sum(label == predicted for label, predicted in pairs) / len(pairs)


def macro_f1(pairs: Pairs) -> float:
    """The mean of 2 P R / (P + R), which is 0 where a label is never met."""
    scores = []
    for one in {label for pair in pairs for label in pair}:
        of_label = [pair for pair in pairs if pair[0] == one]
        taken = [pair for pair in pairs if pair[1] == one]
        right = len([pair for pair in of_label if pair in taken])
        if right == 0:
            scores.append(0.0)
            continue
        precision, recall = right / len(taken), right / len(of_label)
        scores.append(2 * precision * recall / (precision + recall))
    return sum(scores) / len(scores)


def kappa(pairs: Pairs) -> float | None:
    """1 less the mean squared distance of the pairs over that of every label with every prediction."""
    observed = sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    by_chance = sum((a - b) ** 2 for a, _ in pairs for _, b in pairs) / len(pairs) ** 2
    return None if by_chance == 0 else 1 - observed / by_chance


@given(PREDICTIONS)
def test_measures_are_their_definitions(pairs: Pairs) -> None:
    found = measures_of(confusion(pairs), ordered=True)
    assert found.rows == len(pairs)
    assert found.accuracy == pytest.approx(accuracy(pairs)) and found.macro_f1 == pytest.approx(macro_f1(pairs))
    assert found.weighted_kappa == (None if kappa(pairs) is None else pytest.approx(kappa(pairs)))
    assert measures_of(confusion(pairs), ordered=False).weighted_kappa is None


@given(PREDICTIONS)
def test_grades_counted_backwards_agree_as_much(pairs: Pairs) -> None:
    turned = [(CLASSES - 1 - a, CLASSES - 1 - b) for a, b in pairs]
    assert quadratic_weighted_kappa(confusion(turned)) == (None if kappa(pairs) is None else pytest.approx(kappa(pairs)))


def test_kappa_from_perfect_agreement_to_the_opposite() -> None:
    assert quadratic_weighted_kappa(confusion([(0, 0), (1, 1), (3, 3)])) == 1
    assert quadratic_weighted_kappa(confusion([(0, 3), (3, 0)])) == pytest.approx(-1)
    assert quadratic_weighted_kappa(confusion([(0, 0), (0, 3), (3, 0), (3, 3)])) == pytest.approx(0)
    assert quadratic_weighted_kappa(confusion([(2, 2), (2, 2)])) is None


def test_the_matrix_has_a_line_for_each_label_and_a_column_for_each_prediction() -> None:
    found = confusion([(0, 1), (0, 1), (2, 0)])
    assert (found[0, 1], found[2, 0], found.sum()) == (2, 1, 3)


def test_groups_are_measured_by_themselves_and_rows_without_one_are_in_none() -> None:
    labels, predicted = np.array([0, 1, 1, 0, 1]), np.array([0, 0, 1, 0, 1])
    view = view_of(labels, predicted, ("no", "yes"), ["b", "b", "a", None, "a"], ordered=True)
    assert view.labels == ("no", "yes") and view.confusion == ((2, 0), (1, 2))
    assert list(view.groups) == ["a", "b"]
    assert (view.groups["a"].rows, view.groups["a"].accuracy, view.groups["a"].weighted_kappa) == (2, 1.0, None)
    assert (view.groups["b"].rows, view.groups["b"].accuracy, view.groups["b"].weighted_kappa) == (2, 0.5, 0.0)
    assert view_of(labels, predicted, ("no", "yes"), [None] * 5, ordered=False).groups == {}
