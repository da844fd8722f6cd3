"""Rows a second, and memory, of the preparation of a data set: from a file of lines to token ids and loss masks.

    python -m benchmarks.prepare [--rows 10000 100000 1000000] [--words 60] [--processes 1] [--folder .]

Rows are made up, one like the other, with so many words of prompt and response; the tokenizer is trained on the built-in tasks
before. Each size is prepared in a process of its own. Its own memory is what belongs to no file, and counts from when its
libraries are loaded and a few rows were prepared.
"""

import argparse
import json
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from transformers import AutoTokenizer

from actors.format import MIB
from benchmarks.bars import Bar, print_table, report
from benchmarks.store_scale import Cost, Watch
from orchestrator.config.data import BuiltinSource, DataConfig
from orchestrator.data.dataset import prepare_data
from orchestrator.data.sources import read_rows
from orchestrator.data.tokenizers import train_tokenizer

GROWTH_MIB = 64.0
HELDOUT_ROWS = 500


def write_lines(path: Path, rows: int, words: int) -> None:
    """Write rows of a file of lines, one at a time."""
    draws = random.Random(0)
    with path.open("w") as file:
        for row in range(rows):
            prompt, response = (" ".join(str(draws.randrange(1000)) for _ in range(words // 2)) for _ in range(2))
            file.write(json.dumps({"instruction": f"{row}: {prompt}", "response": response, "input": ""}) + "\n")


def prepared(path: Path, tokenizer: Path, folder: Path, processes: int) -> Cost:
    """Prepare the rows of a file; return what that took."""
    read = AutoTokenizer.from_pretrained(tokenizer)
    few = DataConfig.model_validate({"source": {"kind": "builtin", "rows": 50}, "heldout_rows": 10})
    prepare_data(few, lambda texts: read, folder / "few")
    data = DataConfig.model_validate(
        {
            "source": {"kind": "files", "path": str(path)}, "max_tokens": 100_000, "heldout_rows": HELDOUT_ROWS,
            "processes": processes,
        }
    )  # fmt: skip
    watch = Watch()
    watch.take("prepare", lambda: prepare_data(data, lambda texts: read, folder / "data"))
    return watch.costs[0]


def main(words: list[str] | None = None) -> int:
    """Measure, print and compare with the bar."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--words", type=int, default=60, help="of a row")
    parser.add_argument("--processes", type=int, default=1, help="that render and tokenize; the memory is the first one's")
    parser.add_argument("--folder", type=Path, default=Path())
    arguments = parser.parse_args(words)
    lines, own = [], []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        texts = [str(value) for row in read_rows(BuiltinSource(kind="builtin", rows=300), seed=0) for value in row.values()]
        train_tokenizer(texts, 400).save_pretrained(folder / "tokenizer")
        for rows in arguments.rows:
            write_lines(folder / "rows.jsonl", rows, arguments.words)
            size = (folder / "rows.jsonl").stat().st_size
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                cost = pool.submit(prepared, folder / "rows.jsonl", folder / "tokenizer", folder, arguments.processes).result()
            own.append(cost.own_mib)
            pace = f"{rows / cost.seconds:,.0f}"
            lines.append([f"{rows:,}", f"{size / MIB:,.0f}", f"{cost.seconds:.1f}", pace, f"{cost.own_mib:,.0f}"])
    print_table(["rows", "MiB of the file", "seconds", "rows/s", "own MiB"], lines)
    return report([Bar("MiB more for the most rows than for the fewest", max(own) - own[0], GROWTH_MIB)])


if __name__ == "__main__":
    raise SystemExit(main())
