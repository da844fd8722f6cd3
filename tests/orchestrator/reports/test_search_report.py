"""The page of a search and of a comparison: what it says, that it needs nothing else, that texts stay texts."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from orchestrator.config.load import apply_override
from orchestrator.reports.search_charts import Trace, frontier, trace_chart
from orchestrator.reports.search_report import read_cost, write_search_report
from orchestrator.reports.setting_charts import heat_map, parallel_chart, short_names
from orchestrator.reports.tune_report import overrides_of
from orchestrator.search.analysis import (
    Axis,
    at_the_end,
    where_all_were,
)
from orchestrator.search.ledger import Ledger, Search, read_ledger
from tests.orchestrator.searches import (
    EVIL,
    begin,
    compared,
    fail_trial,
    measures,
    run_trial,
    surface,
    tuned_at_random,
    tuned_on_a_grid,
)


class Page(HTMLParser):
    """Collects what a page refers to, its elements, and its text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.elements: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.text += data


def content_of(ledger: Ledger) -> str:
    path = write_search_report(ledger.path.parent)
    assert path == ledger.path.with_name("report.html")
    return path.read_text()


def require_closed(content: str) -> None:
    """Nothing is fetched, no script, every reference has its target, no id stands twice."""
    page = Page(content)
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids), "no two drawings share an id"
    assert not {"script", "link", "iframe", "img", "image", "object", "embed"} & set(page.elements)
    addresses = set(re.findall(r"https?://[^\"'<\s)]+", content))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names of namespaces, never fetched"
    assert not re.search(r"url\((?!#)|@import", content)


def search_of(ledger: Ledger) -> Search:
    return read_ledger(ledger.path)


def test_the_page_of_a_grid_search(tmp_path: Path) -> None:
    ledger = tuned_on_a_grid(tmp_path)
    cost = {"teacher_tokens_scored": 812000, "dataset_tokens": 812000, "scoring_seconds": 40.2}
    (tmp_path / "cost.json").write_text(json.dumps(cost))
    content = content_of(ledger)
    require_closed(content)
    page, best = Page(content), measures(surface(0.5, 0.4), 500)["heldout_loss"]
    assert page.elements.count("svg") == page.elements.count("figure") == 3  # plane, parallel axes, learning curves
    for words in (
        "tiny_cpu", "search by held-out loss (nats per target), less is better", "25 trials: 23 completed, 2 failed",
        f"Trial 12 of tiny_cpu, the best of 23 completed: held-out loss (nats per target) {best:.4f} after 500 steps.",
        "loss.easy_ratio=0.5 loss.easy_weight=0.4", "Second is trial", "loss.easy_ratio and loss.easy_weight, after 500 steps",
        "|Spearman|", "Learning curves by trial", "812,000 (1.00 × the data set)", "40.2 s", "11,520,000 (14.19 × the data set)",
        "15.8 min", "Trial 3: loss.easy_ratio=0.1, loss.easy_weight=0.6",
    ):  # fmt: skip
        assert words in page.text, words


def test_students_of_several_sizes_are_told_apart(tmp_path: Path) -> None:
    ledger = begin(tmp_path)
    for number, size in enumerate((17_731, 9_123, None)):
        run_trial(ledger, number, {"student.model.width": 16 - number}, 2.0 + number, parameters=size)
    rows = [part for part in content_of(ledger).split("<tr>") if part.startswith("<td") and "completed" in part]
    assert "parameters" in Page(content_of(ledger)).text
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row)[:3] for row in rows]
    assert cells == [["0", "16", "17,731"], ["1", "15", "9,123"], ["2", "14", "–"]]
    page = Page(content_of(ledger))
    assert "What a larger student brings" in page.text and "2 completed trials. The line joins" in page.text
    require_closed(content_of(ledger))
    assert "What a larger student brings" not in content_of(tuned_on_a_grid(tmp_path / "one size"))


def test_no_smaller_student_is_as_good_as_one_on_the_line() -> None:
    trials = [(10, 3.0), (10, 2.5), (20, 2.5), (30, 2.0), (40, 2.2)]
    assert frontier(trials, "min") == [(10, 2.5), (30, 2.0)]
    assert frontier(trials, "max") == [(10, 3.0)]


