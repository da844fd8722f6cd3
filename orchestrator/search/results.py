"""Trials as a table, best first: on the terminal, as CSV, as Parquet; the best one as a configuration that ``run`` accepts."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from actors.files import write_atomically
from orchestrator.config.load import dump_config
from orchestrator.config.run import RunConfig
from orchestrator.config.tune import OF_ANSWERS
from orchestrator.run.results_table import CLASS_METRICS, METRICS, Show, written
from orchestrator.search.bound_space import BoundSpace
from orchestrator.search.ledger import Search, Status, Trial

STATUS_ORDER: dict[Status, int] = {"completed": 0, "stopped": 1, "unfinished": 2, "failed": 3}
"""Whose trials stand first in a table."""

LABELS: dict[str, str] = {name: label for name, label, _ in (*CLASS_METRICS, *METRICS)}
SHOWS: dict[str, Show] = {name: show for name, _, show in (*CLASS_METRICS, *METRICS)}

PLAIN_WIDTH = 120
LONGEST_NAME = 80


def ranked(search: Search) -> list[Trial]:
    """Return all trials: completed ones by their value, best first; then stopped, unfinished and failed ones.

    Stopped and unfinished trials are ordered by how far they came, and only then by their value: values after different
    numbers of steps cannot be compared.
    """
    sign = 1 if search.spec.mode == "min" else -1

    def order(trial: Trial) -> tuple[float, ...]:
        status, value = search.status(trial), search.value(trial)
        came = 0 if status == "completed" else -trial.step
        return STATUS_ORDER[status], came, math.inf if value is None else sign * value, trial.number

    return sorted(search.trials, key=order)


def completed_trials(search: Search) -> list[Trial]:
    """Return the completed trials, best first."""
    return [trial for trial in ranked(search) if search.status(trial) == "completed"]


def best_trial(search: Search) -> Trial | None:
    """Return the best completed trial; if none is completed, the best of the stopped ones that came furthest; else None."""
    first = next(iter(ranked(search)), None)
    return first if first is not None and search.status(first) in ("completed", "stopped") else None


def axes_of(search: Search) -> list[str]:
    """Return the dotted paths that points set, in the order in which they first appear."""
    return list(dict.fromkeys(path for trial in search.trials for path in trial.begun.point))


def metrics_of(search: Search) -> list[str]:
    """Return the names of what was measured, the metric of the search first; those of single kinds of tasks are left out."""
    return [name for name in _measured(search) if task_measure_of(name) is None]


def task_metrics_of(search: Search) -> dict[str, str]:
    """Return, by kind of task, the name of what was measured of the answers to it; empty where nothing was."""
    found = {name: task_measure_of(name) for name in _measured(search)}
    return {both[1]: name for name, both in found.items() if both is not None}


def task_measure_of(metric: str) -> tuple[str, str] | None:
    """Return measure and task of a metric such as ``rouge_l.dolly``; None of one that is of all answers."""
    measure, dot, task = metric.partition(".")
    return (measure, task) if dot and measure in OF_ANSWERS else None


def _measured(search: Search) -> list[str]:
    return list(dict.fromkeys([search.spec.metric, *(name for trial in search.trials for name in trial.metrics)]))


def sizes_of(search: Search) -> dict[int, int]:
    """Return how many parameters the student of each trial has, by its number; empty where all have as many."""
    sizes = {trial.number: trial.ended.parameters for trial in search.trials if trial.ended and trial.ended.parameters}
    return sizes if len(set(sizes.values())) > 1 else {}


def label_of(metric: str) -> str:
    """Return what a metric is called, with its unit where it is known."""
    if (both := task_measure_of(metric)) is not None:
        return f"{LABELS[both[0]]} to {both[1]}"
    return LABELS.get(metric, metric)


def show_of(metric: str) -> Show:
    """Return how a metric's values are written; in nats where nothing else is known."""
    return SHOWS.get(metric.partition(".")[0], "nats")


def written_metric(metric: str, value: float | None) -> str:
    """Return a metric's value as it stands in tables."""
    return written(value, show_of(metric))


