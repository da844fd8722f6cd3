"""What a search costs beside the training itself: the fixed seconds of a trial, and the teacher's tokens.

    python -m benchmarks.search [--trials 12] [--plain 3]

The pair of configs/tiny_cpu.yaml, smaller. A trial's fixed seconds are the time from one trial's end to the next one's, one
trial at a time, less its optimizer steps: choosing the point, starting, loading, measuring at the rungs, writing the
ledger. The plain way starts Ray Train workers for each trial.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

from actors.monitors.metrics_log import read_metrics
from benchmarks.bars import Bar, print_table, report
from orchestrator.config.load import load_config
from orchestrator.config.run import RunConfig
from orchestrator.search.ledger import read_ledger
from orchestrator.search.tune import tune

SMALL = [
    "data.source.rows=1000", "data.heldout_rows=60", "teacher.model.hidden_size=64", "teacher.model.layers=2",
    "teacher.model.heads=2", "teacher.finetune.train.epochs=1", "scores.rows_per_shard=128", "train.epochs=2",
    "evaluate.generate_rows=0",
    "tune.scheduler=none", "tune.rungs=2", "tune.search=random", "tune.concurrent=1",
]  # fmt: skip


class EndTimes:
    """Watches a ledger from a thread, and notes when each trial's end appears in it."""

    def __init__(self, path: Path) -> None:
        self._path, self._over = path, threading.Event()
        self.seconds: list[float] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "EndTimes":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            ended = self._path.read_text().count('"event": "ended"') if self._path.exists() else 0
            while len(self.seconds) < ended:
                self.seconds.append(time.monotonic())


def fixed_seconds(config: RunConfig) -> list[float]:
    """Run a search; return the fixed seconds of each trial after the first."""
    folder = config.run_dir / config.tune.name
    with EndTimes(folder / "ledger.jsonl") as ends:
        tune(
            config,
        )
        time.sleep(0.1)
    trials = read_ledger(folder / "ledger.jsonl").with_status("completed")
    steps = [
        sum(step["seconds"] for step in read_metrics(folder / "trials" / f"{one.number:04d}" / f"trial_{one.number:04d}.jsonl"))
        for one in trials
    ]
    gaps = [after - before for before, after in zip(ends.seconds, ends.seconds[1:], strict=False)]
    return [gap - of_steps for gap, of_steps in zip(gaps, steps[1:], strict=True)]


def main() -> int:
    """Measure both ways on one run, print the table and the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--plain", type=int, default=3, help="trials of the plain way; 0 leaves it out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:

        def config_of(name: str, trials: int, trials_in: str) -> RunConfig:
            settings = [f"output={folder}", f"tune.name={name}", f"tune.trials={trials}", f"tune.trials_in={trials_in}"]
            return load_config("configs/tiny_cpu.yaml", [*SMALL, *settings])

        reused_config = config_of("reused", options.trials, "reused_process")
        reused = fixed_seconds(reused_config)
        plain = fixed_seconds(config_of("plain", options.plain, "ray_train")) if options.plain else []
        cost = read_cost(reused_config.run_dir / "reused")
    rows = [
        [name, str(len(seconds)), f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}"]
        for name, seconds in (("reused_process", reused), ("ray_train", plain))
        if seconds
    ]
    print_table(["trials in", "trials after the first", "fixed seconds, median", "largest"], rows)
    return report(
        [
            Bar("fixed seconds of a trial", statistics.median(reused), 3.0),
            Bar("teacher tokens scored / tokens of the data", cost, 1.0),
        ]
    )


def read_cost(folder: Path) -> float:
    """Return how many times the teacher scored the data."""
    cost = json.loads((folder / "cost.json").read_text())
    return cost["teacher_tokens_scored"] / cost["dataset_tokens"]


if __name__ == "__main__":
    raise SystemExit(main())
