"""Figures from verdicts, against arithmetic by hand."""

from pathlib import Path

import numpy as np
import pytest

from actors.config.judge import JudgeConfig
from actors.evaluation.answers import GeneratedAnswer
from orchestrator.judging.figures import pair_figure, rating_figure, ratio_interval
from orchestrator.judging.prompts import QuestionTemplate
from orchestrator.judging.questions import Question, QuestionMaker, identity_of
from orchestrator.judging.replies import Reply, Verdict
from orchestrator.judging.verdicts import VerdictBook

TEMPLATE = QuestionTemplate("{{ prompt }}|{{ answer_a }}|{{ answer_b }}", "the test's")


def answer(row: int, generated: str) -> GeneratedAnswer:
    return GeneratedAnswer(row, None, f"prompt {row}", f"reference {row}", generated, False, None)


def maker(model: str = "m", address: str = "http://a/v1", temperature: float = 0.0) -> QuestionMaker:
    return QuestionMaker(JudgeConfig(model=model, temperature=temperature), address, TEMPLATE)


def decided(path: Path, questions: list[Question], verdict: dict[tuple[int, str, bool], tuple[float, float]]) -> VerdictBook:
    """Write a verdict, (the model's, the other's), for each question that has one."""
    book = VerdictBook(path / "book.jsonl")
    for one in questions:
        if (pair := verdict.get((one.row, one.against, one.model_first))) is not None:
            ours, theirs = pair
            book.add(one, Verdict(ours, theirs) if one.model_first else Verdict(theirs, ours), Reply("", 3, 2))
    return book


def test_the_figure_is_the_ratio_of_sums(tmp_path: Path) -> None:
    questions = maker().ratings({"student_after": [answer(1, "x"), answer(2, "y"), answer(3, "z")]})
    assert {one.model_first for one in maker().ratings({"m": [answer(row, "x") for row in range(20)]})} == {True, False}
    ratings = {1: (2.0, 10.0), 2: (9.0, 3.0)}  # row 3 has no verdict
    both = {(row, "reference", first): pair for row, pair in ratings.items() for first in (True, False)}
    figure = rating_figure("student_after", questions, decided(tmp_path, questions, both), seed=1)
    assert (figure.rows, figure.mean, figure.reference_mean) == (2, 5.5, 6.5)
    assert figure.ratio == pytest.approx(11 / 13) != pytest.approx((0.2 + 3.0) / 2)
    assert figure.low == pytest.approx(0.2) and figure.high == pytest.approx(3.0), "rows drawn twice: (2+2)/(10+10), (9+9)/(3+3)"
    nothing = rating_figure("teacher", questions, VerdictBook(tmp_path / "none"), seed=1)
    assert (nothing.rows, nothing.ratio, nothing.low) == (0, None, None)


def test_the_interval_is_drawn_by_its_seed_and_has_the_width_of_theory() -> None:
    generator = np.random.default_rng(0)
    pairs = np.stack([generator.normal(6, 1, 400), generator.normal(8, 1, 400)], axis=1)
    assert ratio_interval(pairs, 3) == ratio_interval(pairs, 3) != ratio_interval(pairs, 4)
    low, high = ratio_interval(pairs, 3)
    ratio = pairs[:, 0].sum() / pairs[:, 1].sum()
    deviation = np.std(pairs[:, 0] - ratio * pairs[:, 1]) / pairs[:, 1].mean() / 20  # the delta method
    assert (low, high) == pytest.approx((ratio - 1.96 * deviation, ratio + 1.96 * deviation), abs=0.15 * deviation * 2)


def test_a_win_counts_if_both_orders_agree(tmp_path: Path) -> None:
    rows = range(1, 8)
    answers = {
        "student_after": [answer(row, f"after {row}" if row < 7 else "same") for row in rows],
        "teacher": [answer(row, f"teacher {row}" if row < 7 else "same ") for row in rows],
    }
    questions = maker().pairs(answers, "student_after", ["teacher"])
    assert [(one.row, one.model_first) for one in questions] == [(row, first) for row in range(1, 7) for first in (True, False)]
    assert questions[0].text == "prompt 1|after 1|teacher 1" and questions[1].text == "prompt 1|teacher 1|after 1"
    won, lost, even = (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)
    verdicts = {1: (won, won), 2: (lost, lost), 3: (won, lost), 4: (won, even), 5: (even, even)}  # row 6 lacks an order
    given = {(row, "teacher", first): two[0 if first else 1] for row, two in verdicts.items() for first in (True, False)}
    book = decided(tmp_path, questions, given | {(6, "teacher", True): won})
    figure = pair_figure(answers, "student_after", "teacher", questions, book)
    assert (figure.rows, figure.same_text) == (6, 1)
    assert (figure.win, figure.tie, figure.loss) == pytest.approx((1 / 6, 4 / 6, 1 / 6))
    assert figure.disagree == pytest.approx(2 / 5), "of the rows that were asked about, both orders"
    alone = {"student_after": answers["student_after"], "teacher": []}
    assert pair_figure(alone, "student_after", "teacher", [], book).win is None


def test_a_question_is_known_by_all_that_a_verdict_depends_on() -> None:
    answers = {"student_after": [answer(1, "x")]}
    kinds = [
        maker(), maker(model="n"), maker(address="http://b/v1"), maker(temperature=0.5),
        QuestionMaker(JudgeConfig(model="m", protocol="pairwise"), "http://a/v1", TEMPLATE),
        QuestionMaker(JudgeConfig(model="m"), "http://a/v1", QuestionTemplate("{{prompt}}{{answer_a}}{{answer_b}}", "other")),
    ]  # fmt: skip
    keys = [one.ratings(answers)[0].key for one in kinds] + [maker().ratings({"s": [answer(1, "y")]})[0].key]
    assert len(set(keys)) == 7
    same = maker().ratings({"teacher": [answer(1, "x")], "student_after": [answer(1, "x")]})
    assert same[0].key == same[1].key == keys[0], "the same answer of two models is one question"
    assert identity_of(same) == identity_of(same[::-1]) != identity_of(same[:1])


def test_a_torn_last_line_is_taken_away_and_another_damaged_line_named(tmp_path: Path) -> None:
    questions = maker().ratings({"student_after": [answer(1, "x"), answer(2, "y")]})
    path = tmp_path / "deep" / "book.jsonl"
    VerdictBook(path).add(questions[0], Verdict(3, 4), Reply("é", 5, 6))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    book = VerdictBook(path)
    assert path.read_bytes() == whole and book.get(questions[1]) is None
    book.add(questions[1], Verdict(5, 6), Reply("r"))
    found = VerdictBook(path).get(questions[0])
    assert found is not None and (found.verdict, found.tokens_in, found.tokens_out) == (Verdict(3, 4), 5, 6)
    assert VerdictBook(path).get(questions[1]) is not None
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(ValueError, match=r"book.jsonl: line 1 is no verdict; delete the line, and the judge is asked again"):
        VerdictBook(path)
