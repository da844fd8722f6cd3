"""The built-in tasks: distinct, seeded, and their responses right by an independent reading of the question."""

import datetime
import random
import re
import subprocess
import sys
from collections import Counter

import pytest

from orchestrator.config.data import TASK_KINDS
from orchestrator.data.synthetic import OPPOSITES, TASKS, WORDS, answer_of, draw_row, make_rows, share_rows

FRAMES = {
    "add": r"The sum of \d+ and \d+ is \d+\.",
    "subtract": r"The difference of \d+ and \d+ is \d+\.",
    "largest": r"The largest number is \d+\.",
    "smallest": r"The smallest number is \d+\.",
    "sort": r"In order they are \w+(, \w+)+\.",
    "reverse": r"In reverse they are [a-z]+(, [a-z]+)+\.",
    "count": r"The number of items is \d\.",
    "first": r"The first word is [a-z]+\.",
    "last": r"The last word is [a-z]+\.",
    "uppercase": r"In capitals it is [A-Z]+\.",
    "weekday": r"The day \d+ days? after [A-Z][a-z]+day is [A-Z][a-z]+day\.",
    "opposite": r"The opposite of [a-z]+ is [a-z]+\.",
}


def worked_out(row: dict[str, str]) -> str:
    """Answer a question from its text alone."""
    question = f"{row['instruction']}\n{row['input']}"
    numbers = [int(digits) for digits in re.findall(r"\d+", question)]
    items = row["input"].split(", ")
    by_number_or_name = sorted(items, key=lambda item: f"{int(item):04d}" if item.isdigit() else item)
    match row["task"]:
        case "add":
            return str(numbers[0] + numbers[1])
        case "subtract":
            return str(max(numbers) - min(numbers))
        case "largest":
            return by_number_or_name[-1]
        case "smallest":
            return by_number_or_name[0]
        case "sort":
            return ", ".join(by_number_or_name)
        case "reverse":
            return ", ".join(reversed(items))
        case "count":
            return str(row["input"].count(",") + 1)
        case "first":
            return re.split(r"\W+", row["input"])[0]
        case "last":
            return re.split(r"\W+", row["input"])[-1]
        case "uppercase":
            (word,) = set(re.findall(r"[a-z]+", row["instruction"])) & set(WORDS)
            return "".join(chr(ord(letter) - 32) for letter in word)
        case "weekday":
            (name,) = re.findall(r"[A-Z][a-z]+day", row["instruction"])
            monday = datetime.date(2024, 1, 1)
            week = {f"{monday + datetime.timedelta(day):%A}": monday + datetime.timedelta(day) for day in range(7)}
            return f"{week[name] + datetime.timedelta(numbers[0]):%A}"
        case "opposite":
            words = re.findall(r"[a-z]+", row["instruction"])
            (answer,) = [pair[pair[0] == word] for pair in OPPOSITES for word in words if word in pair]
            return answer
    raise AssertionError(row["task"])


def test_every_kind_a_user_may_name_is_made() -> None:
    assert set(TASKS) == set(TASK_KINDS)


def test_thousands_of_distinct_rows_with_right_answers() -> None:
    rows = make_rows(7000, TASK_KINDS, seed=3)
    assert len({(row["instruction"], row["input"]) for row in rows}) == 7000
    assert {row["task"] for row in rows} == set(TASK_KINDS)
    for row in rows:
        assert list(row) == ["task", "instruction", "input", "response"]
        assert answer_of(row["response"]) == worked_out(row), row


def test_every_kind_is_asked_in_three_ways_or_more() -> None:
    assert all(len(set(task.phrasings)) >= 3 for task in TASKS.values())


@pytest.mark.parametrize("task", TASK_KINDS)
def test_a_question_has_one_response_and_the_response_a_fixed_frame(task: str) -> None:
    responses: dict[str, set[str]] = {}
    for row in make_rows(200, [task], seed=0) + make_rows(200, [task], seed=1):
        assert re.fullmatch(FRAMES[task], row["response"])
        responses.setdefault(f"{row['instruction']}\n{row['input']}", set()).add(row["response"])
    assert all(len(answers) == 1 for answers in responses.values())


def test_answer_of_text_that_is_no_response_is_the_text() -> None:
    assert answer_of("I do not know") == "I do not know"


def test_the_same_seed_gives_the_same_rows_in_another_process() -> None:
    program = "import sys; from orchestrator.data.synthetic import *; print(repr(make_rows(60, list(TASKS), 5)))"
    printed = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1] == repr(make_rows(60, TASK_KINDS, 5))


def test_another_seed_gives_other_rows() -> None:
    assert make_rows(60, TASK_KINDS, 5) != make_rows(60, TASK_KINDS, 6)


def test_the_order_in_which_kinds_are_named_does_not_matter() -> None:
    assert make_rows(60, ["add", "count"], 0) == make_rows(60, ["count", "add", "add"], 0)


def test_kinds_share_equally_and_fill_up_for_those_that_run_out() -> None:
    counted = Counter(row["task"] for row in make_rows(1200, ["opposite", "add", "first"], 0))
    assert counted["opposite"] == TASKS["opposite"].rows
    assert abs(counted["add"] - counted["first"]) <= 1
    assert counted.total() == 1200


@pytest.mark.parametrize("task", ["add", "subtract", "uppercase", "weekday", "opposite"])
def test_all_rows_of_a_small_kind_can_be_had_and_no_more(task: str) -> None:
    assert len(make_rows(TASKS[task].rows, [task], 0)) == TASKS[task].rows
    draws = random.Random(0)
    seen = {(row["instruction"], row["input"]) for row in (draw_row(task, draws) for _ in range(12 * TASKS[task].rows))}
    assert len(seen) <= TASKS[task].rows


def test_shares_add_up_whatever_is_asked() -> None:
    kinds = ["opposite", "uppercase", "weekday"]
    most = sum(TASKS[kind].rows for kind in kinds)
    for rows in range(10, most + 1):
        shares = share_rows(rows, kinds)
        assert sum(shares.values()) == rows
        assert all(share <= TASKS[kind].rows for kind, share in shares.items())


def test_too_many_rows_are_refused_with_the_number_that_would_do() -> None:
    most = TASKS["opposite"].rows + TASKS["uppercase"].rows
    message = rf"data\.source\.rows {most + 1} .* of opposite, uppercase; data\.source\.rows={most} would do"
    with pytest.raises(ValueError, match=message):
        make_rows(most + 1, ["uppercase", "opposite"], 0)
