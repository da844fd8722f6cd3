"""The parts of a page that only a comparison has: arms, their differences to the baseline in numbers and words, mean curves."""

from collections.abc import Mapping

from markupsafe import Markup

from orchestrator.reports.page import Chart, Column, Grid, Headline, PageSection
from orchestrator.reports.search_charts import Trace, arms_chart, differences_chart, trace_chart
from orchestrator.search.analysis import difference_curves, mean_curves, values_of_arms
from orchestrator.search.ledger import Search
from orchestrator.search.results import label_of, metrics_of, show_of, task_metrics_of, written_metric
from orchestrator.search.statistics import PairedDifference, Summary, compare_arms, summary_of


def compare_headline(search: Search) -> Headline:
    """Return what can be said of each arm, in words."""
    heading = "What can be said"
    if search.spec.baseline is None:
        return Headline(heading, ("No baseline was named: arms are shown side by side, and no difference is tested.",))
    comparisons = comparisons_of(search)
    if not comparisons:
        return Headline(heading, (f"There is nothing to compare to {search.spec.baseline} yet.",))
    arms = "1 arm" if len(comparisons) == 1 else f"{len(comparisons)} arms"
    note = (
        f"By {label_of(search.spec.metric)}, seed by seed. Better and worse are what a paired t test tells apart at the 5 % "
        f"level, corrected by Holm for {arms}. Not distinguishable is not equal: more seeds may tell them apart."
    )
    return Headline(heading, tuple(sentence_of(search, comparison) for comparison in comparisons), (note,))


def sentence_of(search: Search, comparison: PairedDifference) -> str:
    """Return the result of one arm in words."""
    metric, few = search.spec.metric, "; ".join(comparison.notes)
    words = f"{comparison.arm} is {comparison.verdict} {_preposition(comparison)} {search.spec.baseline}"
    if comparison.mean is not None:
        words += f": {written_difference(metric, comparison.mean)}"
    if comparison.interval is not None:
        words += f", 95 % interval {written_interval(metric, comparison.interval)}, {len(comparison.seeds)} seeds"
    return f"{words} ({few})." if few else f"{words}."


def compare_parts(search: Search) -> list[PageSection]:
    """Return the parts of the page between the words and the table of all trials."""
    values = {arm: list(of_arm.values()) for arm, of_arm in values_of_arms(search, search.spec.metric).items() if of_arm}
    label, sign = label_of(search.spec.metric), 1 if search.spec.mode == "min" else -1
    best_first = dict(sorted(values.items(), key=lambda item: sign * sum(item[1]) / len(item[1])))
    charts = []
    if best_first:
        drawing = arms_chart("arms", best_first, search.spec.baseline, label)
        note = "Every seed is a dot, the diamond their mean, the line one standard deviation to either side."
        charts.append(Chart("Mean and deviation", Markup(drawing), note))
    comparisons = comparisons_of(search)
    return [
        PageSection("Arms", arms_grid(search, list(best_first)), tuple(charts)),
        *([differences_part(search, comparisons)] if comparisons else []),
        *([tasks_part(search, list(best_first), tasks)] if (tasks := task_metrics_of(search)) else []),
        *([PageSection("Learning", charts=curves)] if (curves := learning_charts(search)) else []),
    ]


def comparisons_of(search: Search) -> tuple[PairedDifference, ...]:
    """Return each arm against the baseline, by the metric of the comparison; none while the baseline has not begun."""
    values, baseline = values_of_arms(search, search.spec.metric), search.spec.baseline
    return compare_arms(values, baseline, search.spec.mode) if baseline in values and baseline is not None else ()


def arms_grid(search: Search, best_first: list[str]) -> Grid:
    """Return mean and standard deviation of each metric by arm, best first, arms without a completed trial last."""
    by_metric = {metric: values_of_arms(search, metric) for metric in metrics_of(search)}
    arms = dict.fromkeys([*best_first, *by_metric[search.spec.metric]])
    rows = []
    for arm in arms:
        summaries = {metric: summary_of(list(values[arm].values())) for metric, values in by_metric.items()}
        cells = [written_summary(metric, summary) for metric, summary in summaries.items()]
        name = f"{arm} (baseline)" if arm == search.spec.baseline else arm
        rows.append((name, str(summaries[search.spec.metric].count), *cells))
    columns = (Column("arm"), Column("seeds", True), *(Column(label_of(metric), True) for metric in by_metric))
    note = "Mean ± standard deviation over completed seeds, on held-out rows. Training losses of different kinds differ in scale."
    return Grid(columns, tuple(rows), (note,))


