"""The page on searching and comparing: its tables name what there is, with the defaults there are."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from losses.section import Section
from orchestrator.config.compare import ARMS, CompareConfig
from orchestrator.config.schedulers import NATIVE, OWN, REFUSED, AsyncHyperBand, MedianStopping
from orchestrator.config.tune import METRICS, TuneConfig
from orchestrator.search.statistics import critical_t
from tune_spaces.registry import SPACES

STOPPED = "Which trials are stopped"
ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "search.md").read_text()
SOURCES = "".join(path.read_text() for room in ("orchestrator", "tune_spaces") for path in sorted((ROOT / room).rglob("*.py")))


def rows_of(heading: str) -> list[list[str]]:
    """The rows, cell by cell, of the tables under a heading that begin with something in backticks."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line.startswith("| `")]


def first_column(heading: str) -> list[str]:
    return [row[0].split("`")[1] for row in rows_of(heading)]


@pytest.mark.parametrize(("heading", "section"), [("The section `tune`", TuneConfig), ("The section `compare`", CompareConfig)])
def test_keys_and_defaults_are_those_of_the_configuration(heading: str, section: type[Section]) -> None:
    said: dict[str, Any] = {row[0].strip("`"): yaml.safe_load(row[1].strip("`")) for row in rows_of(heading) if len(row) == 3}
    if "arms" in said:
        assert said.pop("arms") == "all below" and section().arms == tuple(ARMS)  # type: ignore[attr-defined]
    assert said == section().model_dump(mode="json", exclude={"arms"})


def test_metrics_arms_and_spaces_are_those_there_are() -> None:
    ways = {"less": "min", "more": "max"}
    assert {row[0].strip("`"): ways[row[1]] for row in rows_of("The section `tune`") if len(row) == 2} == METRICS
    assert [row[0].strip("`") for row in rows_of("The section `compare`") if len(row) == 2] == list(ARMS)
    sizes = {row[0].split("`")[1]: row[-1] for row in rows_of("Spaces") if len(row) == 3 and row[0] != "`tune.space`"}
    assert sizes == {name: str(space.size() or "continuous") for name, space in SPACES.items()}


def test_arguments_of_schedulers_are_those_there_are() -> None:
    rows = [row for row in rows_of(STOPPED) if len(row) == 4]
    said = {row[0].strip("`"): (row[1].strip("`"), yaml.safe_load(row[2].strip("`"))) for row in rows}
    taken: dict[str, tuple[str, Any]] = {}
    for name, section in zip(NATIVE, (AsyncHyperBand, MedianStopping), strict=True):
        for argument, field in section.model_fields.items():
            if argument != "kind":
                taken[argument] = ("both" if argument in taken else name, field.default)
    assert said == taken
    assert first_column(STOPPED)[1 : 1 + len(OWN) + len(NATIVE)] == [*OWN, *NATIVE], "after the heading of the table"
    assert all(f"`{name}`" in PAGE for name in REFUSED)


def test_the_differences_that_few_seeds_tell_apart_are_what_the_test_asks_for() -> None:
    seeds, deviations = re.findall(r"^\| (?:seeds|standard deviations) \| (.*) \|$", PAGE, re.MULTILINE)
    for count, said in zip(map(int, seeds.split(" | ")), map(float, deviations.split(" | ")), strict=True):
        asked = critical_t(count - 1, confidence=1 - 0.05 / (len(ARMS) - 1)) / math.sqrt(count)
        assert said == pytest.approx(asked, abs=0.05)


@pytest.mark.parametrize("message", first_column("Errors, and what to do"))
def test_the_errors_of_the_page_are_raised_somewhere(message: str) -> None:
    assert message in SOURCES
