"""What the report of a run says of the student's own text: its quality step by step, what it cost, and some of it to read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from actors.config.places import in_object_storage, resolved, within
from actors.score_store.rollout_log import RolloutLog
from actors.score_store.store import is_store
from orchestrator.reports.page import Chart, read_json_lines
from orchestrator.reports.run_charts import curve_of
from orchestrator.reports.svg import line_chart
from orchestrator.run.rollouts import LOG

CHARTS: tuple[tuple[str, str, Mapping[str, str], str, str], ...] = (
    (
        "rollouts-divergence", "Student and teacher on the student's text",
        {"reverse_kl": "reverse KL", "student_entropy": "entropy of the student", "teacher_loss": "loss of the teacher"},
        "nats a token",
        "Estimates from the tokens that were drawn, exact on average at temperature 1. Where reverse KL and entropy fall "
        "together, the student narrows.",
    ),
    ("rollouts-length", "Length of responses", {"mean_length": "mean", "longest": "longest"}, "tokens", ""),
    (
        "rollouts-shares", "Ends and repetition",
        {"ended": "ended by themselves", "repeated": "runs of four tokens that repeat", "empty": "empty"}, "share",
        "Responses that do not end by themselves were cut at rollouts.max_new_tokens.",
    ),
    (
        "rollouts-seconds", "Seconds of a step's rows",
        {
            "sample_seconds": "sampling", "score_seconds": "scoring", "weights_seconds": "waiting for weights",
            "hand_over_seconds": "loading weights",
        },
        "s", "",
    ),
    (
        "rollouts-gap", "Sampler beside trainer", {"hand_over_gap": "mean", "hand_over_largest_gap": "largest"}, "nats",
        "Log-probabilities of one row's tokens, after each hand-over of weights.",
    ),
)  # fmt: skip
"""Name, heading, fields and their labels, unit, and what is to be said of it."""

TEXTS_SHOWN = 3
LAST_STEPS = 20
"""Steps at the end over which a collapse is looked for."""


@dataclass(frozen=True, slots=True)
class StudentText:
    """Responses of one step."""

    step: int
    texts: tuple[tuple[str, str, bool], ...]
    """Prompt, response, and whether it ended by itself."""


@dataclass(frozen=True, slots=True)
class StudentTextSection:
    """What the page shows."""

    charts: list[Chart]
    warnings: list[str]
    steps: list[StudentText]


def student_text(run_path: Path, config: Mapping[str, Any]) -> StudentTextSection | None:
    """Return the section on the student's own text; None where it wrote none. ``config`` is the run's, as its file has it."""
    steps = read_json_lines(run_path / "metrics" / "rollouts.jsonl")
    if not steps:
        return None
    charts = []
    for name, heading, fields, unit, note in CHARTS:
        if curves := [curve for field, label in fields.items() if (curve := curve_of(steps, field, label))]:
            charts.append(Chart(heading, Markup(line_chart(name, curves, "step", unit, smooth=True)), note))
    return StudentTextSection(charts, collapse_signs(steps), _texts(run_path, config, [int(step["step"]) for step in steps]))


def collapse_signs(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return in words what of the last steps points to a student that has collapsed, or does not learn to end."""
    last, first = steps[-LAST_STEPS:], steps[:LAST_STEPS]

    def mean(part: Sequence[Mapping[str, Any]], field: str) -> float:
        return float(np.mean([step.get(field, math.nan) for step in part]))

    signs = []
    if mean(last, "ended") == 0:
        signs.append(
            "No response of the last steps ends by itself: all are cut at rollouts.max_new_tokens, and the student sees no end."
        )
    if mean(last, "repeated") > 0.5:
        signs.append("More than half of the runs of four tokens in the last steps' responses repeat others of the same response.")
    if mean(last, "empty") > 0.5:
        signs.append("More than half of the last steps' responses are empty.")
    if len(steps) > 2 * LAST_STEPS and mean(last, "student_entropy") < 0.1 * mean(first, "student_entropy"):
        signs.append("The student's entropy fell below a tenth of what it was at the beginning.")
    if len(steps) > 2 * LAST_STEPS and mean(last, "reverse_kl") > 2 * max(mean(first, "reverse_kl"), 0.1):
        signs.append("The reverse KL to the teacher is twice what it was at the beginning.")
    return signs


def _texts(run_path: Path, config: Mapping[str, Any], steps: Sequence[int]) -> list[StudentText]:
    """Return responses of an early, a middle and a late step that are kept."""
    place = str(run_path / LOG)
    if in_object_storage(config["output"]):
        place = within(within(resolved(config["output"]), config["name"]), LOG)
    if not is_store(place) or not (run_path / "tokenizer").is_dir():
        return []
    log = RolloutLog(place)
    kept = log.steps_there()
    there = [step for step in steps if step in kept]
    chosen = dict.fromkeys(there[int(place * (len(there) - 1))] for place in (0.0, 0.5, 1.0) if there)
    tokenizer = AutoTokenizer.from_pretrained(run_path / "tokenizer")
    return [StudentText(step, tuple(_texts_of(log, step, tokenizer))) for step in chosen]


def _texts_of(log: RolloutLog, step: int, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str, bool]]:
    rows, sampled, texts = log.examples(step), log.sampled(step), []
    for row in range(min(TEXTS_SHOWN, len(rows))):
        example = rows[row]
        prompt, response = example.token_ids[~example.loss_mask], example.token_ids[example.loss_mask]
        texts.append((tokenizer.decode(prompt), tokenizer.decode(response), sampled[row].ended))
    return texts
