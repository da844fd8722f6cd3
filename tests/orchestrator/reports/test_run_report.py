"""The report page: what it shows, that it needs nothing else, that texts stay texts, and that a browser can draw it."""

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.reports.page import read_json_lines
from orchestrator.reports.run_charts import curve_of, sampled_uncertainties, shares_charts, uncertainty_histogram
from orchestrator.reports.run_report import StageTime, finding, spread_over_tasks, stage_times, write_report
from orchestrator.reports.svg import INK, MOST_POINTS, SERIES, Curve, histogram_chart, line_chart
from orchestrator.run.results_table import TableRow, read_table, write_table
from tests.orchestrator.pages import EVIL, TARGET_PROBABILITIES, Page, bare_run, require_closed, whole_run, write_store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_page_shows_the_whole_run(tmp_path: Path) -> None:
    path = write_report(whole_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    page = Page(path.read_text())
    assert page.elements.count("svg") == 9  # loss and rate of two trainings, terms, shares, border, uncertainty and its places
    assert page.elements.count("figure") == 9
    for words in (
        "my-run", "teacher 2 layers of width 64", "held-out loss (nats per target)", "Loss, fine-tuning the teacher",
        "Learning rate, distillation", "Terms of the loss", "Easy and hard",
        "Border between easy and hard", "Uncertainty of the teacher", "7 training targets; median 0.4",
        "Where the teacher is uncertain", "Texts, token by token", "task1 (3)", "begun 2 times",
        "75.0 s", "1,234", "(nothing)", "easy_ratio: 0.5", "Held-out loss: 0.5000 before, 0.5000 after, as before",
        "Exact match of 6 answers: ",
        "0123456789ab, files changed since", "2 × 16 CPUs, 1 GPUs (H100); 1 node, 4 CPUs", "A Processor, 2 CPUs, 8 GiB",
        "finished train", "3.11.9", "atkd run a.yaml",
    ):  # fmt: skip
        assert words in page.text, words


def test_the_page_shows_rouge_l_by_task_where_that_is_asked_for(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    assert "Exact match by task" in (page := write_report(run).read_text()) and "Rouge-L by task" not in page
    table = read_table(run)
    rows = tuple(replace(row, show="score") for row in table.tasks)
    write_table(run, replace(table, tasks=(), tasks_by_rouge_l=rows))
    assert "Rouge-L by task" in (page := write_report(run).read_text()) and "Exact match by task" not in page
    assert "task0 (3)" in page and "1.000" in page


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    require_closed(write_report(whole_run(tmp_path / "run")).read_text())


def test_texts_stay_texts(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("name: my-run", f"name: {json.dumps(EVIL)}"))
    content = write_report(run).read_text()
    require_closed(content)
    assert "<script" not in content
    page = Page(content)
    assert page.text.count("</pre><script>x()") == 1, "a template in the configuration"
    assert page.text.count(f"ask {EVIL}") == 6 + 1, "six prompts and one text"
    assert page.text.count(f"ask {EVIL} well") == 1, "pieces of tokens are the text again"
    assert f"Linux {EVIL}" in page.text and f"'x={EVIL}'" in page.text, "environment and command"
    assert page.text.lstrip().startswith(f"{EVIL} · report"), "the title, though it has the name of the run"
    assert [title for title in page.having("span", "title") if f"‘{EVIL.replace(' ', '␣')}’" in title]


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    page = Page(write_report(bare_run(tmp_path / "run")).read_text())
    assert "my-run" in page.text and "easy_ratio" in page.text
    assert not {"svg", "table", "dl"} & set(page.elements)


def test_a_store_that_is_gone_is_left_out(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    shutil.rmtree(run / "store")
    assert "Uncertainty of the teacher" not in Page(write_report(run).read_text()).text


def test_uncertainty_is_counted_in_bins_from_zero_to_one(tmp_path: Path) -> None:
    values = sampled_uncertainties(write_store(tmp_path / "store"))
    assert np.allclose(values, 1 - np.array(TARGET_PROBABILITIES), atol=1e-6)
    counts, edges = uncertainty_histogram(values, bins=10)
    assert counts.tolist() == [3, 0, 0, 0, 1, 1, 0, 0, 1, 1]
    assert edges[0] == 0.0 and edges[-1] == 1.0
    assert uncertainty_histogram(np.array([1.0 + 1e-7]))[0][-1] == 1


def test_a_large_store_is_sampled_and_a_growing_one_read_as_far_as_it_is(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    assert len(sampled_uncertainties(store, most_targets=4)) == 4
    store.discard_shard(0)
    assert np.allclose(sampled_uncertainties(store), 1 - np.array(TARGET_PROBABILITIES[4:]), atol=1e-6)


def test_a_curve_leaves_out_what_is_not_a_number() -> None:
    steps = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": math.nan}, {"step": 3}, {"step": 4, "loss": 1.0}]
    assert curve_of(steps, "loss", "it") == Curve("it", [1, 4], [3.0, 1.0])
    assert curve_of(steps, "rate", "it") is None


def test_answers_come_from_as_many_tasks_as_possible() -> None:
    assert spread_over_tasks({1: "a", 2: "a", 3: "b", 4: "a", 5: None, 6: "b"}) == [1, 3, 5, 2, 6, 4]


def test_a_stage_shows_its_last_time_and_its_rate() -> None:
    events = [
        {"event": "stage_started", "stage": "score"},
        {"event": "shard_scored", "split": "train"},
        {"event": "stage_finished", "stage": "score", "seconds": 9.96, "tokens_per_second": 12.0},
    ]
    assert [asdict(stage) for stage in stage_times(events)] == [asdict(StageTime("score", 9.96, 1, 12.0))]
    assert StageTime("score", 9.96, 1, 12.0).duration == "10.0 s"


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read_json_lines(tmp_path / "log.jsonl") == [{"a": 1}, {"a": 2}]
    assert read_json_lines(tmp_path / "none.jsonl") == []


def test_drawings_take_the_colours_of_the_page() -> None:
    drawing = line_chart("one", [Curve("a", [1, 2], [3, 4]), Curve("b", [1, 2], [4, 3])], "step", "loss")
    assert "var(--series-1)" in drawing and "var(--series-2)" in drawing and "currentColor" in drawing
    assert not any(colour in drawing for colour in (INK, *SERIES))
    assert not re.search(r"(fill|stroke): ?(#000000|black|#ffffff|white)", drawing)


def test_a_drawing_writes_labels_as_text() -> None:
    drawing = line_chart("one", [Curve("a <b> $x", [1, 2], [3, 4]), Curve("c", [1], [2])], "step", "loss (nats)")
    assert "a &lt;b&gt; $x" in drawing and ">loss (nats)<" in drawing


def test_a_drawing_is_the_same_every_time() -> None:
    chart = [histogram_chart("h", np.linspace(0, 1, 4), np.array([1, 5, 2]), "UNC", "%", 0.4, ("easy", "hard")) for _ in "ab"]
    assert chart[0] == chart[1]
    assert ">easy<" in chart[0] and ">hard<" in chart[0]


def test_a_long_curve_is_thinned() -> None:
    steps = list(range(50_000))
    drawing = line_chart("long", [Curve("a", steps, np.sin(steps).tolist())], "step", "loss")
    assert len(drawing) < 60 * MOST_POINTS


def test_shares_are_of_tokens_and_of_the_loss() -> None:
    first, last = {"loss": 4.0, "easy_share": 0.5, "easy_loss": 1.0}, {"loss": 0.0, "easy_share": 0.25, "easy_loss": 0.0}
    steps = [{"step": 1, **first}, {"step": 2, **last}]
    (chart,) = shares_charts(steps)
    assert "easy tokens, of all tokens" in chart.svg and "easy tokens' loss, of the loss" in chart.svg
    (older,) = shares_charts([{"step": 1, "loss": 4.0, "easy_share": 0.5}])
    assert "of the loss" not in older.svg, "a run of an older version has no such number"
    assert shares_charts([{"step": 1, "loss": 4.0}]) == []
    (_, border) = shares_charts([{"step": 1, "loss": 4.0, "easy_share": 0.5, "easy_border": 0.2}])
    assert border.heading == "Border between easy and hard"


@pytest.mark.parametrize(
    ("metric", "values", "less_is_better", "words"),
    [
        ("heldout_loss", (0.4, 0.8, 0.3), True, "It: 0.8000 before, 0.3000 after, beyond the teacher's 0.4000."),
        ("heldout_loss", (0.4, 0.8, 0.5), True, "It: 0.8000 before, 0.5000 after, 75 % of the way to the teacher's 0.4000."),
        ("heldout_loss", (0.4, 0.8, 0.9), True, "It: 0.8000 before, 0.9000 after, worse than before; the teacher has 0.4000."),
        ("heldout_loss", (0.9, 0.8, 0.7), True, "It: 0.8000 before, 0.7000 after; the teacher has 0.9000."),
        ("kl_to_teacher", (0.0, 0.8, 0.2), True, "It: 0.8000 before, 0.2000 after, 75 % less."),
        ("kl_to_teacher", (0.0, 0.2, 0.8), True, "It: 0.2000 before, 0.8000 after, worse than before."),
        ("exact_match", (0.5, 0.0, 0.25), False, "It: 0.0000 before, 0.2500 after, 50 % of the way to the teacher's 0.5000."),
        ("exact_match", (0.5, 0.1, 0.1), False, "It: 0.1000 before, 0.1000 after, as before; the teacher has 0.5000."),
    ],
)  # fmt: skip
def test_a_finding_says_how_far_the_student_came(
    metric: str, values: tuple[float, ...], less_is_better: bool, words: str
) -> None:
    assert finding(TableRow(metric, metric, "nats", values), "It", less_is_better) == words


PROBE = """<script>
const token = document.querySelectorAll('.token')[0], seen = {}, style = element => getComputedStyle(element);
for (const input of document.querySelectorAll('.reading input')) {
  input.click();
  const lists = [...document.querySelectorAll('.highlights')].filter(list => style(list).display !== 'none');
  seen[input.value] = [style(token).backgroundColor, lists.map(list => list.className.split('of-')[1])];
}
const found = {seen, ink: style(token).color, paper: style(document.body).backgroundColor,
  width: document.documentElement.scrollWidth, window: window.innerWidth};
document.body.insertAdjacentHTML('beforeend', '<pre id="found"></pre>');
document.getElementById('found').textContent = 'FOUND' + JSON.stringify(found) + 'END';
</script>"""
"""Clicks through a copy of the page and writes down what the browser makes of it."""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_the_page(tmp_path: Path, dark: bool) -> None:
    path = write_report(whole_run(tmp_path / "run"))
    path.write_text(path.read_text().replace("</body>", PROBE + "</body>"))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0",
        "--window-size=500,900", f"--blink-settings=preferredColorScheme={int(not dark)}",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    page = Page(done.stdout)
    assert page.elements.count("svg") == 9 and page.elements.count("path") > 20
    assert page.text.count(f"ask {EVIL}") == 7, "six prompts and a text"
    assert "my-run · report" in page.text, "the title is the one that was written"
    assert "CONSOLE" not in done.stderr, "the page has no complaint"

    found = json.loads(page.text.rsplit("FOUND", 1)[1].split("END")[0])
    paper, ink = (channels(found[name])[0] for name in ("paper", "ink"))
    assert (sum(paper) < 3 * 64) == dark and (sum(ink) > 3 * 192) == dark
    assert found["width"] <= found["window"], "nothing hangs out of a narrow window"
    assert {key: lists for key, (_, lists) in found["seen"].items()} == {key: [key] for key in ("uncertainty", "before", "after")}
    opacities = {key: channels(colour)[1] for key, (colour, _) in found["seen"].items()}
    most = opacities["before"]  # its shade is 1.00
    assert opacities == pytest.approx({"uncertainty": 0.9 * most, "before": most, "after": 0.1 * most}, abs=0.01) and most > 0.5


def channels(colour: str) -> tuple[list[float], float]:
    """Red, green and blue from 0 to 255, and opacity, of a colour as browsers write it."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", colour)]
    return numbers[:3], numbers[3] if len(numbers) > 3 else 1.0
