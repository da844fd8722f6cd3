"""Exact match and Rouge-L of generated answers."""

import json
from pathlib import Path

import pytest

from actors.evaluation.answers import AnswerComparison, HeldoutText, read_heldout_texts, shortened


def text(response: str, row: int = 7) -> HeldoutText:
    return HeldoutText(row, "add", "What is 3 plus 4?", response)


def test_the_whole_text_is_the_answer_without_a_pattern() -> None:
    comparison = AnswerComparison(None)
    assert comparison.compare(text("The sum is 7."), " The sum is 7.\n").correct
    assert not comparison.compare(text("The sum is 7."), "The sum is 8.").correct


def test_the_last_match_of_the_pattern_counts_on_both_sides() -> None:
    comparison = AnswerComparison(r"#### (-?\d+)")
    assert comparison.answer("#### 3, no: #### -4 apples") == "-4"
    assert comparison.compare(text("3 + 4 = 7\n#### 7"), "I think #### 6, or rather #### 7").correct
    assert not comparison.compare(text("#### 7"), "#### 7 is wrong, #### 8").correct


def test_a_generated_text_without_an_answer_is_wrong() -> None:
    comparison = AnswerComparison(r"#### (\d+)")
    assert not comparison.compare(text("#### 7"), "7").correct
    assert AnswerComparison("(a)?b").answer("b") is None


def test_a_reference_without_an_answer_is_refused_by_its_row() -> None:
    comparison = AnswerComparison(r"#### (\d+)")
    comparison.require_answers([text("#### 7")])
    with pytest.raises(ValueError, match=r"row 12: evaluate.answer_pattern .* finds no answer in its response 'seven'"):
        comparison.require_answers([text("#### 7"), text("seven", row=12)])


def test_rouge_l_of_a_worked_example() -> None:
    """The longest common subsequence of `the cat sat on the mat` and `the cat lay on a mat` has 4 words of 6 and 6."""
    answer = AnswerComparison(None).compare(text("the cat sat on the mat"), "the cat lay on a mat")
    assert answer.rouge_l == pytest.approx(4 / 6)


def test_rouge_l_is_not_defined_for_scripts_it_cannot_split() -> None:
    assert AnswerComparison(None).compare(text("七"), "七").rouge_l is None


def write_texts(path: Path, rows: list[int]) -> Path:
    lines = [json.dumps({"row": row, "task": None, "prompt": "a\u2028b\n", "response": "c"}, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_texts_are_read_line_by_line(tmp_path: Path) -> None:
    texts = read_heldout_texts(write_texts(tmp_path / "texts.jsonl", [4, 9]), [4, 9])
    assert [one.row for one in texts] == [4, 9]
    assert texts[0].prompt == "a\u2028b\n"


def test_texts_of_other_rows_are_refused(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "texts.jsonl", [4, 9])
    with pytest.raises(ValueError, match="row 9 at line 2, the examples row 8; prepare the data again"):
        read_heldout_texts(path, [4, 8])
    with pytest.raises(ValueError, match="2 rows where there are 3 examples"):
        read_heldout_texts(path, [4, 9, 10])


def test_a_long_text_keeps_its_end() -> None:
    assert shortened("abc", 3) == "abc"
    assert shortened("abcdef", 3) == "…ef"
