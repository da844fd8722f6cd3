"""A set for graders: word problems with answers that models wrote, graded by the worked answer that comes with each problem.

    python -m orchestrator predict RUN questions.jsonl --model teacher --temperature 1 --output answers.jsonl
    python -m benchmarks.graded_answers questions.jsonl answers.jsonl --output graded.jsonl

The first file is one of GSM8K: ``question``, and ``answer`` with its calculations as ``<<2*3=6>>`` and its result after
``####``. An answer is ``right`` if it gives the same result, ``partly`` if it does not and reaches another number that the
worked answer calculates, and ``wrong`` otherwise. A number that the question states is nothing that was reached. Each line of
the output holds ``question``, ``key`` (calculations and result of the worked answer), ``answer`` and ``grade``; equal answers
to one question count once.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from actors.files import write_atomically

Row = dict[str, Any]

CALCULATION = re.compile(r"<<([^<>]*=[^<>]*)>>")
RESULT = re.compile(r"####\s*\$?(-?[\d.,]*\d)")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def value_of(text: str) -> float | None:
    """Return the last number in a text; None where it has none."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def result_of(answer: str) -> float | None:
    """Return the number behind the last ``####``; None where there is none."""
    found = RESULT.findall(answer)
    return value_of(found[-1]) if found else None


def reached_by(answer: str) -> set[float]:
    """Return the results of an answer's calculations, the last one included."""
    values = {value_of(calculation.rsplit("=", 1)[1]) for calculation in CALCULATION.findall(answer)}
    return {value for value in {*values, result_of(answer)} if value is not None}


def grade(question: str, worked: str, answer: str) -> str:
    """Return ``right``, ``partly`` or ``wrong``.

    Raises:
        ValueError: if the worked answer has no result.
    """
    result = result_of(worked)
    if result is None:
        raise ValueError(f"a worked answer has no result: {worked!r}; '... #### 42' would do")
    if result_of(answer) == result:
        return "right"
    stated = {float(number.replace(",", "")) for number in NUMBER.findall(question)}
    return "partly" if (reached_by(worked) - {result} - stated) & reached_by(answer) else "wrong"


def key_of(worked: str) -> str:
    """Return the calculations and the result of a worked answer: ``24/6=4 4+6=10 #### 10``."""
    result = result_of(worked)
    assert result is not None, "its answers were graded before"
    return " ".join([*CALCULATION.findall(worked), f"#### {result:g}"])


def graded_rows(questions: Sequence[Row], files: Sequence[tuple[str, Sequence[Row]]]) -> Iterator[dict[str, str]]:
    """Yield a row for each answer, file by file, without those that a question has already.

    Args:
        questions: rows of GSM8K, as they were asked.
        files: names of files that ``predict`` wrote, and their lines.

    Raises:
        ValueError: if answers belong to other questions, or were given by no language model.
    """
    seen: set[tuple[int, str]] = set()
    for name, answers in files:
        for line, answer in enumerate(answers):
            row, text = answer.get("row"), answer.get("response")
            if not isinstance(text, str) or not isinstance(row, int):
                raise ValueError(f"line {line + 1} of {name} holds no answer; what predict of a language model wrote would do")
            if row >= len(questions) or str(questions[row]["question"]) not in str(answer.get("prompt")):
                raise ValueError(
                    f"line {line + 1} of {name} answers another question than row {row}; the file that was asked would do"
                )
            if (row, text) in seen:
                continue
            seen.add((row, text))
            question, worked = str(questions[row]["question"]), str(questions[row]["answer"])
            yield {"question": question, "key": key_of(worked), "answer": text.strip(), "grade": grade(question, worked, text)}


def read_lines(path: Path) -> list[Row]:
    """Return the objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def main() -> int:
    """Grade, write and count."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("questions", type=Path, help="GSM8K's rows, as they were asked")
    parser.add_argument("answers", type=Path, nargs="+", help="what predict wrote")
    parser.add_argument("--output", type=Path, required=True, help="file of graded answers")
    asked = parser.parse_args()
    try:
        rows = list(graded_rows(read_lines(asked.questions), [(str(path), read_lines(path)) for path in asked.answers]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_atomically(asked.output, "".join(json.dumps(row) + "\n" for row in rows).encode())
    counts = Counter(row["grade"] for row in rows)
    print(f"{len(rows)} answers: " + ", ".join(f"{name} {counts[name]}" for name in ("wrong", "partly", "right")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