def written_setting(value: Any) -> str:
    """Return a value of a point: numbers short, texts as they are, all else as JSON, which a configuration reads as well."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def trial_table(search: Search) -> pa.Table:
    """Return a row for each trial, best first.

    Columns: ``rank`` (1 is best; null unless completed), ``trial``, ``arm``, ``seed``, ``status``, ``step``, each metric, each
    path that points set (``point.seed`` for ``seed``), ``parameters`` where students differ in size, ``seconds``,
    ``student_tokens``, ``error``. A path whose values are not all numbers is a text column.
    """
    trials = ranked(search)
    completed = {trial.number: rank for rank, trial in enumerate(completed_trials(search), start=1)}
    columns: dict[str, pa.Array] = {
        "rank": pa.array([completed.get(trial.number) for trial in trials], pa.int64()),
        "trial": pa.array([trial.number for trial in trials], pa.int64()),
        "arm": pa.array([trial.begun.arm for trial in trials], pa.string()),
        "seed": pa.array([trial.begun.seed for trial in trials], pa.int64()),
        "status": pa.array([search.status(trial) for trial in trials], pa.string()),
        "step": pa.array([trial.step for trial in trials], pa.int64()),
    }
    for metric in (*metrics_of(search), *task_metrics_of(search).values()):
        columns[metric] = pa.array([trial.metrics.get(metric) for trial in trials], pa.float64())
    for path in axes_of(search):
        columns[f"point.{path}" if path in columns else path] = _column([trial.begun.point.get(path) for trial in trials])
    if sizes := sizes_of(search):
        columns["parameters"] = pa.array([sizes.get(trial.number) for trial in trials], pa.int64())
    columns["seconds"] = pa.array([trial.seconds for trial in trials], pa.float64())
    columns["student_tokens"] = pa.array([trial.ended and trial.ended.student_tokens for trial in trials], pa.int64())
    columns["error"] = pa.array([search.error(trial) for trial in trials], pa.string())
    return pa.table(columns)


def write_results(search: Search, space: BoundSpace, folder: Path) -> None:
    """Write ``trials.csv``, ``trials.parquet`` and, if a trial came to a measured end, ``best.yaml``."""
    write_trial_tables(search, folder)
    if (best := best_trial(search)) is not None:
        write_best(search, space.config_of(best.begun.point), folder / "best.yaml")


def write_trial_tables(search: Search, folder: Path) -> None:
    """Write ``trials.csv`` and ``trials.parquet``."""
    table = trial_table(search)
    for name, write in (("trials.csv", pyarrow.csv.write_csv), ("trials.parquet", pyarrow.parquet.write_table)):
        buffer = pa.BufferOutputStream()
        write(table, buffer)
        write_atomically(folder / name, buffer.getvalue().to_pybytes())


def print_trial_table(search: Search, console: Console | None = None) -> None:
    """Print the table for people, best first, failed trials last with their errors."""
    console = console or Console()
    console = console if console.is_terminal else Console(file=console.file, width=PLAIN_WIDTH)
    metrics, axes, compares = metrics_of(search), axes_of(search), search.spec.kind == "compare"
    sizes = sizes_of(search)
    shown = Table(box=SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    shown.add_column("trial", justify="right")
    for heading in [*(["arm", "seed"] if compares else axes), *(["parameters"] if sizes else [])]:
        shown.add_column(Text(heading), justify="left" if heading == "arm" else "right", overflow="fold")
    for metric in metrics:
        shown.add_column(metric, justify="right", overflow="fold")
    shown.add_column("step", justify="right")
    shown.add_column("status")
    for trial in ranked(search):
        point = trial.begun.point
        settings = [trial.begun.arm or "", str(trial.begun.seed)] if compares else [
            written_setting(point[path]) if path in point else "" for path in axes
        ]  # fmt: skip
        settings += [written(sizes.get(trial.number), "count")] if sizes else []
        measured = [written_metric(metric, trial.metrics.get(metric)) for metric in metrics]
        cells = [str(trial.number), *settings, *measured, str(trial.step), search.status(trial)]
        shown.add_row(*map(Text, cells))
    console.print(shown)
    for trial in search.with_status("failed"):
        console.print(Text(f"trial {trial.number} failed: {search.error(trial)}"))


def write_best(search: Search, config: RunConfig, path: Path) -> Trial:
    """Write the configuration of the best trial as YAML that ``run`` accepts, and return the trial.

    Args:
        search: the search.
        config: of the best trial, whole.
        path: where to; the run gets the name of the search with ``-best``, since a folder belongs to one configuration.

    Raises:
        ValueError: if no trial came to a measured end.
    """
    trial = best_trial(search)
    if trial is None:
        raise ValueError(f"no trial of {search.spec.name} was completed or stopped: there is no best one to write")
    named = config.model_copy(update={"name": f"{config.name[: LONGEST_NAME - len('-best')]}-best"})
    heading = f"# {describe_best(search, trial)}\n"
    write_atomically(path, (heading + dump_config(named)).encode())
    return trial


def describe_best(search: Search, trial: Trial) -> str:
    """Return one sentence about the best trial."""
    metric = search.spec.metric
    measured = f"{label_of(metric)} {written_metric(metric, search.value(trial))} after {trial.step} steps"
    count = len(search.with_status("completed"))
    among = f"the best of {count} completed" if count else "stopped early, and no trial was completed"
    return f"Trial {trial.number} of {search.spec.name}, {among}: {measured}"


def _column(values: Sequence[Any]) -> pa.Array:
    given = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
        return pa.array(values, pa.int64() if all(isinstance(value, int) for value in given) else pa.float64())
    return pa.array([_text_or_none(value) for value in values], pa.string())


def _text_or_none(value: Any) -> str | None:
    if isinstance(value, Mapping | list):
        return json.dumps(value, ensure_ascii=False)
    return None if value is None else written_setting(value)
