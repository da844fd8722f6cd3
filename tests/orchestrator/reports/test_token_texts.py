"""The coloured texts of a report: shades, numbers, what is listed, and colours that leave the text readable."""

import json
import re
from pathlib import Path

import pytest

from orchestrator.reports.run_report import write_report
from orchestrator.reports.token_texts import Reading, divergence_scale, groups_of, read_reading
from orchestrator.run.evaluation import read_evaluation
from tests.orchestrator.pages import EVIL, Page, bare_run, whole_run

PAGES = Path(__file__).parents[3] / "orchestrator" / "reports" / "pages"


def reading_of(run: Path, border: float | None = 0.5) -> Reading:
    reading = read_reading(run, border)
    assert reading is not None
    return reading


def test_every_target_has_its_shades_and_numbers(tmp_path: Path) -> None:
    reading = reading_of(whole_run(tmp_path / "run"))
    (text,) = reading.texts
    assert (text.row, text.task, text.before, text.after) == (3, EVIL, 0, 2)
    assert [span.text for span in text.spans] == ["ask ", EVIL, " well", "\n", "語", "!"], "three tokens make up a character"
    given, well, character = text.spans[1], text.spans[2], text.spans[4]
    assert given.shades == () and given.numbers == "" and not given.hard
    # The strongest shade stands for 2 nats, the largest of six divergences; a shade is the root of the share of that.
    assert well.shades == (("uncertainty", "0.90"), ("before", "1.00"), ("after", "0.10"))
    assert character.shades == (("uncertainty", "0.10"), ("before", "0.50"), ("after", "0.50"))
    assert well.hard and not character.hard
    evil = EVIL.replace(" ", "␣")
    assert well.numbers.replace("\u00a0", " ").splitlines() == [
        "‘␣well’: uncertainty 0.9",
        f"teacher: 10.0 % here, ‘{evil}’ 60.0 %",
        f"student before: 10.0 % here, ‘{evil}’ 60.0 %, KL 2 nats",
        f"student after: 10.0 % here, ‘{evil}’ 60.0 %, KL 0.02 nats",
    ]


def test_what_stands_out_is_listed_in_words(tmp_path: Path) -> None:
    (text,) = reading_of(whole_run(tmp_path / "run")).texts
    listed = {
        highlights.key: tuple(item.replace("\u00a0", " ") for item in highlights.items) for highlights in text.highlights
    }  # fmt: skip
    evil = EVIL.replace(" ", "␣")
    assert listed["uncertainty"] == (
        f"‘␣well’ 0.90 (teacher: ‘{evil}’ 60.0 %)", "‘!’ 0.30 (teacher: ‘↵’ 70.0 %)", "‘語’ 0.10 (teacher: ‘語’ 90.0 %)"
    )  # fmt: skip
    assert [item.split()[0] for item in listed["before"]] == ["‘␣well’", "‘語’", "‘!’"]
    assert listed["after"][0] == "‘語’ 0.5 (student: ‘語’ 90.0 %; teacher: ‘語’ 90.0 %)"


def test_the_page_can_be_switched_without_a_script(tmp_path: Path) -> None:
    content = write_report(whole_run(tmp_path / "run")).read_text()
    page = Page(content)
    assert page.having("input", "value") == ["uncertainty", "before", "after"]
    assert len(page.having("input", "checked")) == 1
    assert set(page.having("label", "for")) == set(page.having("input", "id"))
    assert page.having("span", "style")[-3:] == [
        "--uncertainty:0.90;--before:1.00;--after:0.10;", "--uncertainty:0.10;--before:0.50;--after:0.50;",
        "--uncertainty:0.30;--before:0.35;--after:0.00;",
    ]  # fmt: skip
    for key in ("uncertainty", "before", "after"):
        assert re.search(rf"#by-{key}:checked ~ article \.token, .* {{ background: rgb\(.*var\(--{key}, 0\)", content)
    assert "Underlined targets are hard: their uncertainty is above 0.4" in " ".join(page.text.split())
    assert "(2 tokens after)" in page.text and "tokens before)" not in page.text


def test_runs_of_older_versions_have_no_texts(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    for path in (run / "evaluation").iterdir():
        content = json.loads(path.read_text())
        del content["views"]
        path.write_text(json.dumps(content))
        assert read_evaluation(path).views == ()
    assert read_reading(run, None) is None
    assert "Texts, token by token" not in Page(write_report(run).read_text()).text
    assert read_reading(bare_run(tmp_path / "bare"), None) is None


def test_a_model_that_read_other_tokens_is_left_out(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    path = run / "evaluation" / "student_before.json"
    content = json.loads(path.read_text())
    content["views"][0]["pieces"][0] = "other"
    path.write_text(json.dumps(content))
    (text,) = reading_of(run, border=None).texts
    assert [highlights.key for highlights in text.highlights] == ["uncertainty", "after"]
    assert "student before" not in text.spans[2].numbers and not text.spans[2].hard


def test_the_scale_of_divergences_is_round_and_holds_almost_all() -> None:
    assert divergence_scale([]) == 0.05
    assert divergence_scale([{"divergence": [1e-9, 0.0]}]) == 0.05, "rounding is not disagreement"
    assert divergence_scale([{"divergence": [0.3]}, {"divergence": [0.2]}]) == pytest.approx(0.3)
    assert divergence_scale([{"divergence": [0.2]}]) == pytest.approx(0.2)
    assert divergence_scale([{"divergence": [0.9] * 99 + [70.0]}]) == 1.0
    assert divergence_scale([{"divergence": [4.0]}]) == 5.0


def test_tokens_of_one_character_are_shown_together() -> None:
    assert list(groups_of(["a", "", "", "b", "c", ""])) == [(0, 1), (1, 4), (4, 5), (5, 6)]
    assert list(groups_of([])) == []


def test_control_characters_are_pictures(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    for path in (run / "evaluation").iterdir():
        path.write_text(path.read_text().replace('" well"', '"\\u0000\\u001b\\tx"'))
    (text,) = reading_of(run).texts
    assert text.spans[2].text == "␀␛\tx"
    assert text.spans[2].numbers.startswith("‘␀␛⇥x’")


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance, WCAG 2.2."""
    linear = [part / 255 / 12.92 if part / 255 <= 0.04045 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Contrast ratio, WCAG 2.2."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def declared(css: str, name: str, dark: bool) -> str:
    """The value of a custom property on light or on dark pages: its first or its last declaration."""
    return re.findall(rf"--{name}: ([^;]+);", css)[-1 if dark else 0]


def rgb(value: str) -> tuple[float, ...]:
    if value.startswith("#"):
        return tuple(int(value[place : place + 2], 16) for place in (1, 3, 5))
    return tuple(float(part) for part in value.split())


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("hue", ["unsure", "apart"])
def test_text_is_readable_on_every_shade(hue: str, dark: bool) -> None:
    page, texts = (PAGES / "style.css.j2").read_text(), (PAGES / "texts.css.j2").read_text()
    paper, ink, faint = (rgb(declared(page, name, dark)) for name in ("paper", "ink", "faint"))
    colour, most = rgb(declared(texts, hue, dark)), float(declared(texts, "most", dark))
    strongest = tuple(most * ours + (1 - most) * below for ours, below in zip(colour, paper, strict=True))
    assert contrast(ink, strongest) >= 4.5
    assert contrast(faint, paper) >= 4.5
    assert contrast(strongest, paper) >= 1.5, "the strongest shade can be told from none"
