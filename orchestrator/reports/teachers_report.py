"""What the size of the teacher does to each arm: curves, differences between the largest and the smallest, all trials."""

import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from markupsafe import Markup
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator

from actors.files import write_atomically
from orchestrator import __version__
from orchestrator.reports.compare_report import written_difference, written_interval, written_p, written_summary
from orchestrator.reports.page import Chart, Column, Grid, Headline, PageSection, write_page
from orchestrator.reports.provenance import about_run
from orchestrator.reports.search_charts import chart
from orchestrator.reports.search_report import REPORT, described
from orchestrator.reports.svg import SERIES, svg_of
from orchestrator.search.analysis import TaughtBy, values_of_arms
from orchestrator.search.results import label_of, trial_table, written_metric
from orchestrator.search.statistics import PairedDifference, Values, compare_arms, summary_of

NO_CHANGE = "(no change)"


def write_teachers_report(name: str, taught: Sequence[TaughtBy], folder: Path) -> Path:
    """Write ``teachers.csv``, ``teachers.parquet`` and ``report.html``; return the path of the page."""
    for file, write in (("teachers.csv", pyarrow.csv.write_csv), ("teachers.parquet", pyarrow.parquet.write_table)):
        buffer = pa.BufferOutputStream()
        write(teachers_table(taught), buffer)
        write_atomically(folder / file, buffer.getvalue().to_pybytes())
    write_page(folder / REPORT, "search.html.j2", {**teachers_content(name, taught), "about": about_run(folder.parent)})
    return folder / REPORT


def teachers_table(taught: Sequence[TaughtBy]) -> pa.Table:
    """Return a row for each trial under each teacher: the teacher's name, weights and loss, and the trial's own columns."""
    tables = []
    for one in by_size(taught):
        trials = trial_table(one.search)
        own = {
            "teacher": pa.array([one.teacher] * len(trials), pa.string()),
            "teacher_weights": pa.array([one.weights] * len(trials), pa.int64()),
            "teacher_heldout_loss": pa.array([one.heldout_loss] * len(trials), pa.float64()),
        }
        tables.append(pa.table({**own, **{name: trials[name] for name in trials.column_names}}))
    return pa.concat_tables(tables, promote_options="permissive")


def teachers_content(name: str, taught: Sequence[TaughtBy]) -> dict[str, Any]:
    """Return what the template shows, by the names it uses."""
    taught = by_size(taught)
    plan = taught[0].search.spec
    started = min(one.search.starts[0] for one in taught)
    failures = [
        (f"{one.teacher}: {described(trial)}", one.search.error(trial))
        for one in taught
        for trial in one.search.with_status("failed")
    ]
    return {
        "name": name,
        "title": "teachers",
        "subtitle": f"{plan.trials} trainings under each of {len(taught)} teachers, by {label_of(plan.metric)}",
        "started": datetime.fromisoformat(started).astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "version": __version__,
        "headline": teachers_headline(taught),
        "parts": [curve_part(taught), change_part(taught), teachers_part(taught)],
        "failures": failures,
    }


def by_size(taught: Sequence[TaughtBy]) -> list[TaughtBy]:
    """Return the teachers from the smallest to the largest."""
    return sorted(taught, key=lambda one: one.weights)


def changes_of(taught: Sequence[TaughtBy]) -> tuple[PairedDifference, ...]:
    """Return, for each arm, the student of the largest teacher against that of the smallest, seed by seed."""
    plan = taught[0].search.spec
    small, large = (values_of_arms(one.search, plan.metric) for one in (by_size(taught)[0], by_size(taught)[-1]))
    changes: dict[str, Values] = {
        arm: {seed: large[arm][seed] - small[arm][seed] for seed in sorted(small[arm].keys() & large.get(arm, {}).keys())}
        for arm in small
    }
    seeds = {seed for of_arm in changes.values() for seed in of_arm}
    return compare_arms({NO_CHANGE: dict.fromkeys(sorted(seeds), 0.0), **changes}, NO_CHANGE, plan.mode)


