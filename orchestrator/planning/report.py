"""A plan for people, as tables and lines, and for machines, as plain fields."""

import math
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from actors.format import duration, plural, size
from orchestrator.planning.memory import Memory
from orchestrator.planning.plan import SHOWN_REPLICAS, SHOWN_STUDENTS, Plan, saturation, sweep
from orchestrator.planning.throughput import Pace, pace

JOBS = {
    "scoring": "a replica of the teacher", "sampling": "a sampler of the student",
    "sampling_teacher": "a sampler of the teacher",
    "finetune_teacher": "a worker that fine-tunes the teacher",
    "finetune_student": "a worker that fine-tunes the student", "train": "a worker that distils the student",
}  # fmt: skip
"""Names of the jobs for people."""
COLUMNS = {
    "scoring": "the teacher", "sampling": "a sampler", "sampling_teacher": "a teacher's sampler",
    "finetune_teacher": "fine-tunes the teacher",
    "finetune_student": "fine-tunes the student", "train": "distils the student",
}  # fmt: skip
"""The same, over columns."""


def as_plain(made: Plan) -> dict[str, Any]:
    """Return the plan as JSON has it; bytes, seconds, tokens a second."""
    work, nearest = made.work, made.nearest
    return {
        "fits": made.fits,
        "problems": list(made.problems),
        "nearest": nearest and {
            "overrides": list(nearest.overrides), "otherwise": nearest.otherwise,
            "score_and_train_seconds": made.nearest_pace and made.nearest_pace.seconds,
        },
        "cluster": {
            "gpus": made.place.gpus, "nodes": len(made.place.nodes), "gpu_bytes": made.place.gpu_bytes, "live": made.place.live,
        },
        "data": {
            "rows": work.rows, "tokens": work.train_tokens, "targets": work.train_targets, "longest": work.longest,
            "heldout_tokens": work.heldout_tokens, "heldout_targets": work.heldout_targets, "source": work.source,
        },
        "models": {role: asdict(shape) for role, shape in made.estimator.shapes.items()},
        "memory_bytes": {
            name: {"parts": dict(memory.parts), "total": memory.total, "moment": memory.moment}
            for name, memory in made.memory.items()
        },
        "store_bytes": dict(made.store),
        "tokens_per_second": {"replica": _finite(made.rates.scoring), "worker": made.rates.training, "source": made.rates.source},
        "seconds": {
            **made.finetune_seconds, "score": made.pace.scoring_seconds, "epoch": made.pace.epoch_seconds,
            "first_epoch": made.pace.first_epoch_seconds, "score_and_train": made.pace.seconds, "run": made.seconds,
            "search": made.search_seconds,
        },
        "replicas": made.pace.replicas,
        "workers": made.pace.workers,
        "bottleneck": made.pace.bottleneck,
        "replicas_that_feed": made.feeding,
        "trials": made.trials,
        "saturation": saturation(made),
        "sweep": sweep(made),
        "assumptions": list(made.assumptions),
        "remarks": list(made.remarks),
    }  # fmt: skip


def _finite(rate: float) -> float | None:
    """Return a rate as JSON has it, which knows no infinity: a table is looked up in no time."""
    return rate if math.isfinite(rate) else None


def print_plan(made: Plan, console: Console | None = None) -> None:
    """Print the plan: with rules and colours on a terminal, plain where the output goes elsewhere."""
    console = console or Console()
    console = console if console.is_terminal else Console(file=console.file, width=120)
    for line in data_lines(made):
        console.print(line, highlight=False)
    console.print(_models_table(made, console))
    console.print(_memory_table(made.memory, console))
    for line in [
        *time_lines(made),
        "",
        "The sweep: hours of scoring and training, and who is waited for in the first epoch (T, S).",
    ]:
        console.print(line, highlight=False)
    console.print(_sweep_table(made, console))
    assumed = [f"assumed: {line}" for line in made.assumptions]
    for line in [*saturation_lines(made), "", *assumed, *made.remarks, *verdict_lines(made)]:
        console.print(line, highlight=False, soft_wrap=True)


def data_lines(made: Plan) -> list[str]:
    """Return lines about the rows and the size of the stores."""
    work, scored = made.work, made.estimator.scored
    lines = [
        f"data: {work.rows:,} rows, {work.train_tokens:,} {work.unit}, {work.train_targets:,} targets, longest {work.longest} "
        f"{work.unit} ({work.source})",
    ]
    if scored.train_tokens != work.train_tokens:
        longest = made.estimator.asked.longest
        lines.append(f"the teacher reads {scored.train_tokens:,} {scored.unit} to score them, longest {longest} {scored.unit}")
    return [
        *lines,
        f"store: {size(made.store['train'])} for the training rows, {size(made.store['heldout'])} for the held-out rows",
    ]