def differences_part(search: Search, comparisons: tuple[PairedDifference, ...]) -> PageSection:
    """Return the paired differences to the baseline: numbers, words, and a picture."""
    metric, baseline = search.spec.metric, search.spec.baseline
    rows = []
    for one in comparisons:
        mean = "–" if one.mean is None else written_difference(metric, one.mean)
        interval = "–" if one.interval is None else written_interval(metric, one.interval)
        p_values = [written_p(one.p), written_p(one.p_holm)]
        rows.append((one.arm, str(len(one.seeds)), mean, interval, *p_values, one.verdict, "; ".join(one.notes)))
    columns = (
        Column("arm"), Column("seeds", True), Column("difference", True), Column("95 % interval", True), Column("p", True),
        Column("p (Holm)", True), Column("in words"), Column(""),
    )  # fmt: skip
    note = (
        f"Arm − {baseline}, {label_of(metric)}, over the seeds that both completed. The interval (Student's t) is of one arm "
        "alone; the words go by p after Holm's correction, so an interval may leave 0 out where they say not distinguishable."
    )
    shown = {one.arm: one for one in comparisons if one.mean is not None}
    charts = []
    if shown:
        drawing = differences_chart(
            "differences", {arm: one.mean for arm, one in shown.items() if one.mean is not None},
            {arm: one.interval for arm, one in shown.items()},
            {arm: one.verdict != "not distinguishable" for arm, one in shown.items()},
            f"arm − {baseline}", search.spec.mode,
        )  # fmt: skip
        words = "Mean and 95 % interval, coloured where the words are better or worse; a mean without a line has no interval."
        charts.append(Chart("Paired differences", Markup(drawing), words))
    return PageSection(f"Differences to {baseline}", Grid(columns, tuple(rows), (note,)), tuple(charts))


def tasks_part(search: Search, best_first: list[str], tasks: Mapping[str, str]) -> PageSection:
    """Return what was measured of the answers to each kind of task, by arm, best first.

    Args:
        search: a comparison.
        best_first: the arms that have completed trials.
        tasks: for each kind of task the name of its metric.
    """
    by_task = {metric: values_of_arms(search, metric) for metric in tasks.values()}
    rows = [
        (arm, *(written_summary(metric, summary_of(list(values[arm].values()))) for metric, values in by_task.items()))
        for arm in best_first
    ]
    columns = (Column("arm"), *(Column(task, True) for task in tasks))
    note = f"{label_of(next(iter(tasks.values())).partition('.')[0])}, mean ± standard deviation over completed seeds."
    return PageSection("Answers by kind of task", Grid(columns, tuple(rows), (note,)))


def learning_charts(search: Search) -> tuple[Chart, ...]:
    """Return mean learning curves by arm, and their differences to the baseline, which those would hide."""
    label, baseline, charts = label_of(search.spec.metric), search.spec.baseline, []
    means = mean_curves(search)
    if traces := _traces(means):
        drawing = trace_chart("curves", traces, "step", label)
        charts.append(Chart("Mean by arm", Markup(drawing), "Over completed seeds, measured at each rung."))
    if baseline is not None and (differences := difference_curves(search, baseline)):
        # The baseline has its line too, so that each arm keeps the colour it has in the chart beside it.
        lines = {arm: [(step, 0.0) for step, _ in means[arm]] if arm == baseline else differences.get(arm, []) for arm in means}
        drawing = trace_chart("curve-differences", _traces(lines), "step", "difference to the baseline")
        note = f"Arm − {baseline}, {label}, mean over the seeds that both completed."
        charts.append(Chart("Difference by arm", Markup(drawing), note))
    return tuple(charts)


def written_summary(metric: str, summary: Summary) -> str:
    """Return mean ± standard deviation as it stands in tables."""
    if summary.mean is None or summary.deviation is None:
        return written_metric(metric, summary.mean)
    if show_of(metric) == "share":
        return f"{100 * summary.mean:.2f} ± {100 * summary.deviation:.2f} %"
    return f"{written_metric(metric, summary.mean)} ± {written_metric(metric, summary.deviation)}"


def written_difference(metric: str, difference: float) -> str:
    """Return a difference with its sign; of shares in percentage points."""
    return f"{100 * difference:+.2f} points" if show_of(metric) == "share" else f"{difference:+.4f}"


def written_interval(metric: str, interval: tuple[float, float]) -> str:
    """Return an interval as it stands in tables."""
    low, high = (written_difference(metric, end).removesuffix(" points") for end in interval)
    return f"[{low}, {high}]"


def written_p(p: float | None) -> str:
    """Return a p-value as it stands in tables."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _preposition(comparison: PairedDifference) -> str:
    return "from" if comparison.verdict == "not distinguishable" else "than"


def _traces(curves: dict[str, list[tuple[int, float]]]) -> list[Trace]:
    return [Trace(arm, [step for step, _ in curve], [value for _, value in curve]) for arm, curve in curves.items() if curve]
