"""What is read from a judge's reply, and the templates of what it is asked."""

from pathlib import Path

import pytest

from actors.config.judge import JudgeConfig
from orchestrator.judging.prompts import QuestionTemplate, load_template
from orchestrator.judging.replies import Reply, Verdict, read_reply


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A is right.\nRating A: 9\nRating B: 2", Verdict(9, 2)),
        ("**Rating A:** 7/10\n**Rating B:** 6.5/10", Verdict(7, 6.5)),
        ("rating a = 3, rating b = 4", Verdict(3, 4)),
        ("Rating A: 1\nRating B: 1\nOn second thoughts:\nRating A: 10\nRating B: 8", Verdict(10, 8)),
        ("Rating A: <number>\nRating B: 7", "no verdict"),
        ("Rating A: 7", "no verdict"),
        ("Both are fine, 10 out of 10.", "no verdict"),
        ("Rating A: 11\nRating B: 7", "out of range"),
        ("Rating A: 5\nRating B: 0", "out of range"),
        ("Rating A: -3\nRating B: 7", "out of range"),
        ("I'm sorry, but I cannot rate these.", "refusal"),
        ("I cannot see a fault in either.\nRating A: 8\nRating B: 8", Verdict(8, 8)),
        (" \n", "empty reply"),
    ],
)
def test_ratings_are_read_from_the_end_of_a_reply(text: str, verdict: object) -> None:
    assert read_reply(Reply(text), "rating") == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A is longer, but wrong.\nBetter: B", Verdict(0, 1)),
        ("better:  **a**", Verdict(1, 0)),
        ("Better: A\nno,\nBetter: neither", Verdict(0.5, 0.5)),
        ("A is better than B", "no verdict"),
        ("Better answers exist.", "no verdict"),
        ("", "empty reply"),
    ],
)
def test_the_better_of_two_is_read_from_the_end_of_a_reply(text: str, verdict: object) -> None:
    assert read_reply(Reply(text), "pairwise") == verdict


def test_a_reply_that_was_cut_before_its_verdict_says_so() -> None:
    assert read_reply(Reply("Well, let us think", cut=True), "rating") == "cut at max_tokens"
    assert read_reply(Reply("", cut=True), "rating") == "cut at max_tokens"
    assert read_reply(Reply("Rating A: 2\nRating B: 3\nand", cut=True), "rating") == Verdict(2, 3)
    assert read_reply(Reply("late", failure="timeout"), "rating") == "timeout"


@pytest.mark.parametrize("protocol", ["rating", "pairwise"])
def test_the_own_templates_show_all_that_is_compared(protocol: str) -> None:
    template = load_template(JudgeConfig(model="m", protocol=protocol))
    text = template.question("{{ask}}", "<ref>", "<first>", "<second>")
    assert "{{ask}}" in text and text.index("<first>") < text.index("<second>")
    assert ("<ref>" in text) == (protocol == "pairwise")
    ends = {"rating": "Rating A: 3\nRating B: 4", "pairwise": "Better: neither"}
    assert isinstance(read_reply(Reply(ends[protocol]), protocol), Verdict)
    assert not isinstance(read_reply(Reply(template.question("", "", "", "").split("with")[0]), protocol), Verdict)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ prompt }} {{ answer_a }}", r"prompt .*own.j2 does not show answer_b; it needs {{ prompt }}, {{ answer_a }}, "),
        ("{{ prompt }} {{ answer_a }} {{ answer_b }} {{ hint }}", "asks for hint; there are prompt, answer_a, answer_b, r"),
        ("{{ prompt }\n{% if %}", "is no Jinja template: line"),
    ],
)
def test_a_template_that_cannot_serve_is_refused_in_words(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.j2"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_template(JudgeConfig(model="m", prompt=str(path)))


def test_a_template_that_is_not_there_or_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gone.j2 cannot be read .*null for the protocol's own template would do"):
        load_template(JudgeConfig(model="m", prompt=str(tmp_path / "gone.j2")))
    template = QuestionTemplate("{{ prompt }}{{ answer_a }}{{ answer_b }}{{ 1 / (prompt | length) }}", "mine")
    with pytest.raises(ValueError, match="mine cannot be filled in: division by zero"):
        template.question("", "r", "a", "b")
    reaching = QuestionTemplate("{{ prompt.__class__.__mro__ }}{{ answer_a }}{{ answer_b }}", "mine")
    with pytest.raises(ValueError, match="mine cannot be filled in: access to attribute '__class__'"):
        reaching.question("p", "r", "a", "b")
