"""The pages on losses: their tables name what there is, their code runs."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import pytest
import torch
import yaml
from pydantic import TypeAdapter

from losses.config import CoupledLoss, LossConfig
from losses.divergences import DIVERGENCES
from losses.loss_state import LossState
from losses.prediction import Prediction
from losses.section import Section
from losses.teachers import DenseTeacher, predictions
from losses.terms import Terms
from losses.weighing_config import TokenSelection

DOCS = Path(__file__).parents[2] / "docs"
LOSSES, ADD = (DOCS / "losses.md").read_text(), (DOCS / "add_a_loss.md").read_text()


def first_column(page: str, heading: str) -> list[str]:
    """The names in backticks that begin the rows of the table under a heading."""
    section = page.split(f"## {heading}")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)`", section, re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def kinds(union: Any) -> list[str]:
    """The tags of an annotated union's variants."""
    variants = get_args(get_args(union)[0])
    return [get_args(variant.model_fields["kind"].annotation)[0] for variant in variants]


def test_the_table_of_divergences_is_the_registry() -> None:
    assert first_column(LOSSES, "Divergences") == list(DIVERGENCES)


def test_the_tables_of_selections_and_kinds_are_the_configurations() -> None:
    assert first_column(LOSSES, "Selections") == kinds(TokenSelection)
    named = set(first_column(LOSSES, "Kinds of loss"))
    variants = get_args(get_args(LossConfig)[0])
    assert named == {get_args(variant.model_fields["kind"].annotation)[0] for variant in variants}


def test_the_defaults_in_the_table_are_those_of_the_configuration() -> None:
    for line in LOSSES.splitlines():
        if not (match := re.match(r"^\| `(\w+)`", line)) or match[1] not in DIVERGENCES:
            continue
        divergence = CoupledLoss.model_validate({"kind": "coupled", "divergence": match[1]}).divergence
        for name, value in re.findall(r"`(\w+)` (\d[\d.]*)", line):
            assert getattr(divergence, name) == float(value), (match[1], name)


def test_the_configuration_on_the_page_is_accepted() -> None:
    (text,) = blocks(LOSSES, "yaml")
    loss = TypeAdapter(LossConfig).validate_python(yaml.safe_load(text)["loss"])
    assert loss.divergence.teacher_weight == 0.3 and loss.tokens.fraction == 0.2


def test_the_example_of_the_library_runs() -> None:
    (code,) = blocks(LOSSES, "python")
    hidden = torch.randn(6, 4, requires_grad=True)
    head = torch.nn.Linear(4, 100, bias=False)
    names = {
        "teacher_logits": torch.randn(6, 100), "targets": torch.arange(6), "hidden": hidden,
        "model": SimpleNamespace(lm_head=head),
    }  # fmt: skip
    exec(code, names)
    assert hidden.grad is not None and head.weight.grad is not None and names["sums"].loss.item() > 0  # type: ignore[attr-defined]


def test_the_loss_that_the_page_adds_is_one() -> None:
    function, variant = blocks(ADD, "python")
    names: dict[str, Any] = {
        "Prediction": Prediction,
        "LossState": LossState,
        "Terms": Terms,
        "Section": Section,
        "Literal": Literal,
    }
    exec(variant, names)
    exec(function, names)
    logits, targets = torch.randn(5, 7), torch.arange(5)
    student = torch.randn(5, 7)
    sides = predictions(DenseTeacher(logits, targets), student, targets, "bucket")
    found = names["squared_hellinger"](*sides, names["SquaredHellinger"](), LossState()).whole
    expected = ((logits.softmax(1).sqrt() - student.softmax(1).sqrt()) ** 2).sum(1) / 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("path", re.findall(r"`((?:tests|losses)/[\w/]+\.py)`", ADD + LOSSES))
def test_files_named_on_the_pages_are_there(path: str) -> None:
    assert (DOCS.parent / path).exists()
