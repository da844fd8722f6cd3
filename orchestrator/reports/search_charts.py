"""Charts of trials and arms as inline SVG that follow the page's colours: learning curves, means, differences."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from orchestrator.reports.svg import INK, SERIES, STYLE, svg_of

Mode = Literal["min", "max"]
Look = Literal["completed", "stopped", "failed", "unfinished", "best", "arm"]

WIDTH, HEIGHT = 5.4, 2.9
MOST_TICKS = 5


@dataclass(frozen=True, slots=True)
class Trace:
    """A learning curve."""

    label: str
    """Name in the legend, where it has one of its own."""

    x: Sequence[float]
    y: Sequence[float]

    look: Look = "arm"
    """How it is drawn: arms and the best trial have colours, all others are faint."""


LOOKS: dict[Look, dict[str, Any]] = {
    "completed": {"color": INK, "alpha": 0.4, "linewidth": 0.9},
    "stopped": {"color": INK, "alpha": 0.4, "linewidth": 0.9},
    "unfinished": {"color": INK, "alpha": 0.6, "linewidth": 0.9, "linestyle": ":"},
    "failed": {"color": SERIES[1], "alpha": 0.9, "linewidth": 0.9, "linestyle": "--"},
    "best": {"color": SERIES[0], "linewidth": 2.2},
}
END_MARKS: dict[Look, str] = {"stopped": "x", "failed": "X"}


def trace_chart(name: str, traces: Sequence[Trace], x_label: str, y_label: str) -> str:
    """Return an SVG of learning curves.

    Args:
        name: of the chart, unique on its page; letters, digits and hyphens.
        traces: trials, whose looks the legend explains, or arms, each with its label.
        x_label: name of the x axis.
        y_label: name of the y axis, with its unit.
    """
    with chart(name) as (figure, axes):
        arms = 0
        for trace in sorted(traces, key=lambda trace: trace.look == "best"):
            look = LOOKS.get(trace.look) or {"color": SERIES[arms % 5], "linestyle": ("-", "--", ":")[arms // 5 % 3]}
            arms += trace.look == "arm"
            label = trace.label if trace.look in ("arm", "best") else None
            axes.plot(trace.x, trace.y, marker="o" if len(trace.x) == 1 else None, markersize=2.5, label=label, **look)
            if mark := END_MARKS.get(trace.look):
                axes.plot(trace.x[-1], trace.y[-1], marker=mark, markersize=4.5, color=look["color"])
        for kind in ("completed", "stopped", "unfinished", "failed"):
            if any(trace.look == kind for trace in traces):
                axes.add_line(Line2D([], [], label=kind, marker=END_MARKS.get(kind), markersize=4.5, **LOOKS[kind]))
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=(1, 2, 5, 10)))
        if arms > 1:
            figure.legend(loc="outside right center")
        elif len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend()
        return svg_of(figure, name)


def arms_chart(name: str, values: Mapping[str, Sequence[float]], baseline: str | None, label: str) -> str:
    """Return an SVG with a line for each arm: every seed as a dot, mean and one standard deviation to either side.

    No bars: from zero up, differences could not be seen, and from elsewhere their lengths would mislead.
    """
    with chart(name, _height_of(values)) as (figure, axes):
        for place, (arm, of_arm) in enumerate(values.items()):
            colour = SERIES[1] if arm == baseline else SERIES[0]
            deviation = statistics.stdev(of_arm) if len(of_arm) > 1 else 0.0
            axes.plot(of_arm, [place] * len(of_arm), "o", color=INK, alpha=0.35, markersize=3)
            axes.errorbar(
                statistics.fmean(of_arm), place, xerr=deviation, fmt="D", color=colour, markersize=5, capsize=3, linewidth=1.5
            )
        _dress_arms(axes, list(values), label)
        return svg_of(figure, name)


def differences_chart(
    name: str, means: Mapping[str, float], intervals: Mapping[str, tuple[float, float] | None], told_apart: Mapping[str, bool],
    label: str, mode: Mode,
) -> str:  # fmt: skip
    """Return an SVG of each arm's mean difference to the baseline with its interval; those ``told_apart`` are coloured."""
    with chart(name, _height_of(means)) as (figure, axes):
        for place, (arm, mean) in enumerate(means.items()):
            low, high = intervals[arm] or (mean, mean)
            colour = SERIES[0] if told_apart[arm] else INK
            reach = [[mean - low], [high - mean]]
            axes.errorbar(mean, place, xerr=reach, fmt="D", color=colour, markersize=5, capsize=3, linewidth=1.5)
        axes.axvline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        sides = ("better", "worse") if mode == "min" else ("worse", "better")
        for words, side, points in zip(sides, ("right", "left"), (-4, 4), strict=True):
            axes.annotate(words, (0, 1.0), (points, 1), axes.get_xaxis_transform(), "offset points", ha=side, va="bottom")
        _dress_arms(axes, list(means), label)
        return svg_of(figure, name)


def size_chart(name: str, trials: Sequence[tuple[int, float]], label: str, mode: Mode) -> str:
    """Return an SVG with a dot for each trial, given by its student's parameters and its value.

    A line joins those that no smaller student, and none of their size, does as well as.
    """
    front = frontier(trials, mode)
    with chart(name) as (figure, axes):
        axes.plot(*zip(*trials, strict=True), "o", color=INK, alpha=0.4, markersize=4)
        axes.plot(*zip(*front, strict=True), "o-", color=SERIES[0], markersize=5, linewidth=1.5, drawstyle="steps-post")
        axes.set(xlabel="parameters of the student", ylabel=label, xscale="log")
        axes.grid(True, axis="both")
        axes.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        sizes = sorted({size for size, _ in trials})
        axes.set_xticks(sizes if len(sizes) <= MOST_TICKS else [sizes[0], sizes[len(sizes) // 2], sizes[-1]])
        return svg_of(figure, name)


def frontier(trials: Sequence[tuple[int, float]], mode: Mode) -> list[tuple[int, float]]:
    """Return the trials, by size, that are better than all that are smaller or as large."""
    sign, kept = 1 if mode == "min" else -1, list[tuple[int, float]]()
    for size, value in sorted(trials, key=lambda trial: (trial[0], sign * trial[1])):
        if not kept or sign * value < sign * kept[-1][1]:
            kept.append((size, value))
    return kept


def _dress_arms(axes: Axes, arms: Sequence[str], label: str) -> None:
    axes.set_yticks(range(len(arms)), arms)
    axes.set(xlabel=label, ylim=(len(arms) - 0.5, -0.5))
    axes.grid(True, axis="both")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=(1, 2, 5, 10)))


def _height_of(arms: Mapping[str, object]) -> float:
    return max(1.6, 0.9 + 0.3 * len(arms))


@contextmanager
def chart(name: str, height: float = HEIGHT) -> Iterator[tuple[Figure, Axes]]:
    """Give an empty figure of the page's width and ``height`` inches, and its axes, in the page's style."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, figure.subplots()
