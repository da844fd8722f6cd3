"""The steps of ``make gpu``: what is run, for how long at most, how many GPUs it needs, and what is read off it afterwards."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.format import plural
from actors.monitors.metrics_log import read_metrics

CONFIG = "configs/tiny_cpu.yaml"
SETTLED = 5
"""First steps of a training that are not counted: processes are new, kernels are loaded."""

Reader = Callable[[str], list[str]]
"""From what a step printed to the lines of the page."""


@dataclass(frozen=True, slots=True)
class Step:
    """One command."""

    name: str
    """Heading of the page, and name of its log."""
    about: str
    """What it shows."""
    command: tuple[str, ...]
    """Words of the command; the first is ``python``, which the driver replaces by its own."""
    limit_seconds: float
    """After so long it is ended and counts as failed."""
    read: Reader
    """What is taken from it, if it ended well."""
    needs_gpus: int = 1
    """On machines with fewer it is left out, and the page says so."""


def steps(gpus: int, output: str, model: str, teacher: str) -> tuple[Step, ...]:
    """Return all steps.

    Args:
        gpus: GPUs of the machine.
        output: folder of the runs that are made.
        model: a small pretrained model, by its hub name or folder.
        teacher: a pretrained model whose head is wider than its tokenizer.
    """
    tiny, parallel, sharded = on_gpus(gpus, 1), "teacher.engine.tensor_parallel=2", "train.sharding=fsdp"
    return (
        Step(
            "tests", "what holds on CPUs holds on GPUs", ("python", "-m", "pytest", "-q", "-m", "gpu", "tests"), 420, last_line,
        ),
        Step(
            "doctor", "devices, and scores of a few rows", orchestrator("doctor", output, "doctor", *tiny), 240, findings,
        ),
        Step(
            "tiny run in bfloat16", "all stages on one GPU; the way vLLM takes, bfloat16 against float32",
            orchestrator("run", output, "tiny", *tiny), 480, run_of(output, "tiny"),
        ),
        Step(
            "tensor parallel 2", "a teacher on two GPUs", orchestrator("score", output, "parallel", *tiny, parallel), 300,
            run_of(output, "parallel"), needs_gpus=2,
        ),
        Step(
            "FSDP on all GPUs", "a student sharded over them",
            orchestrator("train", output, "fsdp", *on_gpus(gpus, gpus), sharded), 420, run_of(output, "fsdp"), needs_gpus=2,
        ),
        Step(
            "losses", "time and memory of each loss", ("python", "-m", "benchmarks.losses", "--rounds", "3"), 240, tables,
        ),
        Step(
            "a step of the student", "ATKD beside plain cross entropy",
            ("python", "-m", "benchmarks.student_step", "--rounds", "5"), 120, tables,
        ),
        Step(
            "passes of rows and of tokens",
            "`train.micro_batch_rows` beside `train.micro_batch_tokens` and `train.packing`, a student of 0.5B",
            ("python", "-m", "benchmarks.batches"), 360, tables,
        ),
        Step(
            "scores of a small model", "spread of bfloat16 scores: mean, 99 % quantile, largest",
            ("python", "-m", "scripts.gpu_scores", model), 300, measured,
        ),
        Step(
            "scores of a teacher", "the same, and how often it names ids beyond the tokenizer",
            ("python", "-m", "scripts.gpu_scores", teacher, "--rows", "64"), 540, measured,
        ),
    )  # fmt: skip


def orchestrator(command: str, output: str, name: str, *overrides: str) -> tuple[str, ...]:
    """Return a command of the project, on the tiny configuration."""
    return ("python", "-m", "orchestrator", command, CONFIG, f"name={name}", f"output={output}", *overrides)


def on_gpus(gpus: int, workers: int) -> tuple[str, ...]:
    """Return what the tiny configuration needs to run on GPUs in bfloat16; teacher and student take turns, so that one does."""
    settings = ("workers.gpus=1", "train.precision=bfloat16")
    fits = [f"{role}.finetune.{setting}" for role in ("teacher", "student") for setting in settings]
    return (
        "teacher.engine.gpu=true", "teacher.engine.dtype=bfloat16", *fits, *settings, f"workers.count={min(workers, gpus)}",
        "evaluate.gpus=1", "evaluate.precision=bfloat16", "scores.overlap=false",
    )  # fmt: skip


def last_line(printed: str) -> list[str]:
    """Return the last line that is not empty, in which pytest counts."""
    lines = [line for line in printed.splitlines() if line.strip()]
    return lines[-1:]


def findings(printed: str) -> list[str]:
    """Return the lines of the doctor."""
    return [line for line in printed.splitlines() if line.startswith(("ok ", "FAILED ", "unclear "))]


def measured(printed: str) -> list[str]:
    """Return the lines that begin with ``measured``."""
    return [line.removeprefix("measured ") for line in printed.splitlines() if line.startswith("measured ")]


def tables(printed: str) -> list[str]:
    """Return the tables and bars of a benchmark, and what it says it measured."""
    return [line for line in printed.splitlines() if line.startswith(("|", "bar ", "measured "))]


def run_of(output: str, name: str) -> Reader:
    """Return a reader of a run's folder."""
    return lambda printed: scoring_lines(Path(output) / name) + training_lines(Path(output) / name)


def scoring_lines(run: Path) -> list[str]:
    """Return which way the teacher took, how its scores compared, and its speed, as far as the run says so."""
    events = read_events(run)
    lines = [line.split("teacher: ", 1)[1] for line in read_text(run / "run.log").splitlines() if "teacher: vLLM" in line][-1:]
    lines += [line.split("teacher: ", 1)[1] for line in read_text(run / "run.log").splitlines() if "teacher: slow:" in line][-1:]
    for event in [one for one in events if one["event"] == "compared"][-1:]:
        lines.append(
            f"{event['targets']} targets lie {event['mean_target_error']:.1e} nats from float32 on average, the furthest "
            f"{event['largest_target_error']:.1e}; top-K agree to {event['topk_agreement']:.1%}"
        )
    for event in [one for one in events if one["event"] == "shard_scored" and one.get("split") == "train"][-1:]:
        lines.append(f"the teacher scored {event['tokens_per_second']:,.0f} tokens/s")
    return lines


def training_lines(run: Path) -> list[str]:
    """Return speed, utilisation and memory of each training of a run."""
    lines = []
    for path in sorted((run / "metrics").glob("*.jsonl")):
        found = read_metrics(path)[SETTLED:]
        if not found:
            continue
        parts = [f"{median(found, 'tokens_per_second'):,.0f} tokens/s with {plural(int(found[-1]['workers']), 'worker')}"]
        if all("mfu" in step for step in found):
            parts.append(f"MFU {median(found, 'mfu'):.2%}")
        if all("gpu_memory_bytes" in step for step in found):
            parts.append(f"{max(step['gpu_memory_bytes'] for step in found) / 2**30:.2f} GiB of tensors at most")
        lines.append(f"{path.stem}: {', '.join(parts)}; last loss {found[-1]['loss']:.3f}")
    return lines


def median(found: Sequence[dict[str, float]], name: str) -> float:
    """Return the median of one number over steps."""
    return statistics.median(step[name] for step in found)


def read_events(run: Path) -> list[dict[str, object]]:
    """Return the events of a run; none where it did not get that far."""
    return [json.loads(line) for line in read_text(run / "events.jsonl").splitlines() if line.endswith("}")]


def read_text(path: Path) -> str:
    """Return a file's text; nothing where there is no such file."""
    return path.read_text(encoding="utf-8") if path.exists() else ""
