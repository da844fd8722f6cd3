"""What a step costs when the student writes its rows: beside plain steps, beside its parts, and by how much lag hides of it.

    python -m benchmarks.on_policy [--engine vllm] [--steps 40] [--new-tokens 64]

Whole runs of the tiny pair, each from the same fine-tuned models: rows as the data has them; rows by the student, with weights
handed over after every step, and after every eighth; and the same with a lag of one window. Medians over the later half of the
steps. All processes share the machine: on two cores what runs at one time slows each other.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.monitors.metrics_log import read_metrics
from benchmarks.bars import Bar, print_table, report

ROWS_A_STEP = 16
LAG_BOUND, HAND_OVER_BOUND = 1.15, 0.05
RUNS: Mapping[str, str | None] = {
    "data": None,
    "lag 0, refresh 1": "lag: 0, refresh_steps: 1",
    "lag 0, refresh 8": "lag: 0, refresh_steps: 8",
    "lag 1, refresh 8": "lag: 1, refresh_steps: 8",
}
"""Of each way, the settings of its rollouts; None where there are none."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Medians of a step, in seconds."""

    step: float
    """As the workers see it, waiting included."""
    training: float
    """Of it, without waiting."""
    tokens: float
    """Tokens of the step's rows."""
    sampling: float = 0.0
    scoring: float = 0.0
    hand_over: float = 0.0
    """For each optimizer step, so that a hand-over after eight counts an eighth."""


def run(output: Path, name: str, options: argparse.Namespace, *overrides: str) -> Path:
    """Run the tiny configuration up to the trained student; return the run's folder."""
    rows = options.steps * ROWS_A_STEP
    settings = [
        f"output={output}", f"name={name}", f"data.source.rows={rows + 64}", "data.heldout_rows=64", "evaluate.generate_rows=0",
        f"teacher.engine.kind={options.engine}", "teacher.engine.cpus=0.5", "workers.cpus=1", f"train.batch_rows={ROWS_A_STEP}",
        "train.epochs=1",
    ]  # fmt: skip
    command = [sys.executable, "-m", "orchestrator", "train", "configs/tiny_cpu.yaml", *settings, *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return output / name


def cost_of(folder: Path) -> StepCost:
    """Read a run's medians over the later half of its steps."""
    steps = read_metrics(folder / "metrics" / "train.jsonl")
    rollouts = read_metrics(folder / "metrics" / "rollouts.jsonl")
    later, written = steps[len(steps) // 2 :], rollouts[len(rollouts) // 2 :]

    def median(lines: Sequence[Mapping[str, float]], field: str) -> float:
        return statistics.median(line[field] for line in lines) if lines else 0.0

    return StepCost(
        step=statistics.fmean(line["seconds"] for line in later),
        training=statistics.median(line["seconds"] - line["waited_seconds"] for line in later),
        tokens=median(later, "tokens"),
        sampling=median(written, "sample_seconds"),
        scoring=median(written, "score_seconds"),
        hand_over=sum(line.get("hand_over_seconds", 0.0) for line in written) / max(len(written), 1),
    )


def bars_of(costs: Mapping[str, StepCost]) -> list[Bar]:
    """Compare with what is wanted of them."""
    lag, every = costs["lag 1, refresh 8"], costs["lag 0, refresh 8"]
    slowest = max(lag.training, lag.sampling, lag.scoring)
    return [
        Bar("step of lag 1 over its slowest part", lag.step / slowest, LAG_BOUND),
        Bar("hand-over of a step of lag 0, refresh 8", every.hand_over / every.step, HAND_OVER_BOUND),
    ]


def main() -> int:
    """Measure, print and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    costs = {}
    with tempfile.TemporaryDirectory() as folder:
        first = run(Path(folder), "first", options)
        finished = {role: first / "models" / f"{role}_finetuned" for role in ("teacher", "student")}
        pretrained = [
            "tokenizer=null",
            *(f"{role}.model={{kind: pretrained, name: {path}}}" for role, path in finished.items()),
            "teacher.finetune=null", "student.finetune=null", f"data.max_tokens={128 - options.new_tokens}",
        ]  # fmt: skip
        for name, settings in RUNS.items():
            text = f"{{student_share: 1.0, max_new_tokens: {options.new_tokens}, {settings}}}" if settings else "null"
            place = run(Path(folder), name.replace(", ", "-").replace(" ", "-"), options, *pretrained, f"rollouts={text}")
            costs[name] = cost_of(place)
            print(json.dumps({name: str(costs[name])}), flush=True)
    print()
    lines = [
        [name, f"{one.tokens:.0f}", *(f"{value:.3f}" for value in (one.step, one.training, one.sampling, one.scoring)),
         f"{one.hand_over:.4f}", f"{one.tokens / one.step:,.0f}"]
        for name, one in costs.items()
    ]  # fmt: skip
    print_table(["rows", "tokens", "step, s", "training", "sampling", "scoring", "hand-over", "tokens/s"], lines)
    return report(bars_of(costs))


if __name__ == "__main__":
    raise SystemExit(main())
