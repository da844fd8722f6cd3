"""Answers that are whole or not there, and what is done with those that a kill has left."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.predicting.answer_file import AnswerFile, whole_lines

IDENTITY: dict[str, Any] = {"model": {"weights": "ab"}, "rows": "cd", "labels": ("x", "y")}


def killed(target: Path, lines: list[str], rest: str = "") -> None:
    """Leave behind what a process does that was killed after some lines, in the middle of another."""
    file = AnswerFile(target, IDENTITY)
    file.write(lines)
    file._file.write(rest.encode())
    file._file.close()


def test_a_file_is_there_when_all_its_lines_are(tmp_path: Path) -> None:
    target = tmp_path / "answers.jsonl"
    with AnswerFile(target, IDENTITY) as file:
        file.write(["é", "b"])
        assert not target.exists() and file.path.read_text() == "é\nb\n" and file.lines == 2
        file.write(["c"])
    assert target.read_text() == "é\nb\nc\n"
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_a_part_of_the_same_answers_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    target = tmp_path / "answers.jsonl"
    killed(target, ["a", "b"], rest='{"row": 2, "la')
    with AnswerFile(target, IDENTITY) as file:
        assert file.lines == 2
        file.write(["c"])
    assert target.read_text() == "a\nb\nc\n"


def test_an_error_leaves_the_lines_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), AnswerFile(tmp_path / "answers.jsonl", IDENTITY) as file:
        file.write(["a"])
        raise RuntimeError
    with AnswerFile(tmp_path / "answers.jsonl", IDENTITY) as file:
        assert file.lines == 1


def test_a_part_of_other_answers_is_not_mixed_in(tmp_path: Path) -> None:
    target, other = tmp_path / "answers.jsonl", {**IDENTITY, "model": {"weights": "zz"}}
    killed(target, ["a"])
    with pytest.raises(ValueError) as refused:
        AnswerFile(target, other)
    assert str(refused.value) == (
        f"{target}.partial is a part of other answers; --overwrite would begin anew, or another --output would do:\n"
        "  model.weights: 'zz' now, 'ab' then"
    )
    with AnswerFile(target, other, overwrite=True) as file:
        assert file.lines == 0
        file.write(["z"])
    assert target.read_text() == "z\n"


def test_answers_that_are_there_are_replaced_only_if_told_and_a_kill_then_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "answers.jsonl"
    target.write_text("old\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl is there already; --overwrite would replace it, or another --output"):
        AnswerFile(target, IDENTITY)
    file = AnswerFile(target, IDENTITY, overwrite=True)
    file.write(["a"])
    file._file.close()
    assert target.read_text() == "old\n"
    with AnswerFile(target, IDENTITY, overwrite=True) as again:
        assert again.lines == 1
    assert target.read_text() == "a\n"


def test_places_where_no_file_can_be_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--output .*gone/a\.jsonl: there is no folder .*gone; one that is there would do$"):
        AnswerFile(tmp_path / "gone" / "a.jsonl", IDENTITY)
    with pytest.raises(ValueError, match=r"is a folder; a file in it, such as .*/answers\.jsonl, would do$"):
        AnswerFile(tmp_path, IDENTITY)


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with (
        AnswerFile(tmp_path / "a.jsonl", IDENTITY),
        pytest.raises(ValueError, match=r"another process writes .*a\.jsonl\.partial"),
    ):
        AnswerFile(tmp_path / "a.jsonl", IDENTITY)


@pytest.mark.parametrize(("content", "found"), [(b"", (0, 0)), (b"a", (0, 0)), (b"a\n", (1, 2)), (b"a\n\xc3\xa9\nb", (2, 5))])
def test_lines_are_whole_that_end(tmp_path: Path, content: bytes, found: tuple[int, int]) -> None:
    (tmp_path / "lines").write_bytes(content)
    assert whole_lines(tmp_path / "lines") == found
