"""What a judge's reply says: a verdict, or in what way it is none."""

import re
from dataclasses import dataclass
from typing import Literal

LOWEST, HIGHEST = 1.0, 10.0
"""Bounds of a rating."""

FailureKind = Literal[
    "no verdict", "out of range", "refusal", "empty reply", "cut at max_tokens", "timeout", "no connection", "too many requests",
    "server error", "request refused", "no chat completion",
]  # fmt: skip
"""Why a question has no verdict."""

RATING = re.compile(r"\brating\s+(a|b)\b[^\w\n-]{0,12}(-?\d+(?:\.\d+)?)", re.IGNORECASE)
BETTER = re.compile(r"\bbetter\b[^\w\n]{1,12}(a|b|neither)\b", re.IGNORECASE)
REFUSAL = re.compile(
    r"\s*(?:i'm sorry|i am sorry|sorry,|i cannot|i can't|i can’t|i’m sorry|i'm unable|i am unable|as an ai\b)", re.IGNORECASE
)
"""How models begin when they will not do as asked; looked for only where there is no verdict."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back from the judge's server."""

    text: str
    """What the judge wrote, or the server's words of why there is nothing."""

    tokens_in: int = 0
    """Tokens that the judge read, as its server counts them."""

    tokens_out: int = 0
    """Tokens that it wrote."""

    failure: FailureKind | None = None
    """Why there is nothing to read a verdict from, where that is known without reading."""

    cut: bool = False
    """Whether it was cut at ``max_tokens``."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge gives to the answers A and B."""

    a: float
    """A rating from 1 to 10; of a pair 1 to the better answer, 0 to the other, 0.5 to each where neither is."""

    b: float
    """That of B."""


def read_reply(reply: Reply, protocol: str) -> Verdict | FailureKind:
    """Return the verdict of a reply, or why it has none. Where a verdict stands twice the last one counts."""
    if reply.failure is not None:
        return reply.failure
    verdict = _ratings(reply.text) if protocol == "rating" else _better(reply.text)
    if verdict is not None:
        return verdict
    if not reply.text.strip():
        return "cut at max_tokens" if reply.cut else "empty reply"
    if REFUSAL.match(reply.text):
        return "refusal"
    return "cut at max_tokens" if reply.cut else "no verdict"


def _ratings(text: str) -> Verdict | FailureKind | None:
    found = {letter.lower(): float(number) for letter, number in RATING.findall(text)}
    if set(found) != {"a", "b"}:
        return None
    if not all(LOWEST <= number <= HIGHEST for number in found.values()):
        return "out of range"
    return Verdict(found["a"], found["b"])


def _better(text: str) -> Verdict | None:
    found = BETTER.findall(text)
    if not found:
        return None
    return {"a": Verdict(1.0, 0.0), "b": Verdict(0.0, 1.0)}.get(found[-1].lower(), Verdict(0.5, 0.5))
