"""Held-out texts for the report, each token shaded by the teacher's uncertainty or by the student's distance from the teacher.

The numbers are the evaluation's; nothing is computed here but shades. Colour never says anything alone: every target has its
numbers beside it, the furthest are listed below each text, and hard targets are underlined.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.format import percent
from orchestrator.run.results_table import COLUMNS, MODEL_NAMES

LISTED = 5
"""Targets named below each text."""

SMALLEST_TOP = 0.05
"""Nats: the strongest shade of a divergence stands for at least this much, or rounding alone would colour a text."""

SATURATED = 0.02
"""Share of the shown targets whose divergence may lie beyond the strongest shade."""

CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\r": "↵", "\t": "⇥"})

View = Mapping[str, Any]
"""A row as ``actors.evaluation.token_view.TokenView`` was written."""


@dataclass(frozen=True, slots=True)
class Shading:
    """One way of colouring the texts."""

    key: str
    """Short name: uncertainty, before, after."""

    label: str
    """What the reader chooses."""

    legend: tuple[tuple[str, str], ...]
    """Opacity and what it stands for, from pale to strong."""

    unit: str


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens that is shown as one piece: a single token, or those that make up a character together."""

    text: str
    numbers: str
    """What is said of its targets; empty if it has none."""

    shades: tuple[tuple[str, str], ...]
    """Key of the shading, and opacity from 0 to 1."""

    hard: bool


