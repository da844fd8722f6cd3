"""Built-in data: instruction tasks with checkable answers, made by a seeded generator.

A row is ``{"task", "instruction", "input", "response"}``. The response is a function of instruction and input, so exact
match is meaningful. It sets the answer into a fixed sentence: the sentence is easy to predict, the answer is hard, which
is the difference adaptive teaching is about.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ANSWER_PATTERN = r"\b(?:is|are) (.+)\.$"
"""Its first group is the answer in a response; it serves as ``evaluate.answer_pattern``."""

LARGEST_TERM = 12
LARGEST_LISTED_NUMBER = 30
LARGEST_SHIFT = 7
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WORDS = (
    "apple", "arm", "bag", "ball", "bean", "bear", "bed", "bell", "bird", "boat", "book", "bread", "bus", "cake", "cap",
    "car", "cat", "chair", "clock", "coat", "corn", "cow", "cup", "desk", "dog", "door", "drum", "duck", "egg", "farm",
    "fish", "fork", "fox", "frog", "goat", "gold", "hand", "hat", "hill", "horse", "house", "key", "king", "lake", "lamp",
    "leaf", "milk", "moon", "nest", "nut", "park", "pen", "pig", "rain", "ring", "road", "ship", "shoe", "star", "tree",
)  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("left", "right"), ("day", "night"), ("open", "closed"), ("old", "young"),
    ("rich", "poor"), ("fast", "slow"), ("high", "low"), ("wet", "dry"), ("hard", "soft"), ("light", "dark"), ("full", "empty"),
    ("happy", "sad"), ("clean", "dirty"), ("early", "late"), ("near", "far"), ("strong", "weak"), ("thick", "thin"),
    ("loud", "quiet"), ("long", "short"), ("inside", "outside"), ("first", "last"), ("good", "bad"), ("true", "false"),
)  # fmt: skip

Question = tuple[dict[str, object], str, str]
"""What the phrasings show, the input below the instruction (may be empty), and the response."""


@dataclass(frozen=True)
class Task:
    """One kind of task."""

    phrasings: tuple[str, ...]
    """Instructions that ask the same thing, templates of ``str.format``."""

    draw: Callable[[random.Random], Question]
    """Draws one question, each with the same probability or nearly so."""

    questions: int
    """Number of distinct questions ``draw`` can give."""

    @property
    def rows(self) -> int:
        """Number of distinct rows of this kind."""
        return self.questions * len(self.phrasings)


def make_rows(rows: int, tasks: Sequence[str], seed: int) -> list[dict[str, str]]:
    """Make distinct rows, as many of each kind as of any other; where a kind has no more, the others fill up.

    The same arguments give the same rows in every process.

    Raises:
        ValueError: if the kinds named do not have so many distinct rows.
    """
    shares = share_rows(rows, sorted(set(tasks)))
    made: list[dict[str, str]] = []
    for task, share in shares.items():
        draws = random.Random(f"{seed} {task}")
        distinct: dict[tuple[str, str], dict[str, str]] = {}
        while len(distinct) < share:
            row = draw_row(task, draws)
            distinct.setdefault((row["instruction"], row["input"]), row)
        made += distinct.values()
    random.Random(f"{seed} order").shuffle(made)
    return made


def share_rows(rows: int, tasks: Sequence[str]) -> dict[str, int]:
    """Return how many rows each kind makes: equal shares, those of the exhausted kinds spread over the others."""
    available = sum(TASKS[task].rows for task in tasks)
    if rows > available:
        raise ValueError(
            f"data.source.rows {rows} exceeds the {available} distinct rows there are of {', '.join(tasks)}; "
            f"data.source.rows={available} would do"
        )
    shares, left = {}, rows
    for position, task in enumerate(smallest_first := sorted(tasks, key=lambda task: TASKS[task].rows)):
        shares[task] = min(TASKS[task].rows, left // (len(smallest_first) - position))
        left -= shares[task]
    return shares


def draw_row(task: str, draws: random.Random) -> dict[str, str]:
    """Draw one row of a kind."""
    shown, given, response = TASKS[task].draw(draws)
    phrasing = draws.choice(TASKS[task].phrasings)
    return {"task": task, "instruction": phrasing.format(**shown), "input": given, "response": response}


def answer_of(response: str) -> str:
    """Return the answer that a response gives; the whole text where it has not the form of a response."""
    match = re.search(ANSWER_PATTERN, response)
    return match.group(1) if match else response


def _add(draws: random.Random) -> Question:
    a, b = draws.randint(1, LARGEST_TERM), draws.randint(1, LARGEST_TERM)
    return {"a": a, "b": b}, "", f"The sum of {a} and {b} is {a + b}."


def _subtract(draws: random.Random) -> Question:
    b, a = sorted((draws.randint(1, LARGEST_TERM), draws.randint(1, LARGEST_TERM)))
    return {"a": a, "b": b}, "", f"The difference of {a} and {b} is {a - b}."


def _largest(draws: random.Random) -> Question:
    numbers = _some_numbers(draws, 3, 5)
    return {}, _listed(numbers), f"The largest number is {max(numbers)}."


def _smallest(draws: random.Random) -> Question:
    numbers = _some_numbers(draws, 3, 5)
    return {}, _listed(numbers), f"The smallest number is {min(numbers)}."


def _sort(draws: random.Random) -> Question:
    if draws.random() < 0.5:
        numbers = _some_numbers(draws, 2, 4)
        return {}, _listed(numbers), f"In order they are {_listed(sorted(numbers))}."
    words = _some_words(draws, 2, 3)
    return {}, _listed(words), f"In order they are {_listed(sorted(words))}."


def _reverse(draws: random.Random) -> Question:
    words = _some_words(draws, 2, 4)
    return {}, _listed(words), f"In reverse they are {_listed(words[::-1])}."


def _count(draws: random.Random) -> Question:
    words = _some_words(draws, 2, 7)
    return {}, _listed(words), f"The number of items is {len(words)}."


def _first(draws: random.Random) -> Question:
    words = _some_words(draws, 2, 5)
    return {}, _listed(words), f"The first word is {words[0]}."


def _last(draws: random.Random) -> Question:
    words = _some_words(draws, 2, 5)
    return {}, _listed(words), f"The last word is {words[-1]}."


def _uppercase(draws: random.Random) -> Question:
    word = draws.choice(WORDS)
    return {"word": word}, "", f"In capitals it is {word.upper()}."


def _weekday(draws: random.Random) -> Question:
    today, shift = draws.randrange(len(DAYS)), draws.randint(1, LARGEST_SHIFT)
    shown = f"{shift} day{'s' if shift > 1 else ''} after {DAYS[today]}"
    return {"when": shown}, "", f"The day {shown} is {DAYS[(today + shift) % len(DAYS)]}."


def _opposite(draws: random.Random) -> Question:
    pair = draws.choice(OPPOSITES)
    word, opposite = pair if draws.random() < 0.5 else pair[::-1]
    return {"word": word}, "", f"The opposite of {word} is {opposite}."


def _some_numbers(draws: random.Random, fewest: int, most: int) -> list[int]:
    return draws.sample(range(LARGEST_LISTED_NUMBER + 1), draws.randint(fewest, most))


def _some_words(draws: random.Random, fewest: int, most: int) -> list[str]:
    return draws.sample(WORDS, draws.randint(fewest, most))


def _listed(items: Sequence[object]) -> str:
    return ", ".join(str(item) for item in items)


def _lists(choices: int, fewest: int, most: int) -> int:
    """Return the number of lists of ``fewest`` to ``most`` distinct items out of so many."""
    return sum(math.perm(choices, length) for length in range(fewest, most + 1))


NUMBERS = LARGEST_LISTED_NUMBER + 1

TASKS: dict[str, Task] = {
    "add": Task(
        ("What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b} = ?", "Find the sum of {a} and {b}."),
        _add,
        LARGEST_TERM**2,
    ),
    "subtract": Task(
        (
            "What is {a} minus {b}?", "Subtract {b} from {a}.", "{a} - {b} = ?", "Take {b} away from {a}.",
            "How much is {a} less {b}?", "Find the difference of {a} and {b}.",
        ),
        _subtract,
        LARGEST_TERM * (LARGEST_TERM + 1) // 2,
    ),
    "largest": Task(
        ("Which number is the largest?", "Find the largest of these numbers:", "Name the biggest number in the list."),
        _largest,
        _lists(NUMBERS, 3, 5),
    ),
    "smallest": Task(
        ("Which number is the smallest?", "Find the smallest of these numbers:", "Name the least number in the list."),
        _smallest,
        _lists(NUMBERS, 3, 5),
    ),
    "sort": Task(
        ("Sort the list.", "Put these in order:", "Arrange the items in ascending order."),
        _sort,
        _lists(NUMBERS, 2, 4) + _lists(len(WORDS), 2, 3),
    ),
    "reverse": Task(
        ("Reverse the list.", "Write these words in reverse order:", "Turn the list of words around."),
        _reverse,
        _lists(len(WORDS), 2, 4),
    ),
    "count": Task(
        ("How many items are in the list?", "Count the items:", "Give the number of words below."),
        _count,
        _lists(len(WORDS), 2, 7),
    ),
    "first": Task(
        ("What is the first word?", "Name the first word in the list.", "Which word comes first?"),
        _first,
        _lists(len(WORDS), 2, 5),
    ),
    "last": Task(
        ("What is the last word?", "Name the last word in the list.", "Which word comes last?"),
        _last,
        _lists(len(WORDS), 2, 5),
    ),
    "uppercase": Task(
        (
            "Write {word} in capital letters.", "Make the word {word} uppercase.", "Change {word} to capitals.",
            "How is {word} written in capitals?", "Turn {word} into uppercase.", "Put {word} into capital letters.",
            "Capitals: {word}", "Uppercase of {word}:",
        ),
        _uppercase,
        len(WORDS),
    ),
    "weekday": Task(
        (
            "Which day is {when}?", "What day of the week comes {when}?", "Name the day {when}.", "Tell me the weekday {when}.",
            "What is the day {when}?", "Find the day of the week {when}.", "Say which weekday is {when}.",
        ),
        _weekday,
        len(DAYS) * LARGEST_SHIFT,
    ),
    "opposite": Task(
        (
            "What is the opposite of {word}?", "Name the opposite of {word}.", "Give the antonym of {word}.",
            "Which word is contrary to {word}?", "Tell me the opposite of {word}.", "Find an antonym for {word}.",
            "Opposite of {word}:",
        ),
        _opposite,
        2 * len(OPPOSITES),
    ),
}  # fmt: skip
"""All kinds of tasks, by the names a user may type."""
