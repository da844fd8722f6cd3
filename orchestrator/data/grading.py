"""Built-in data for classifiers: short answers to school questions with grades, made by a seeded generator.

A row is ``{"question", "answer", "grade"}``. Each question has two points; an answer that makes both is ``right``, one of them
``partly``, none ``wrong``. Answers begin and end as pupils' do, mix their order, may hold a mistaken sentence, and are misspelt.
"""

import random
from dataclasses import dataclass

GRADES = ("wrong", "partly", "right")
MISSPELT = 0.25
"""Share of answers with a spelling mistake or more."""


@dataclass(frozen=True)
class Question:
    """A question, the ways to make its two points, and mistakes that make none."""

    text: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    mistakes: tuple[str, ...]


QUESTIONS = (
    Question(
        "Why does ice float on water?",
        ("ice is less dense than water", "ice has a lower density than water", "the same amount of ice weighs less than water"),
        ("water expands when it freezes", "water takes more room as ice", "frozen water spreads out"),
        ("ice is colder than water", "ice is solid and water is liquid", "water is heavier because it is wet", "ice holds salt"),
    ),
    Question(
        "Why do we see lightning before we hear thunder?",
        ("light is faster than sound", "light travels quicker than sound does", "sound moves slower than light"),
        ("both begin at the same moment", "they happen at one time", "thunder and lightning start together"),
        ("thunder comes from another cloud", "our eyes are in front of our ears", "thunder is louder", "rain stops the sound"),
    ),
    Question(
        "What do plants need to make their food?",
        ("they need light from the sun", "sunlight gives them the energy", "they use the light of the sun"),
        ("they need water and carbon dioxide", "they take in carbon dioxide and water", "water and a gas from the air"),
        ("they eat soil", "they need oxygen to make food", "they sleep at night", "they need insects"),
    ),
    Question(
        "Why is it warmer in summer than in winter?",
        ("our side of the earth leans towards the sun", "the axis of the earth is tilted to the sun", "the earth is tilted"),
        ("days are longer", "the sun shines for more hours", "we have more hours of sunlight"),
        ("the earth is nearer to the sun", "the sun burns hotter in summer", "there are fewer clouds", "the wind is warm"),
    ),
    Question(
        "How do vaccines protect us?",
        ("they show the body a harmless part of a germ", "they have weak or dead germs in them", "they hold a piece of the germ"),
        ("the body learns to fight it", "our body makes antibodies", "the immune system remembers it"),
        ("they kill all germs in the room", "they are a kind of vitamin", "they thicken the blood", "they stop us from eating"),
    ),
    Question(
        "Why does a metal spoon feel colder than a wooden one?",
        ("metal conducts heat well", "metal leads heat better than wood", "heat moves fast through metal"),
        ("it takes the heat out of our hand", "warmth of the hand flows away", "our fingers lose heat to it"),
        ("metal is colder than wood", "wood is alive", "metal has no temperature", "the spoon is wet"),
    ),
    Question(
        "What causes the tides of the sea?",
        ("the moon pulls on the water", "the gravity of the moon attracts the sea", "the moon draws the water towards it"),
        ("the earth turns under it", "the earth rotates once a day", "the spin of the earth moves us past it"),
        ("the wind pushes the water", "fish swim to the shore", "rivers fill the sea", "the sea breathes"),
    ),
    Question(
        "Why do we have to breathe?",
        ("our cells need oxygen", "the body needs oxygen for energy", "oxygen is used to burn food in the cells"),
        ("carbon dioxide has to leave", "we breathe out carbon dioxide", "waste gas must go out of the body"),
        ("the lungs would shrink", "air keeps us light", "it cools the brain", "the nose needs air"),
    ),
)  # fmt: skip
OPENINGS = ("", "", "I think ", "because ", "it is because ", "well ", "we learned that ", "my answer is that ")
ENDINGS = ("", "", ".", " .", " I think.", " and so on.", "!")
JOINS = (" and ", ", and ", ". also ", " so ", ". ", " because ")


def make_graded_answers(rows: int, seed: int) -> list[dict[str, str]]:
    """Make distinct rows, each grade as often as any other; the same arguments give the same rows in every process."""
    draws = random.Random(f"{seed} grading")
    made: dict[tuple[str, str], dict[str, str]] = {}
    while len(made) < rows:
        grade = len(made) % len(GRADES)
        question = draws.choice(QUESTIONS)
        answer = misspelt(answer_to(question, grade, draws), draws)
        made.setdefault((question.text, answer), {"question": question.text, "answer": answer, "grade": GRADES[grade]})
    return list(made.values())


def answer_to(question: Question, points: int, draws: random.Random) -> str:
    """Return an answer that makes so many of the question's two points."""
    ways = [draws.choice(question.first), draws.choice(question.second)]
    draws.shuffle(ways)
    said = ways[:points]
    if points < 2 and (points == 0 or draws.random() < 0.6):
        said.append(draws.choice(question.mistakes))
    if points == 0 and draws.random() < 0.4:
        other = draws.choice([one for one in QUESTIONS if one is not question])
        said.append(draws.choice(other.first))  # a point of another question
    draws.shuffle(said)
    text = said[0]
    for sentence in said[1:]:
        text += draws.choice(JOINS) + sentence
    return draws.choice(OPENINGS) + text + draws.choice(ENDINGS)


def misspelt(text: str, draws: random.Random) -> str:
    """Return a text with letters swapped, left out or doubled here and there."""
    if draws.random() >= MISSPELT:
        return text
    letters = list(text)
    for _ in range(draws.randint(1, 3)):
        place = draws.randrange(1, len(letters) - 1)
        if letters[place].isalpha():
            match draws.randrange(3):
                case 0:
                    letters[place], letters[place - 1] = letters[place - 1], letters[place]
                case 1:
                    letters[place] = ""
                case _:
                    letters[place] *= 2
    return "".join(letters)