def time_lines(made: Plan) -> list[str]:
    """Return lines about how long each part takes, and what waits for what."""
    paced, rates = made.pace, made.rates
    unit = made.work.unit
    scores = f"scores {rates.scoring:,.0f} {unit}/s" if math.isfinite(rates.scoring) else "looks its table up"
    lines = [f"speed: a replica {scores}, a worker learns {rates.training:,.0f} {unit}/s ({rates.source})"]
    lines += [f"{name.replace('_', ' the ')}: {duration(seconds)}" for name, seconds in made.finetune_seconds.items()]
    waited = paced.first_epoch_seconds - paced.epoch_seconds * min(1.0, made.pipeline.epochs)
    return [
        *lines,
        f"score once: {duration(paced.scoring_seconds)} with {plural(paced.replicas, 'replica')}",
        f"train: {duration(paced.epoch_seconds)} an epoch with {plural(paced.workers, 'worker')}; the first "
        f"{'follows the scoring' if made.pipeline.follows else 'begins when all is scored'} and waits {duration(waited)}",
        f"score and train, {made.pipeline.epochs:g} epochs: {duration(paced.seconds)}; the whole run: {duration(made.seconds)}",
        f"a search of {plural(made.trials, 'trial')}, each to its end, one after the other: {duration(made.search_seconds)}; it "
        "scores once as well",
        f"bottleneck of the first epoch: the {paced.bottleneck}; {plural(made.feeding, 'replica')} would keep "
        f"{plural(paced.workers, 'worker')} fed; later epochs and trials read the store and need none",
    ]


def saturation_lines(made: Plan) -> list[str]:
    """Return lines about where more replicas or workers gain hardly anything."""
    found = saturation(made)
    fed = ", ".join(f"{workers}: {count}" for workers, count in found["replicas_for_workers"].items())
    busy = ", ".join(f"{count}: {workers}" for count, workers in found["workers_for_replicas"].items())
    return [
        f"replicas that so many workers need, more gain less than 5 %: {fed}",
        f"workers that so many replicas feed: {busy}",
        f"no gain beyond {plural(len(made.pipeline.shard_tokens), 'replica')} (shards) and "
        f"{plural(int(made.pipeline.step_rows.max()), 'worker')} (rows of a step)",
    ]


def verdict_lines(made: Plan) -> list[str]:
    """End with whether the run fits, and if not with what would."""
    if made.fits:
        return [f"verdict: fits {made.place}"]
    lines = [f"verdict: does not fit {made.place}", *(f"  {problem}" for problem in made.problems)]
    assert made.nearest is not None
    if made.nearest.config is None:
        return [*lines, f"nearest: {made.nearest.otherwise}"]
    assert made.nearest_pace is not None
    return [
        *lines,
        f"nearest plan that fits: {' '.join(made.nearest.overrides)} ({duration(made.nearest_pace.seconds)} to score and train)",
    ]


def _table(console: Console, *columns: str) -> Table:
    shown = Table(box=SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for index, column in enumerate(columns):
        shown.add_column(column, justify="right" if index else "left", no_wrap=True)
    return shown


def _models_table(made: Plan, console: Console) -> Table:
    shown = _table(console, "", "parameters", "blocks", "hidden size", "vocabulary, or labels")
    for role, shape in made.estimator.shapes.items():
        shown.add_row(role, *(f"{count:,}" for count in (shape.weights, shape.layers, shape.hidden_size, shape.vocab_size)))
    return shown


def _memory_table(memory: dict[str, Memory], console: Console) -> Table:
    """A column a job, a row a purpose."""
    shown = _table(
        console,
        "memory of one device",
        *(COLUMNS[name] for name in memory),
    )
    purposes = dict.fromkeys(purpose for one in memory.values() for purpose in one.parts)
    for purpose in purposes:
        shown.add_row(purpose, *(size(one.parts[purpose]) if purpose in one.parts else "–" for one in memory.values()))
    shown.add_row("together, in", *(one.moment.replace("the ", "", 1) for one in memory.values()))
    shown.add_row("", *(size(one.total) for one in memory.values()))
    return shown


def _sweep_table(made: Plan, console: Console) -> Table:
    shown = _table(console, "workers", *(plural(count, "replica") for count in SHOWN_REPLICAS))
    for workers in SHOWN_STUDENTS:
        paces = [pace(made.pipeline, replicas, workers) for replicas in SHOWN_REPLICAS]
        shown.add_row(str(workers), *(_cell(one) for one in paces))
    return shown


def _cell(one: Pace) -> str:
    return f"{one.seconds / 3600:.3g} {one.bottleneck[0].upper()}"
