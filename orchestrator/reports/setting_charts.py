"""Charts of values over settings as inline SVG that follow the page's colours: a plane of two, parallel axes of many."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import StrMethodFormatter

from orchestrator.reports.search_charts import Mode, chart
from orchestrator.reports.svg import INK, svg_of
from orchestrator.search.analysis import Axis

# Between two hues of middling lightness, so that lines can be seen on light and dark pages, and with any colour vision. Fewer
# than 50 colours, above which Matplotlib draws a legend of pixels.
BEST_TO_WORST = LinearSegmentedColormap.from_list("best_to_worst", ["#2f74c0", "#8f8494", "#d9702a"], N=32)

MOST_CELLS = 12
"""Values of an axis, above which points are scattered instead of put in cells."""

FULL_ENOUGH = 0.25
"""Share of the places of a grid that have a value, below which points are scattered instead of put in cells."""

MOST_WRITTEN = 7
"""Cells across, up to which each has its value written in it."""


def heat_map(
    name: str, x: Axis, y: Axis, points: Mapping[tuple[float, float], float], value_label: str, mode: Mode
) -> str:
    """Return an SVG of a plane: values by colour, the best one framed. Points that are no grid are scattered squares.

    Args:
        name: of the chart, unique on its page; letters, digits and hyphens.
        x: the axis across.
        y: the axis upwards.
        points: value at each place; at least one.
        value_label: what the values are.
        mode: whether the least or the largest is the best.
    """
    with chart(name) as (figure, axes):
        colours = Normalize(min(points.values()), max(points.values()))
        best = (min if mode == "min" else max)(points, key=lambda place: points[place])
        draw = _draw_cells if _is_grid(points) else _draw_squares
        image = draw(axes, x, y, points, colours, BEST_TO_WORST if mode == "min" else BEST_TO_WORST.reversed(), best)
        axes.set(xlabel=x.path, ylabel=y.path)
        axes.grid(False)
        legend = figure.colorbar(image, ax=axes, label=value_label, pad=0.02)
        legend.outline.set_visible(False)
        return svg_of(figure, name)


def parallel_chart(
    name: str, axes_shown: Sequence[Axis], rows: Sequence[Sequence[float]], values: Sequence[float], value_label: str, mode: Mode
) -> str:
    """Return an SVG of parallel axes, one line a trial, coloured by its value, which stands on the last axis.

    Args:
        name: of the chart, unique on its page; letters, digits and hyphens.
        axes_shown: the settings, at least one.
        rows: of each trial its settings, NaN where it has none.
        values: of each trial, finite.
        value_label: what the values are.
        mode: whether the least or the largest is the best.
    """
    with chart(name) as (figure, axes):
        columns = [np.array(column, dtype=float) for column in zip(*rows, strict=True)]
        ends, heights = [], []
        for axis, column in [*zip(axes_shown, columns, strict=True), (Axis(value_label), np.array(values, dtype=float))]:
            low, high = np.nanmin(column), np.nanmax(column)
            scaled = np.log(column) if axis.log and low > 0 else column
            span = np.nanmax(scaled) - np.nanmin(scaled)
            heights.append((scaled - np.nanmin(scaled)) / span if span > 0 else np.where(np.isnan(scaled), np.nan, 0.5))
            ends.append((low, high))
        colours = Normalize(min(values), max(values))
        palette = BEST_TO_WORST if mode == "min" else BEST_TO_WORST.reversed()
        best = (np.argmin if mode == "min" else np.argmax)(values)
        for index, (value, line) in enumerate(zip(values, np.transpose(heights), strict=True)):
            look: dict[str, Any] = {"linewidth": 2.4, "zorder": 3} if index == best else {"linewidth": 0.9, "alpha": 0.8}
            axes.plot(range(len(line)), line, color=palette(colours(value)), **look)
        _dress_parallel(axes, [*axes_shown, Axis(value_label)], ends)
        return svg_of(figure, name)


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the last part of each dotted path, or the whole where two would be alike."""
    last = [path.rsplit(".", 1)[-1] for path in paths]
    return [path if last.count(short) > 1 else short for path, short in zip(paths, last, strict=True)]


def _is_grid(points: Mapping[tuple[float, float], float]) -> bool:
    across, upwards = ({place[side] for place in points} for side in (0, 1))
    return max(len(across), len(upwards)) <= MOST_CELLS and len(points) >= FULL_ENOUGH * len(across) * len(upwards)


def _draw_cells(
    axes: Axes, x: Axis, y: Axis, points: Mapping[tuple[float, float], float], colours: Normalize,
    palette: LinearSegmentedColormap, best: tuple[float, float],
) -> ScalarMappable:  # fmt: skip
    across, upwards = (sorted({place[side] for place in points}) for side in (0, 1))
    cells = np.full((len(upwards), len(across)), np.nan)
    for (at_x, at_y), value in points.items():
        column, row = across.index(at_x), upwards.index(at_y)
        cells[row, column] = value
        if max(cells.shape) <= MOST_WRITTEN:
            ink = _ink_on(palette(colours(value)))
            axes.text(column, row, f"{value:#.4g}", ha="center", va="center", fontsize=7.5, color=ink)
    edges = (np.arange(len(values) + 1) - 0.5 for values in (across, upwards))
    image = axes.pcolormesh(*edges, np.ma.masked_invalid(cells), cmap=palette, norm=colours)
    axes.set_xticks(range(len(across)), [f"{value:g}" for value in across])
    axes.set_yticks(range(len(upwards)), [f"{value:g}" for value in upwards])
    axes.set(xlim=(-0.5, len(across) - 0.5), ylim=(-0.5, len(upwards) - 0.5))
    corner = (across.index(best[0]) - 0.5, upwards.index(best[1]) - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=INK, linewidth=2, clip_on=False))
    axes.tick_params(length=0)
    return image


def _draw_squares(
    axes: Axes, x: Axis, y: Axis, points: Mapping[tuple[float, float], float], colours: Normalize,
    palette: LinearSegmentedColormap, best: tuple[float, float],
) -> ScalarMappable:  # fmt: skip
    places = np.array(list(points))
    if x.log and places[:, 0].min() > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if y.log and places[:, 1].min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.plot(*best, "s", markersize=13, color=INK, fillstyle="none", markeredgewidth=1.5)
    axes.margins(0.08)
    return axes.scatter(places[:, 0], places[:, 1], c=list(points.values()), cmap=palette, norm=colours, marker="s", s=64)


def _ink_on(colour: Sequence[float]) -> str:
    """Return black or white, whichever has more contrast to a colour (WCAG 2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#0b0d10" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#fcfcfd"


def _dress_parallel(axes: Axes, shown: Sequence[Axis], ends: Sequence[tuple[float, float]]) -> None:
    names = short_names([axis.path for axis in shown])
    for place, (axis, label, (low, high)) in enumerate(zip(shown, names, ends, strict=True)):
        axes.plot([place, place], [0, 1], color=INK, linewidth=0.8, alpha=0.6, zorder=1)
        axes.text(place, 1.04, f"{high:.3g}", ha="center", va="bottom", fontsize=8)
        axes.text(place, -0.04, f"{low:.3g}", ha="center", va="top", fontsize=8)
        axes.text(place, -0.17, _folded(label) + ("\n(log)" if axis.log else ""), ha="center", va="top", fontsize=8)
    axes.set(xlim=(-0.4, len(shown) - 0.6), ylim=(-0.5, 1.15), xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _folded(name: str, width: int = 11) -> str:
    lines = [""]
    for part in re.findall(r"[^_. ]+[_. ]?", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