def teachers_headline(taught: Sequence[TaughtBy]) -> Headline:
    """Return in words what becomes of each arm's student from the smallest to the largest teacher."""
    plan, small, large = taught[0].search.spec, by_size(taught)[0].teacher, by_size(taught)[-1].teacher
    sentences = []
    for change in changes_of(taught):
        told = f"{change.verdict} {'from' if change.verdict == 'not distinguishable' else 'than'} under {small}"
        words = f"{change.arm}: under {large} the student is {told}"
        if change.mean is not None:
            words += f": {written_difference(plan.metric, change.mean)}"
        if change.interval is not None:
            words += f", 95 % interval {written_interval(plan.metric, change.interval)}, {len(change.seeds)} seeds"
        sentences.append(words + (f" ({'; '.join(change.notes)})." if change.notes else "."))
    note = (
        f"By {label_of(plan.metric)}, seed by seed, by the paired t test at the 5 % level, corrected by Holm for all arms. "
        "Each teacher is one training of its size: what is its size's doing and what its own cannot be told apart."
    )
    return Headline("What the teacher's size does", tuple(sentences), (note,))


def curve_part(taught: Sequence[TaughtBy]) -> PageSection:
    """Return mean and deviation of each arm under each teacher, as a table and as curves over the teacher's weights."""
    metric = taught[0].search.spec.metric
    values = {one.teacher: values_of_arms(one.search, metric) for one in taught}
    arms = list(dict.fromkeys(arm for of_teacher in values.values() for arm in of_teacher))
    rows = [
        (arm, *(written_summary(metric, summary_of(list(values[one.teacher].get(arm, {}).values()))) for one in taught))
        for arm in arms
    ]
    columns = (Column("arm"), *(Column(one.teacher, True) for one in taught))
    note = "Mean ± standard deviation over completed seeds, on held-out rows; teachers from the smallest to the largest."
    curves = {
        arm: {one.weights: list(values[one.teacher][arm].values()) for one in taught if values[one.teacher].get(arm)}
        for arm in arms
    }
    drawing = curves_chart("teachers", {arm: curve for arm, curve in curves.items() if curve}, label_of(metric))
    words = "Mean over seeds, the line one standard deviation to either side."
    charts = (Chart("Student by size of its teacher", Markup(drawing), words),)
    return PageSection("Students by teacher", Grid(columns, tuple(rows), (note,)), charts)


def change_part(taught: Sequence[TaughtBy]) -> PageSection:
    """Return the differences between the students of the largest and of the smallest teacher, in numbers."""
    metric, small, large = taught[0].search.spec.metric, by_size(taught)[0].teacher, by_size(taught)[-1].teacher
    rows = []
    for one in changes_of(taught):
        mean = "–" if one.mean is None else written_difference(metric, one.mean)
        interval = "–" if one.interval is None else written_interval(metric, one.interval)
        rows.append((one.arm, str(len(one.seeds)), mean, interval, written_p(one.p), written_p(one.p_holm), one.verdict))
    columns = (
        Column("arm"), Column("seeds", True), Column("difference", True), Column("95 % interval", True), Column("p", True),
        Column("p (Holm)", True), Column("in words"),
    )  # fmt: skip
    return PageSection(f"{large} − {small}", Grid(columns, tuple(rows)))


def teachers_part(taught: Sequence[TaughtBy]) -> PageSection:
    """Return the teachers themselves, and where each one's comparison stands."""
    rows = [
        (one.teacher, f"{one.weights:,}", written_metric("heldout_loss", one.heldout_loss), f"{one.teacher}/compare/{REPORT}")
        for one in taught
    ]
    columns = (Column("teacher"), Column("weights", True), Column("its own held-out loss (nats)", True), Column("its comparison"))
    return PageSection("Teachers", Grid(columns, tuple(rows)))


def short_number(count: float) -> str:
    """Return a number with three digits: ``158k``, ``1.17M``, ``7.62G``."""
    return EngFormatter(sep="").format_eng(float(f"{count:.3g}"))


def curves_chart(name: str, arms: Mapping[str, Mapping[int, Sequence[float]]], label: str) -> str:
    """Return an SVG with a curve for each arm: mean and one standard deviation over the teacher's weights, on a log scale."""
    sizes = sorted({size for curve in arms.values() for size in curve})
    with chart(name) as (figure, axes):
        for index, (arm, curve) in enumerate(arms.items()):
            means = [statistics.fmean(values) for values in curve.values()]
            spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in curve.values()]
            style = ("-", "--", ":")[index // len(SERIES) % 3]
            axes.errorbar(
                list(curve), means, yerr=spread, label=arm, color=SERIES[index % len(SERIES)], linestyle=style, marker="o",
                markersize=3.5, capsize=3, linewidth=1.5,
            )  # fmt: skip
        axes.set(xlabel="weights of the teacher", ylabel=label, xscale="log")
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda weights, _: short_number(weights)))
        figure.legend(loc="outside right center")
        return svg_of(figure, name)