def test_texts_stay_texts(tmp_path: Path) -> None:
    for folder, ledger in (("a", tuned_on_a_grid(tmp_path / "a")), ("b", begin(tmp_path / "b", kind="compare", baseline=EVIL))):
        if folder == "b":
            for number, arm in enumerate((EVIL, "<b>")):
                run_trial(ledger, number, {EVIL: EVIL}, 2.0 + number, arm=arm)
            fail_trial(ledger, 2, {}, arm=f"<i>{EVIL}")
        content = content_of(ledger)
        require_closed(content)
        assert "<script" not in content and "&lt;script&gt;document.title=" in content
        assert EVIL in Page(content).text


def test_stopped_trials_are_shown_where_all_were_still_there(tmp_path: Path) -> None:
    ledger = tuned_on_a_grid(tmp_path, stop_some=True)
    search = search_of(ledger)
    common = where_all_were(search)
    assert common is not None and (common.step, len(common.values)) == (250, 23)
    assert set(at_the_end(search).values) == {0, 6, 9, 12, 15, 18, 21, 24}
    page = Page(content_of(ledger))
    for words in (
        "loss.easy_ratio and loss.easy_weight, after 500 steps", "loss.easy_ratio and loss.easy_weight, after 250 steps",
        "23 trials, stopped ones included, all after the same number of steps.", "stopped", "the best of 8 completed",
    ):  # fmt: skip
        assert words in page.text, words


