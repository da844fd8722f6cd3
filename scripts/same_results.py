"""Compare two runs, searches or comparisons that should have come out the same, bit for bit.

    python scripts/same_results.py RUN OTHER_RUN

Compared are all weights, tables of models and trials, and recorded steps, as far as both folders have them; times and paths are
left out. Exit code 1 if anything differs, with its name.
"""

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMES = {"seconds", "tokens_per_second", "waited_seconds", "time", "started", "ended", "pid"}
COMPARED = (
    "**/*.safetensors", "**/*.arrow", "**/*.rows", "**/table.json", "**/metrics/*.jsonl", "**/ledger.jsonl", "**/trials.csv"
)  # fmt: skip


def findings(ours: Path, theirs: Path) -> Iterator[str]:
    """Yield a line for each file that only one folder has, or that differs."""
    names = {path.relative_to(folder) for folder in (ours, theirs) for pattern in COMPARED for path in folder.glob(pattern)}
    for name in sorted(names):
        pair = [folder / name for folder in (ours, theirs)]
        if missing := [str(path) for path in pair if not path.exists()]:
            yield f"{missing[0]} is not there"
        elif content(pair[0]) != content(pair[1]):
            yield f"{name} differs"


def content(path: Path) -> Any:
    """Return what must be the same of a file."""
    if path.suffix == ".json":
        return untimed(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [untimed(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        header, *rows = csv.reader(io.StringIO(path.read_text()))
        kept = [index for index, column in enumerate(header) if column not in TIMES]
        return [[row[index] for index in kept] for row in [header, *rows]]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def untimed(value: Any) -> Any:
    """Return a value of JSON without what a clock has put there."""
    if isinstance(value, dict):
        return {name: untimed(inner) for name, inner in value.items() if name not in TIMES}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def main(arguments: list[str]) -> int:
    """Print what differs; return 1 if anything does, 2 if two folders were not named."""
    folders = [Path(argument) for argument in arguments]
    if len(folders) != 2 or not all(folder.is_dir() for folder in folders):
        print(f"two folders of runs are needed, not {arguments}", file=sys.stderr)
        return 2
    found = list(findings(*folders))
    print("\n".join(found) or "the same, bit for bit")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
