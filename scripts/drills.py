"""Run every drill that docs/reliability.md names, and print what came of each with its seconds.

    python scripts/drills.py [PYTEST_ARGUMENT ...]

Arguments go to pytest: ``-k checkpoint`` runs some. Exit code 1 if a drill failed or a name in the page stands for no test.
"""

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
ROW = re.compile(r"^\| (?P<broken>[^|]+) \| [^|]+ \| (?P<tests>`test_[^|]+) \|$", re.MULTILINE)


def drills(page: str) -> dict[str, list[str]]:
    """Return what is broken in each drill of the page, with the names of its tests."""
    return {row["broken"].strip(): re.findall(r"`(test_\w+)`", row["tests"]) for row in ROW.finditer(page)}


def run(names: set[str], arguments: list[str]) -> dict[str, tuple[str, float]]:
    """Run tests by name; return outcome and seconds of each, those of a test's cases together."""
    files = sorted(
        path for path in (ROOT / "tests").rglob("test_*.py") if any(f"def {name}(" in path.read_text() for name in names)
    )
    with tempfile.TemporaryDirectory() as folder:
        book = Path(folder) / "drills.xml"
        select = ["-k", " or ".join(sorted(names))] if "-k" not in arguments else []
        command = [sys.executable, "-m", "pytest", "-q", "--drills", f"--junit-xml={book}", *map(str, files), *select, *arguments]
        subprocess.run(command, cwd=ROOT, check=False)
        cases = list(ElementTree.parse(book).iter("testcase")) if book.exists() else []
    found: dict[str, tuple[str, float]] = {}
    for case in cases:
        name = case.attrib["name"].split("[")[0]
        if name in names:
            outcome = "FAILED" if {"failure", "error"} & {part.tag for part in case} else "passed"
            outcome = "skipped" if any(part.tag == "skipped" for part in case) else outcome
            before, seconds = found.get(name, (outcome, 0.0))
            found[name] = ("FAILED" if "FAILED" in (before, outcome) else outcome, seconds + float(case.attrib["time"]))
    return found


def main(arguments: list[str]) -> int:
    """Run the drills and print the table."""
    table = drills(PAGE.read_text(encoding="utf-8"))
    found = run({name for names in table.values() for name in names}, arguments)
    print("\n| drill | outcome | seconds |\n|---|---|---|")
    failed = False
    for broken, names in table.items():
        outcomes = [found[name] for name in names if name in found]
        if not outcomes and "-k" in arguments:
            continue
        words = {outcome for outcome, _ in outcomes} if len(outcomes) == len(names) or "-k" in arguments else {"no such test"}
        failed |= bool(words & {"FAILED", "no such test"})
        print(f"| {broken} | {', '.join(sorted(words))} | {sum(seconds for _, seconds in outcomes):.1f} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