@dataclass(frozen=True, slots=True)
class Highlights:
    """The targets of a text that stand out under one shading."""

    key: str
    label: str
    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ShownText:
    """One held-out text."""

    row: int
    task: str | None
    before: int
    """Tokens left out before the text."""

    after: int
    """Tokens left out after it."""

    spans: tuple[Span, ...]
    highlights: tuple[Highlights, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """The texts, and how they can be coloured."""

    shadings: tuple[Shading, ...]
    texts: tuple[ShownText, ...]
    border: str
    """UNC above which a target is hard, as written; empty if the run draws no such line."""


def read_reading(run_path: Path, border: float | None) -> Reading | None:
    """Return the texts of a run that was evaluated; None where no model's evaluation has any, as those of older versions.

    Args:
        run_path: the run's folder.
        border: UNC above which a target is hard; None if there is no such line.
    """
    views = {name: views_of(run_path / "evaluation" / f"{name}.json") for name in MODEL_NAMES}
    first: dict[int, View] = next((found for found in views.values() if found), {})
    if not first:
        return None
    models = {name: found for name, found in views.items() if found}
    scales = divergence_scale([view for name, found in models.items() if name != "teacher" for view in found.values()])
    texts = []
    for row, view in first.items():
        by_model = {name: found[row] for name, found in models.items() if row in found and same_text(found[row], view)}
        texts.append(shown_text(view, by_model, scales, border))
    return Reading(tuple(shadings(models, scales)), tuple(texts), "" if border is None else f"{border:.2g}")


def views_of(path: Path) -> dict[int, View]:
    """Return the views of one model's evaluation by row; none if there is no such file, or nothing in it."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {view["row"]: view for view in content.get("views", ())}


def same_text(one: View, other: View) -> bool:
    """Whether two models read the same tokens and targets."""
    return all(one[field] == other[field] for field in ("pieces", "targets", "before", "after"))


def divergence_scale(views: Sequence[View]) -> float:
    """Return the nats for which the strongest shade stands: 1, 2, 3 or 5 times a power of ten, beyond which lie few targets."""
    values = [value for view in views for value in view["divergence"]]
    high = max(SMALLEST_TOP, float(np.quantile(values, 1 - SATURATED)) if values else 0.0)
    power = 10.0 ** math.floor(math.log10(high))
    return next(step * power for step in (1, 2, 3, 5, 10) if step * power >= high * (1 - 1e-9))


def shadings(models: Mapping[str, Any], top: float) -> Iterator[Shading]:
    """Yield the ways of colouring for which there are numbers."""
    levels = (0.0, 0.25, 0.5, 0.75, 1.0)
    yield Shading("uncertainty", "teacher's uncertainty", tuple((f"{level:g}", f"{level:g}") for level in levels), "UNC")
    for name, key, label in _students():
        if name in models:
            legend = [(f"{level:g}", f"{top * level**2:.2g}") for level in levels]
            legend[-1] = (legend[-1][0], f"≥ {legend[-1][1]}")
            yield Shading(key, f"{label}, distance from teacher", tuple(legend), "nats")


def shown_text(view: View, by_model: Mapping[str, View], top: float, border: float | None) -> ShownText:
    """Return one text with the shades and numbers of its tokens."""
    index_of = {place: index for index, place in enumerate(view["targets"])}
    spans = []
    for start, stop in groups_of(view["pieces"]):
        indices = [index_of[place] for place in range(start, stop) if place in index_of]
        shades = {"uncertainty": max((view["uncertainty"][index] for index in indices), default=0.0)}
        for name, key, _ in _students():
            if name in by_model:
                furthest = max((by_model[name]["divergence"][index] for index in indices), default=0.0)
                shades[key] = math.sqrt(min(1.0, max(0.0, furthest) / top))
        text = "".join(view["pieces"][start:stop])
        spans.append(
            Span(
                text=text.translate(CONTROL_PICTURES) or "∅",
                numbers="\n".join(numbers_of(index, view, by_model) for index in indices),
                shades=tuple((key, f"{shade:.2f}") for key, shade in shades.items()) if indices else (),
                hard=border is not None and any(view["uncertainty"][index] > border for index in indices),
            )
        )
    highlights = tuple(highlights_of(view, by_model))
    return ShownText(view["row"], view["task"], view["before"], view["after"], tuple(spans), highlights)


def groups_of(pieces: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield which tokens are shown together, from and up to: those of an unfinished character with the one that completes it."""
    start = 0
    for place, piece in enumerate(pieces):
        if piece or place == len(pieces) - 1:
            yield start, place + 1
            start = place + 1


def numbers_of(index: int, view: View, by_model: Mapping[str, View]) -> str:
    """Return all that is known of one target, a line for each model."""
    lines = [f"{_quoted(_piece(view, index))}: uncertainty {view['uncertainty'][index]:.3g}"]
    for name, label in zip(MODEL_NAMES, COLUMNS, strict=True):
        if name in by_model:
            reading = by_model[name]
            line = f"{label}: {percent(reading['probability'][index])} here, {_favourite(reading, index)}"
            lines.append(line if name == "teacher" else f"{line}, KL {reading['divergence'][index]:.3g} nats")
    return "\n".join(lines)


def highlights_of(view: View, by_model: Mapping[str, View]) -> Iterator[Highlights]:
    """Yield the targets that stand out, the furthest first, for each way of colouring."""
    teacher = by_model.get("teacher")

    def most(values: Sequence[float], written: Callable[[int], str]) -> tuple[str, ...]:
        return tuple(written(index) for index in sorted(range(len(values)), key=lambda index: -values[index])[:LISTED])

    def of_teacher(index: int) -> str:
        instead = f" (teacher: {_favourite(teacher, index)})" if teacher else ""
        return f"{_quoted(_piece(view, index))} {view['uncertainty'][index]:.2f}{instead}"

    yield Highlights("uncertainty", "most uncertain", most(view["uncertainty"], of_teacher))
    for name, key, label in _students():
        if (student := by_model.get(name)) is not None:

            def of_student(index: int, student: View = student) -> str:
                models = [("student", student), *([("teacher", teacher)] if teacher else [])]
                said = "; ".join(f"{who}: {_favourite(model, index)}" for who, model in models)
                return f"{_quoted(_piece(view, index))} {student['divergence'][index]:.2g} ({said})"

            yield Highlights(key, f"{label}, furthest from teacher", most(student["divergence"], of_student))


def _students() -> Iterator[tuple[str, str, str]]:
    """Yield file name, key and label of the models that are compared with the teacher."""
    for name, label in zip(MODEL_NAMES[1:], COLUMNS[1:], strict=True):
        yield name, name.removeprefix("student_"), label


def _piece(view: View, index: int) -> str:
    return str(view["pieces"][view["targets"][index]])


def _favourite(view: View, index: int) -> str:
    return f"{_quoted(view['favourite'][index])} {percent(view['favourite_probability'][index])}"


def _quoted(piece: str) -> str:
    return f"‘{piece.translate(VISIBLE).translate(CONTROL_PICTURES)}’" if piece else "(part of a character)"