def test_a_setting_that_has_one_value_does_not_vary(tmp_path: Path) -> None:
    ledger = begin(tmp_path, trials=4)
    for number in range(4):
        point = {"train.optimizer.learning_rate": 1e-5, "loss.easy_ratio": 0.3 + number // 2, "loss.easy_weight": number % 2}
        run_trial(ledger, number, point, 1.0 + number)
    page = Page(content_of(ledger))
    assert "loss.easy_ratio and loss.easy_weight, after" in page.text and "Other settings vary too" not in page.text


def test_the_page_of_a_scattered_search(tmp_path: Path) -> None:
    content = content_of(tuned_at_random(tmp_path))
    require_closed(content)
    page = Page(content)
    assert "10 completed, 10 stopped, 1 unfinished" in page.text
    assert "Other settings vary too: each place shows its best trial." in page.text
    assert "The tokens of unfinished trials (1) are not counted." in page.text
    assert page.elements.count("svg") == 5


def test_the_page_of_a_comparison(tmp_path: Path) -> None:
    content = content_of(compared(tmp_path))
    require_closed(content)
    page = Page(content)
    assert page.elements.count("svg") == 4  # arms, differences, mean curves, their differences
    for words in (
        "comparison by held-out loss", "24 trials: 23 completed, 1 failed", "atkd is better than forward_kl: -0.0",
        "cross_entropy is worse than forward_kl: +0.1", "decoupled is not distinguishable from forward_kl",
        "corrected by Holm for 5 arms",
        "forward_kl (baseline)", "left out, not completed in both: seed 1", "p (Holm)", "Trial 9: decoupled, seed 1",
        "TrainingDiverged: loss is nan",
    ):  # fmt: skip
        assert words in page.text, words


def test_two_seeds_are_named_as_too_few(tmp_path: Path) -> None:
    page = Page(content_of(compared(tmp_path, seeds=2)))
    assert "only 2 seeds in common: too few to rely on" in page.text
    assert "only one seed in common" in page.text, "of the arm that failed once"


def test_a_comparison_by_a_share_writes_points(tmp_path: Path) -> None:
    page = Page(content_of(compared(tmp_path, metric="top1_agreement", mode="max")))
    number = r"\+0\.\d\d"
    words = rf"atkd is better than forward_kl: {number} points, 95 % interval \[{number}, {number}\], 4 seeds\."
    assert re.search(words, page.text)


def test_answers_are_shown_by_kind_of_task_and_arm(tmp_path: Path) -> None:
    """In a table of their own: with a column for each task that of all metrics would be too wide."""
    ledger = begin(tmp_path, kind="compare", space={}, trials=4, baseline="forward_kl")
    for number, (arm, seed) in enumerate((arm, seed) for seed in (0, 1) for arm in ("forward_kl", "atkd")):
        ledger.begun(number, {}, seed, arm)
        answered = {"rouge_l": 0.2, "rouge_l.dolly": 0.1 * (number + 1), "rouge_l.<b>": None}
        ledger.ended(number, "completed", 500, {**measures(2.0 + number, 500), **answered}, 10.0, 1000)
    page = Page(content_of(ledger))
    assert "Rouge-L of answers, mean ± standard deviation over completed seeds." in page.text
    for cell in ("0.200 ± 0.141", "0.300 ± 0.141"):  # 0.1 and 0.3; 0.2 and 0.4
        assert cell in page.text
    assert "b" not in page.elements and page.text.count("dolly") == 1
    assert "dolly" not in Page(content_of(compared(tmp_path / "without"))).text


def test_pages_of_what_has_hardly_begun(tmp_path: Path) -> None:
    assert "No trial has come to a measured end yet." in Page(content_of(begin(tmp_path / "a"))).text
    ledger = begin(tmp_path / "b", kind="compare", baseline="forward_kl")
    ledger.begun(0, {}, 0, "atkd")
    assert "There is nothing to compare to forward_kl yet." in Page(content_of(ledger)).text
    fail_trial(ledger, 1, {}, arm="forward_kl")
    assert "atkd is not distinguishable from forward_kl (no seed in common" in Page(content_of(ledger)).text
    without = Page(content_of(compared(tmp_path / "c", seeds=1, baseline=None)))
    assert "No baseline was named" in without.text and "Paired differences" not in without.text
    ledger = begin(tmp_path / "d")
    ledger.begin_search(search_of(ledger).spec)
    run_trial(ledger, 0, {"loss": {"kind": "atkd"}}, 2.0, rungs=2)
    page = Page(content_of(ledger))
    assert "No trial was completed; this one came furthest" in page.text and "resumed 1 ×" in page.text
    assert "It takes 8 measured trials with a setting that varies and is a number; measured so far: 1." in page.text


def test_overrides_are_what_the_command_line_reads(tmp_path: Path) -> None:
    import shlex

    point = {
        "loss.easy_ratio": 0.3, "loss": {"kind": "coupled", "rate": 1e-05}, "a.rate": 1e-05, "b": None, "c": "on", "d": True,
        "e": [1, "x y"], "f": "it's",
    }  # fmt: skip
    ledger = begin(tmp_path)
    run_trial(ledger, 0, point, 2.0)
    tree: dict[str, object] = {"loss": {"kind": "atkd", "easy_weight": 0.2}}
    for override in shlex.split(overrides_of(search_of(ledger).trials[0])):
        apply_override(tree, override)
    assert tree == {
        "loss": {"kind": "coupled", "rate": 1e-05, "easy_ratio": 0.3}, "a": {"rate": 1e-05}, "b": None, "c": "on", "d": True,
        "e": [1, "x y"], "f": "it's",
    }  # fmt: skip
    assert yaml.safe_load("1e-05") == "1e-05", "the reason for writing 1.0e-05"


def test_the_page_names_settings_whose_best_is_at_an_end(tmp_path: Path) -> None:
    one, two = {"x": {"low": 1e-4, "high": 1.0, "log": True}, "fixed": [1]}, {"y": [1, 2, 3], "flag": [True, False]}
    ledger = begin(tmp_path, space={"branches": {"one": one, "two": two}})
    points = [{"x": 1.1e-4, "fixed": 1}, {"x": 0.5, "fixed": 1}, {"y": 3, "flag": True}, {"y": 2, "flag": False}]
    for number, point in enumerate(points):
        run_trial(ledger, number, point, 2.0 + number)
    content = content_of(ledger)
    require_closed(content)
    assert "At an end of what was searched, beyond which there may be better: x." in Page(content).text


@pytest.mark.parametrize("text", ["[1]", "{", '{"dataset_tokens": "many"}'])
def test_a_damaged_cost_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "cost.json").write_text(text)
    with pytest.raises(ValueError, match=r"cost\.json holds no object of numbers, such as \{\"dataset_tokens\": 812000\}: "):
        read_cost(tmp_path / "cost.json")


def test_drawings_take_the_colours_of_the_page_and_write_labels_as_text() -> None:
    points = {(x / 10, y): x + y for x in range(3) for y in range(3)}
    drawings = [
        heat_map("heat", Axis("a <b> $x"), Axis("y"), points, "loss", "min"),
        parallel_chart("parallel", [Axis("a <b> $x"), Axis("y", log=True)], [[1, 10], [2, 1]], [3.0, 3.0], "loss", "max"),
        trace_chart("traces", [Trace("a <b> $x", [1], [2]), Trace("other", [1], [3])], "step", "loss"),
    ]
    for drawing in drawings:
        assert "currentColor" in drawing and "a &lt;b&gt; $x" in drawing
        assert not re.search(r"#0a0b0|#010203|#000000|#ffffff|<image", drawing)


def test_paths_are_shortened_where_they_stay_apart() -> None:
    assert short_names(["loss.easy_ratio", "a.rate", "b.rate"]) == ["easy_ratio", "a.rate", "b.rate"]
