"""Tables of soft labels that somebody made, as files."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.classification.label_file import read_label_table

LABELS = ("wrong", "partly", "right")
TABLE = {
    "right": {"right": 0.8, "partly": 0.2},
    "wrong": {"wrong": 0.7, "partly": 0.2, "right": 0.1},
    "partly": {"right": 0.25, "wrong": 0.25, "partly": 0.5},
}


def written(content: Any, folder: Path) -> Path:
    path = folder / "labels.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_distributions_stand_in_the_order_of_the_labels(tmp_path: Path) -> None:
    found = np.exp(read_label_table(written(TABLE, tmp_path), LABELS))
    assert found == pytest.approx(np.array([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25], [0, 0.2, 0.8]]), abs=1e-9)
    assert np.isfinite(np.log(found)).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", 'labels.json is no JSON: .*; {"wrong": {"wrong": 0.9, "partly": 0.1}} would do'),
        ([[0.5, 0.5]], "holds a list where an object is expected, such as"),
        ({**TABLE, "odd": {}}, "labels.json names 'odd', which task.labels has not; there are wrong, partly, right"),
        ({"wrong": {"wrong": 1}}, "has no line for the label 'partly'; one for each of wrong, partly, right would do"),
        ({**TABLE, "right": 0.5}, "label 'right' has 0.5, no distribution; {\"wrong\": 1.0} would do"),
        ({**TABLE, "right": {"odd": 1}}, "label 'right' names 'odd', which task.labels has not"),
        ({**TABLE, "right": {"right": -0.1}}, "label 'right' gives 'right' -0.1, no probability; a number from 0 to 1 would do"),
        ({**TABLE, "right": {"right": True}}, "label 'right' gives 'right' True, no probability"),
        ('{"wrong": {"wrong": NaN}, "partly": {"partly": 1}, "right": {"right": 1}}', "label 'wrong' gives 'wrong' nan, no prob"),
        ({**TABLE, "right": {"right": 0.5}}, "label 'right' has probabilities that add up to 0.5; each divided by 0.5 would do"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_named(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        read_label_table(written(content, tmp_path), LABELS)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher\.model\.table: there is no file .*labels\.json; JSON such as .* would do"):
        read_label_table(tmp_path / "labels.json", LABELS)
