"""Rows a second, and memory, of the preparation of a data set: from a file of lines to token ids and loss masks.

    python -m benchmarks.prepare [--rows 10000 100000 1000000] [--ways processes:1] [--words 60] [--folder .]

Rows are made up, one like the other, with so many words of prompt and response; the tokenizer is trained on the built-in tasks
before. A way is one of these, with how many render and tokenize at one time:

* ``processes:2``, those of ``data.processes``; with one the work is done in the process that reads and writes;
* ``tasks:4``, those of ``data.cluster_tasks``, on a private Ray;
* ``ray_data:2``, actors of Ray Data: all rows are put into Ray's object store first, in the same order.

Each is measured in a process of its own, the driver. Its memory is what belongs to no file, and counts from when its libraries
are loaded and a few rows were prepared; starting Ray is not in the seconds.
"""

import argparse
import hashlib
import json
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ray
from transformers import AutoTokenizer

from actors.format import MIB
from benchmarks.bars import Bar, print_table, report
from benchmarks.prepare_ray_data import prepare_by_ray_data
from benchmarks.store_scale import Cost, Watch
from orchestrator.cluster.places import ray_folder
from orchestrator.config.data import BuiltinSource, DataConfig
from orchestrator.data.dataset import prepare_data
from orchestrator.data.sources import read_rows
from orchestrator.data.tokenizers import train_tokenizer

GROWTH_MIB = 64.0
HELDOUT_ROWS = 500
STORE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Way:
    """Who renders and tokenizes."""

    kind: str
    """``processes``, ``tasks`` or ``ray_data``."""
    count: int
    """How many at one time."""

    @staticmethod
    def parse(text: str) -> "Way":
        """Read what the command line says.

        Raises:
            ValueError: if it says something else.
        """
        kind, _, count = text.partition(":")
        if kind not in ("processes", "tasks", "ray_data") or not count.isdecimal() or not int(count):
            raise ValueError(f"--ways {text}: processes:2, tasks:4 or ray_data:2 would do")
        return Way(kind, int(count))


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a preparation took, and left."""

    cost: Cost
    cpu_seconds: float
    """Of the driver alone."""
    hash: str
    """Of the file of the training rows."""


def write_lines(path: Path, rows: int, words: int) -> None:
    """Write rows of a file of lines, one at a time."""
    draws = random.Random(0)
    with path.open("w") as file:
        for row in range(rows):
            prompt, response = (" ".join(str(draws.randrange(1000)) for _ in range(words // 2)) for _ in range(2))
            file.write(json.dumps({"instruction": f"{row}: {prompt}", "response": response, "input": ""}) + "\n")


def prepared(path: Path, tokenizer: Path, folder: Path, way: Way) -> Prepared:
    """Prepare the rows of a file; return what that took."""
    read = AutoTokenizer.from_pretrained(tokenizer)
    few = DataConfig.model_validate({"source": {"kind": "builtin", "rows": 50}, "heldout_rows": 10})
    prepare_data(few, lambda texts: read, folder / "few")
    said: dict[str, Any] = {"source": {"kind": "files", "path": str(path)}, "max_tokens": 100_000, "heldout_rows": HELDOUT_ROWS}
    said |= {"processes": way.count} if way.kind == "processes" else {"cluster_tasks": way.count}
    data, out = DataConfig.model_validate(said), folder / way.kind
    with nullcontext() if way.kind == "processes" else private_ray():
        watch, cpu = Watch(), time.process_time()
        if way.kind == "ray_data":
            watch.take("prepare", lambda: prepare_by_ray_data(data, read, out))
        else:
            watch.take("prepare", lambda: prepare_data(data, lambda texts: read, out, way.kind == "tasks"))
        cpu = time.process_time() - cpu
    with (out / "train.arrow").open("rb") as file:
        return Prepared(watch.costs[0], cpu, hashlib.file_digest(file, "sha256").hexdigest())


@contextmanager
def private_ray() -> Iterator[None]:
    """Use a Ray of this machine's CPUs."""
    with ray_folder() as folder:
        ray.init(
            address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR",
            object_store_memory=STORE_BYTES, _temp_dir=folder,
        )  # fmt: skip
        try:
            yield
        finally:
            ray.shutdown()


def main(words: list[str] | None = None) -> int:
    """Measure, print and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--words", type=int, default=60, help="of a row")
    parser.add_argument("--ways", type=Way.parse, nargs="+", default=[Way("processes", 1)], help="processes:2 tasks:4 ray_data:2")
    parser.add_argument("--folder", type=Path, default=Path())
    arguments = parser.parse_args(words)
    lines, own, bars = [], dict[Way, list[float]](), []
    for rows in arguments.rows:
        hashes = set()
        for way in arguments.ways:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
                size, found = measured(Path(name), rows, arguments.words, way)
            hashes.add(found.hash)
            own.setdefault(way, []).append(found.cost.own_mib)
            pace = f"{rows / found.cost.seconds:,.0f}"
            lines.append([
                f"{way.kind}:{way.count}", f"{rows:,}", f"{size / MIB:,.0f}", f"{found.cost.seconds:.1f}", pace,
                f"{found.cpu_seconds:.1f}", f"{found.cost.own_mib:,.0f}",
            ])  # fmt: skip
        bars.append(Bar(f"files of {rows:,} rows that differ", len(hashes) - 1, 0))
    print_table(["way", "rows", "MiB of the file", "seconds", "rows/s", "the driver's CPU seconds", "its own MiB"], lines)
    grown = {way: max(most) - most[0] for way, most in own.items()}
    bars += [Bar(f"{way.kind}:{way.count}, MiB more for the most rows", more, GROWTH_MIB) for way, more in grown.items()]
    return report(bars)


def measured(folder: Path, rows: int, words: int, way: Way) -> tuple[int, Prepared]:
    """Make rows and prepare them; return how large their file is, and what that took."""
    texts = [str(value) for row in read_rows(BuiltinSource(kind="builtin", rows=300), seed=0) for value in row.values()]
    train_tokenizer(texts, 400).save_pretrained(folder / "tokenizer")
    write_lines(folder / "rows.jsonl", rows, words)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(prepared, folder / "rows.jsonl", folder / "tokenizer", folder, way).result()
    return (folder / "rows.jsonl").stat().st_size, found


if __name__ == "__main__":
    raise SystemExit(main())
