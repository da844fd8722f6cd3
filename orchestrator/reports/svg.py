"""Small charts as inline SVG that follow the page's colours, so that they serve light and dark alike."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

# Matplotlib wants fixed colours; each of these stands for one that the page's style sheet gives.
INK = "#010203"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05")
PAGE_COLOURS = {INK: "currentColor", **{colour: f"var(--series-{index})" for index, colour in enumerate(SERIES, start=1)}}

MOST_POINTS = 1500
"""Points of a curve that are drawn; longer ones are thinned evenly."""

STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "text.color": INK,
    "text.parse_math": False,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "axes.prop_cycle": cycler(color=SERIES),
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart."""

    label: str
    """Name in the legend."""

    x: Sequence[float]
    y: Sequence[float]


def line_chart(
    name: str, curves: Sequence[Curve], x_label: str, y_label: str, smooth: bool = False,
    y_limits: tuple[float, float] | None = None,
) -> str:  # fmt: skip
    """Return an SVG of curves over a common axis.

    Args:
        name: of the chart, unique on its page; letters, digits and hyphens.
        curves: at most as many as there are series colours.
        x_label: name of the x axis.
        y_label: name of the y axis, with its unit.
        smooth: draw values faintly, and over them their moving average over a fortieth of the curve.
        y_limits: ends of the y axis; defaults to those of the values.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure, axes = _empty_figure()
        for colour, curve in zip(SERIES, curves, strict=False):
            x, y = np.asarray(curve.x, dtype=float), np.asarray(curve.y, dtype=float)
            window = max(1, len(y) // 40)
            if smooth and window > 1:
                axes.plot(*_thinned(x, y), color=colour, alpha=0.25, linewidth=0.8)
                x, y = x[window - 1 :], np.convolve(y, np.full(window, 1 / window), mode="valid")
            axes.plot(*_thinned(x, y), color=colour, label=curve.label, marker="o" if len(x) == 1 else None, markersize=3)
        axes.set(xlabel=x_label, ylabel=y_label)
        if y_limits is not None:
            axes.set_ylim(*y_limits)
        if len(curves) > 1:
            axes.legend()
        return svg_of(figure, name)


def histogram_chart(
    name: str, edges: np.ndarray, shares: np.ndarray, x_label: str, y_label: str, border: float | None = None,
    border_labels: tuple[str, str] = ("", ""),
) -> str:  # fmt: skip
    """Return an SVG of bars between ``edges`` [bins + 1] of heights ``shares`` [bins].

    ``border`` draws an upright line with a label on each side of it.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure, axes = _empty_figure()
        width = np.diff(edges)
        axes.bar(edges[:-1] + 0.06 * width, shares, width=0.88 * width, align="edge", color=SERIES[0])
        # Most tokens of a good teacher fall into the first bar: on a linear scale the others could not be seen.
        axes.set(xlabel=x_label, ylabel=f"{y_label}, log scale", xlim=(edges[0], edges[-1]), yscale="log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        drawn = shares[shares > 0]
        if len(drawn):
            axes.set_ylim(drawn.min() / 1.6, drawn.max() * 1.6)
        if border is not None:
            axes.axvline(border, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            for label, side, points in zip(border_labels, ("right", "left"), (-4, 4), strict=True):
                above = axes.get_xaxis_transform()
                axes.annotate(label, (border, 1.0), (points, 1), above, "offset points", ha=side, va="bottom")
        return svg_of(figure, name)


def _empty_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    return figure, figure.subplots()


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= MOST_POINTS:
        return x, y
    kept = np.linspace(0, len(x) - 1, MOST_POINTS).astype(int)
    return x[kept], y[kept]


def svg_of(figure: Figure, name: str) -> str:
    """Return the figure as an SVG element: no document head, no metadata, ids of its own, the page's colours."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>\s*", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawing)
    for colour, of_page in PAGE_COLOURS.items():
        drawing = drawing.replace(colour, of_page)
    return drawing.replace("<svg ", '<svg role="img" ', 1)
