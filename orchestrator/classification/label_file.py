"""A table of soft labels that somebody made: read from a file, and checked. C classes."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LEAST = 1e-12
"""Probabilities below it are taken for it: a teacher is certain of nothing."""
SUM_TOLERANCE = 1e-3
KEY = "teacher.model.table"


def read_label_table(path: Path, labels: Sequence[str]) -> np.ndarray:
    """Return log-probabilities [C, C], float64: a distribution over all labels for each label, in the order of ``labels``.

    Args:
        path: JSON, ``{label: {label: probability}}``; a label that a distribution leaves out has a probability of 0.
        labels: all of them, as texts.

    Raises:
        ValueError: naming the label and the value, if the file is no such table.
    """
    example = json.dumps({labels[0]: {labels[0]: 0.9, labels[1]: 0.1}})
    if not path.is_file():
        raise ValueError(f"{KEY}: there is no file {path.absolute()}; JSON such as {example} would do, with all labels")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{KEY}: {path} is no JSON: {error}; {example} would do") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{KEY}: {path} holds a {type(content).__name__} where an object is expected, such as {example}")
    _require_labels(content, labels, f"{KEY}: {path}", every=True)
    table = np.array([_distribution(content[label], labels, f"{KEY}: {path}: label {label!r}") for label in labels])
    return np.log(np.maximum(table, LEAST) / np.maximum(table, LEAST).sum(axis=1, keepdims=True))


def _distribution(values: Any, labels: Sequence[str], where: str) -> list[float]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} has {values!r}, no distribution; {json.dumps({labels[0]: 1.0})} would do")
    _require_labels(values, labels, where, every=False)
    for label, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{where} gives {label!r} {value!r}, no probability; a number from 0 to 1 would do")
    total = math.fsum(values.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise ValueError(f"{where} has probabilities that add up to {total:.4g}; each divided by {total:.4g} would do")
    return [float(values.get(label, 0.0)) for label in labels]


def _require_labels(values: Mapping[str, Any], labels: Sequence[str], where: str, every: bool) -> None:
    if unknown := [name for name in values if name not in labels]:
        raise ValueError(f"{where} names {unknown[0]!r}, which task.labels has not; there are {', '.join(labels)}")
    if every and (missing := [label for label in labels if label not in values]):
        raise ValueError(f"{where} has no line for the label {missing[0]!r}; one for each of {', '.join(labels)} would do")
