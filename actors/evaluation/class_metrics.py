"""What is counted of a classifier's predictions on held-out rows. B rows, C classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ClassMeasures:
    """How well labels were predicted, of all rows or of a group of them."""

    rows: int
    """Rows that were measured."""

    accuracy: float
    """Share of rows whose most likely label is right."""

    macro_f1: float
    """Mean over the labels of F1, the harmonic mean of precision and recall; labels that neither stand in a row nor are predicted
    are left out."""

    weighted_kappa: float | None
    """Quadratic weighted kappa of grades, 1 for perfect agreement and 0 for that of chance; None for labels without an order, or
    where all rows have one label and one prediction."""


@dataclass(frozen=True, slots=True)
class ClassView:
    """Predictions of a classifier, counted."""

    labels: tuple[str, ...]
    """The labels, in the order of the columns."""

    confusion: tuple[tuple[int, ...], ...]
    """[C, C] numbers of rows: a line for each label that is right, a column for each that was predicted."""

    groups: dict[str, ClassMeasures]
    """Measures by group; empty where rows have none."""


def confusion_of(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return numbers of rows, int64 [C, C]: a line for each label [B], a column for each prediction [B]."""
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    return confusion


def measures_of(confusion: np.ndarray, ordered: bool) -> ClassMeasures:
    """Return the measures of a confusion matrix [C, C]."""
    rows, right = int(confusion.sum()), np.diag(confusion)
    appearing = confusion.sum(axis=0) + confusion.sum(axis=1)  # 2 TP + FP + FN
    f1 = 2 * right[appearing > 0] / appearing[appearing > 0]
    return ClassMeasures(
        rows, float(right.sum() / rows), float(f1.mean()), quadratic_weighted_kappa(confusion) if ordered else None
    )


def quadratic_weighted_kappa(confusion: np.ndarray) -> float | None:
    """Return 1 - observed / expected disagreement, each weighted by the square of the distance of two grades (Cohen 1968).

    None where no disagreement is expected by chance, since all rows have one grade and one prediction.
    """
    grades = np.arange(len(confusion))
    weights = (grades[:, None] - grades[None]) ** 2
    expected = np.outer(confusion.sum(axis=1), confusion.sum(axis=0)) / confusion.sum()
    by_chance = float((weights * expected).sum())
    return None if by_chance == 0 else 1 - float((weights * confusion).sum()) / by_chance


def view_of(
    labels: np.ndarray, predicted: np.ndarray, names: Sequence[str], groups: Sequence[str | None], ordered: bool
) -> ClassView:
    """Return the counts of predictions.

    Args:
        labels: int64 [B], what is right.
        predicted: int64 [B].
        names: of the labels.
        groups: of the rows; None for a row without.
        ordered: whether labels are grades.
    """
    named = np.array([group or "" for group in groups])
    of_groups: Mapping[str, ClassMeasures] = {
        group: measures_of(confusion_of(labels[named == group], predicted[named == group], len(names)), ordered)
        for group in sorted({group for group in groups if group is not None})
    }
    confusion = confusion_of(labels, predicted, len(names))
    return ClassView(tuple(names), tuple(tuple(int(count) for count in line) for line in confusion), dict(of_groups))
