"""Run every drill that docs/reliability.md names, and print what came of each with its seconds.

    python scripts/drills.py [--write] [PYTEST_ARGUMENT ...]

``--write`` puts the table into the page as well. Other arguments go to pytest: ``-k checkpoint`` runs some. Exit code 1 if a
drill failed or a name in the page stands for no test.
"""

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
NOTHING_BREAKS = re.compile(r"^## What others stumbled over\n.*?(?=^## )", re.MULTILINE | re.DOTALL)  # inputs, no drills
ROW = re.compile(r"^\| (?P<broken>[^|]+) \| [^|]+ \| (?P<tests>`test_[^|]+) \|$", re.MULTILINE)


HEADING = "## All drills, once"
ABOUT = """On two CPU cores that did other work too; `make drills PYTEST_ARGS=--write` makes it anew. Seconds are those of the
whole test, which for most is more starting than breaking. The last column is the time until the work went on, where a drill
takes it down: until a step, shard or trial was done that had not been done before. It begins with the harm, or, where the command
has to be given again, with that, processes and imports included. The drill of the hanging worker has a patience of 5 s in the
place of ten minutes, that of the hanging replica one of 3 s."""


def drills(page: str) -> dict[str, list[str]]:
    """Return what is broken in each drill of the page, with the names of its tests."""
    rows = ROW.finditer(NOTHING_BREAKS.sub("", page))
    return {row["broken"].strip(): re.findall(r"`(test_\w+)`", row["tests"]) for row in rows}


@dataclass
class Outcome:
    """What came of a test, its cases together."""

    word: str = "passed"
    seconds: float = 0.0
    recovery_seconds: float | None = None
    """From the harm until the work went on, where the test takes that down."""


def run(names: set[str], arguments: list[str]) -> dict[str, Outcome]:
    """Run tests by name; return what came of each."""
    files = sorted(
        path for path in (ROOT / "tests").rglob("test_*.py") if any(f"def {name}(" in path.read_text() for name in names)
    )
    with tempfile.TemporaryDirectory() as folder:
        book = Path(folder) / "drills.xml"
        select = ["-k", " or ".join(sorted(names))] if "-k" not in arguments else []
        command = [sys.executable, "-m", "pytest", "-q", "--drills", f"--junit-xml={book}", *map(str, files), *select, *arguments]
        subprocess.run(command, cwd=ROOT, check=False)
        return read_outcomes(book, names) if book.exists() else {}


def read_outcomes(book: Path, names: set[str]) -> dict[str, Outcome]:
    """Return what pytest's own book, ``--junit-xml``, says of tests by name."""
    cases = ElementTree.parse(book).iter("testcase")
    found: dict[str, Outcome] = {}
    for case in cases:
        name = case.attrib["name"].split("[")[0]
        if name not in names:
            continue
        outcome = found.setdefault(name, Outcome())
        outcome.seconds += float(case.attrib["time"])
        tags = {part.tag for part in case}
        if tags & {"failure", "error"}:
            outcome.word = "FAILED"
        elif "skipped" in tags and outcome.word != "FAILED":
            outcome.word = "skipped"
        for noted in case.iter("property"):
            if noted.attrib["name"] == "recovery_seconds":
                outcome.recovery_seconds = max(outcome.recovery_seconds or 0.0, float(noted.attrib["value"]))
    return found


def table_of(page: dict[str, list[str]], found: dict[str, Outcome], some: bool) -> tuple[list[str], bool]:
    """Return the lines of the table, and whether all went well; ``some``: only drills that were run are to be in it."""
    lines, well = ["| drill | outcome | seconds | until it went on |", "|---|---|---:|---:|"], True
    for broken, names in page.items():
        outcomes = [found[name] for name in names if name in found]
        if some and not outcomes:
            continue
        words = {outcome.word for outcome in outcomes} if some or len(outcomes) == len(names) else {"no such test"}
        well &= not words & {"FAILED", "no such test"}
        recoveries = [outcome.recovery_seconds for outcome in outcomes if outcome.recovery_seconds is not None]
        recovery = f"{max(recoveries):.1f}" if recoveries else ""
        lines.append(f"| {broken} | {', '.join(sorted(words))} | {sum(one.seconds for one in outcomes):.1f} | {recovery} |")
    return lines, well


def main(arguments: list[str]) -> int:
    """Run the drills and print the table; ``--write`` puts it into the page as well."""
    write = "--write" in arguments
    arguments = [argument for argument in arguments if argument != "--write"]
    if write and any(argument.startswith("-k") for argument in arguments):
        raise SystemExit("--write puts the table of all drills into the page, and -k runs some; leave one out")
    page = PAGE.read_text(encoding="utf-8")
    table = drills(page)
    found = run({name for names in table.values() for name in names}, arguments)
    lines, well = table_of(table, found, some="-k" in arguments)
    print("\n" + "\n".join(lines))
    if write and found:
        before = page.partition(HEADING)[0].rstrip()
        PAGE.write_text(f"{before}\n\n{HEADING}\n\n{ABOUT}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return int(not well)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
