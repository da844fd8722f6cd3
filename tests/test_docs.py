"""What the documents say can be done: every command parses, every make target and every linked file is there."""

import re
import shlex
from pathlib import Path

import pytest

from orchestrator.cli import build_parser
from orchestrator.config.load import load_config
from scripts.doc_tables import TABLES, with_tables

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").rglob("*.md"))
OURS = re.compile(r"(?:\S*python3? -m orchestrator|(?<![\w./-])atkd) (.+)")


def command_lines(text: str) -> list[str]:
    """Return the lines of all fenced code blocks, continuation lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]


def commands_of(text: str) -> list[list[str]]:
    """Return the arguments of each call of our command line in a page's code blocks."""
    found = [OURS.search(line) for line in command_lines(text) if not line.startswith("#")]
    return [shlex.split(match[1], comments=True) for match in found if match]


def make_targets_of(text: str) -> set[str]:
    """Return each target that a page tells the reader to make: in a code block, or in backticks."""
    lines = [line for line in command_lines(text) if line.startswith("make ")] + re.findall(r"`(make [^`]+)`", text)
    words = [word for line in lines for word in shlex.split(line, comments=True)[1:]]
    return {word for word in words if "=" not in word and not word.startswith("-")}


def links_of(text: str) -> set[str]:
    """Return the relative links of a page, without their fragments."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    return {target.split("#")[0] for target in targets if "://" not in target and not target.startswith(("#", "mailto:"))}


def names_of_tests(text: str) -> set[str]:
    """Return each test function that a page names in backticks."""
    return set(re.findall(r"`(test_\w+)`", text))


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


COMMANDS = [(page_id(page), command) for page in PAGES for command in commands_of(page.read_text())]


def test_the_readers_of_pages_see_what_is_there() -> None:
    page = (
        "```bash\nmake setup test X=1  # both\npython -m orchestrator run a.yaml \\\n    b=1  # why\n# atkd run c\n```\n"
        "`make lint` [a](b.md#c) [d](https://e) `test_x_y`\n"
    )
    assert commands_of(page) == [["run", "a.yaml", "b=1"]]
    assert make_targets_of(page) == {"setup", "test", "lint"}
    assert links_of(page) == {"b.md"}
    assert names_of_tests(page) == {"test_x_y"}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert make_targets_of(page.read_text()) <= targets


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert [link for link in links_of(page.read_text()) if not (page.parent / link).exists()] == []


def test_every_test_that_a_page_names_is_there() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set().union(*(names_of_tests(page.read_text()) for page in PAGES))
    assert named
    assert named - set(re.findall(r"^(?:async )?def (test_\w+)\(", sources, re.MULTILINE)) == set()


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {' '.join(command)}" for page, command in COMMANDS])
def test_every_command_parses_and_its_configuration_loads(page: str, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = build_parser().parse_args(command)
    assert options.config.startswith("configs/"), "the documents speak of shipped configurations"
    load_config(options.config, options.overrides)


def test_the_readme_shows_how_to_run() -> None:
    assert [command for page, command in COMMANDS if page == "README.md" and command[0] == "run"]


def test_the_makefile_runs_a_configuration_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    calls = [OURS.search(line) for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("\t")]
    arguments = [shlex.split(call[1]) for call in calls if call]
    assert arguments
    for one in arguments:
        options = build_parser().parse_args(one)
        load_config(options.config, options.overrides)


def test_the_tables_that_follow_from_the_configuration_are_up_to_date() -> None:
    for page in {page for page, _ in TABLES.values()}:
        text = (ROOT / page).read_text()
        assert with_tables(page, text) == text, "python -m scripts.doc_tables writes them"
        assert with_tables(page, text.replace("<!-- end -->", "| stale | |\n<!-- end -->")) == text
