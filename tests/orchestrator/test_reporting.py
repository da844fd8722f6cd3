"""The report page: what it shows, that it needs nothing else, that texts stay texts, and that a browser can draw it."""

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from actors.answers import Answer
from actors.evaluator import Evaluation, Metrics
from actors.records import Example, TeacherScores, example_key, tail_logmass
from actors.score_store import ScoreStore
from orchestrator.config_file import dump_config, validate
from orchestrator.evaluation import comparison_table, write_evaluation
from orchestrator.plots import INK, MOST_POINTS, SERIES, Curve, histogram_chart, line_chart
from orchestrator.reporting import (
    StageTime,
    curve_of,
    read_json_lines,
    sampled_uncertainties,
    spread_over_tasks,
    stage_times,
    uncertainty_histogram,
    write_report,
)
from orchestrator.table import write_table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>document.title='broken'</script> & \"more\""
TARGET_PROBABILITIES = (0.99, 0.92, 0.5, 0.2, 0.02, 0.97, 0.6)


def bare_run(folder: Path) -> Path:
    shape = {"kind": "scratch", "hidden_size": 64, "layers": 2, "heads": 2}
    config = validate(
        {
            "name": "my-run", "tokenizer": {"vocab_size": 300}, "teacher": {"model": shape, "fit": {"train": {}}},
            "student": {"model": shape},
            "data": {"format": {"kind": "instruction", "prompt": "{{ q }} </pre><script>x()</script>"}},
        }
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def whole_run(folder: Path) -> Path:
    run = bare_run(folder)
    (run / "metrics").mkdir()
    for name in ("fit_teacher", "train"):
        steps = [{"step": i, "loss": 4 / i, "learning_rate": 1e-3 / i, "hard_target": 1 / i, "tokens": 9} for i in range(1, 90)]
        (run / "metrics" / f"{name}.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    events = [
        {"time": 1.7e9, "event": "stage_started", "stage": "train"},
        {"time": 1.7e9, "event": "stage_started", "stage": "train"},
        {"time": 1.7e9 + 75, "event": "stage_finished", "stage": "train", "seconds": 75.0, "tokens_per_second": 1234.5},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"time": 1.7e9, "ev')
    store = write_store(run / "store")
    (run / "scores.json").write_text(json.dumps({"train": str(store.path)}))
    (run / "evaluation").mkdir()
    evaluations = []
    for name, generated in (("teacher", "right"), ("student_before", EVIL), ("student_after", "")):
        right = generated == "right"
        answers = tuple(Answer(row, f"task{row % 2}", f"ask {EVIL}", "right", generated, right, None) for row in range(6))
        evaluations.append(Evaluation(Metrics(0.5, 0.25, 0.75, 0.1, 1.0, None, 1000, 7, 1.0, 2.0), answers))
        write_evaluation(run / "evaluation" / f"{name}.json", evaluations[-1])
    write_table(run, comparison_table(*evaluations))
    return run


def write_store(path: Path) -> ScoreStore:
    """One row a target, two shards, of a vocabulary of three."""
    examples, scores = [], []
    for row, probability in enumerate(TARGET_PROBABILITIES):
        ids, mask = np.array([1, 0], dtype=np.int32), np.array([False, True])
        key = example_key(ids, mask)
        target, others = np.log([[probability], [(1 - probability) * 0.6]]).astype(np.float32)
        examples.append(Example(ids, mask, key, row))
        tail = tail_logmass(target, others[:, None])
        scores.append(TeacherScores(key, target, np.array([[2]], dtype=np.int32), others[:, None], tail))
    store = ScoreStore.open_or_create(path, {"top_k": 1, "vocab_size": 3}, len(examples), rows_per_shard=4)
    for shard in range(2):
        here = store.positions(shard)
        store.write_shard(shard, [examples[i] for i in here], [scores[i] for i in here])
    return store


class Page(HTMLParser):
    """Collects what a page refers to, its elements, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.elements: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_the_whole_run(tmp_path: Path) -> None:
    path = write_report(whole_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    page = Page(path.read_text())
    assert page.elements.count("svg") == 6  # loss and rate of two trainings, terms, uncertainty
    assert page.elements.count("figure") == 6
    for words in (
        "my-run", "teacher 2 layers of width 64", "held-out loss (nats per target)", "Loss, fitting the teacher",
        "Learning rate, distillation", "Terms of the loss", "Uncertainty of the teacher", "7 training targets; median 0.4",
        "task1 (3)", "begun 2 times", "1 min 15 s", "1,234", "(nothing)", "easy_ratio: 0.5",
    ):  # fmt: skip
        assert words in page.text, words


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    content = write_report(whole_run(tmp_path / "run")).read_text()
    page = Page(content)
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids), "no two drawings share an id"
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.elements)
    addresses = set(re.findall(r"https?://[^\"'<\s)]+", content))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names of namespaces, never fetched"
    assert not re.search(r"url\((?!#)|@import", content)


def test_texts_stay_texts(tmp_path: Path) -> None:
    content = write_report(whole_run(tmp_path / "run")).read_text()
    assert "<script" not in content
    assert "&lt;script&gt;document.title=" in content
    assert content.count("</pre>") == 1
    assert EVIL in Page(content).text


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
    durations = [StageTime("x", seconds, 1, None).duration for seconds in (9.96, 60.2, 3725)]
    assert durations == ["10.0 s", "1 min 00 s", "62 min 05 s"]


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


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_the_page(tmp_path: Path) -> None:
    path = write_report(whole_run(tmp_path / "run"))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    page = Page(done.stdout)
    assert page.elements.count("svg") == 6 and page.elements.count("path") > 20
    assert page.text.count("<script>document.title") == 12, "six prompts and six answers"
    assert "my-run · report" in page.text, "the title is the one that was written"
    assert "CONSOLE" not in done.stderr, "the page has no complaint"
