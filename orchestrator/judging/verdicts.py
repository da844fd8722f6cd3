"""The book of verdicts: each one a line of JSON, written as it comes, so that none is asked for twice."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.judging.questions import Question
from orchestrator.judging.replies import Reply, Verdict


@dataclass(frozen=True, slots=True)
class RecordedVerdict:
    """A verdict and what it took."""

    verdict: Verdict
    tokens_in: int
    """Tokens that the judge read."""
    tokens_out: int
    """Tokens that it wrote."""


class VerdictBook:
    """Verdicts by the keys of their questions. One process at a time may write; the run's lock sees to that."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a last line that a kill cut short is taken away.

        Raises:
            ValueError: if another line is damaged.
        """
        self._path = path
        self._verdicts: dict[str, RecordedVerdict] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._remember(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{path}: line {number} is no verdict; delete the line, and the judge is asked again for what it held"
                ) from None
        if whole != content:
            with open(path, "r+b") as file:
                file.truncate(len(whole))

    def get(self, question: Question) -> RecordedVerdict | None:
        """Return the verdict on a question; None if there is none yet."""
        return self._verdicts.get(question.key)

    def add(self, question: Question, verdict: Verdict, reply: Reply) -> None:
        """Write a verdict down, with the reply that it was read from."""
        entry = {
            "key": question.key, "row": question.row, "model": question.model, "against": question.against,
            "model_first": question.model_first, **asdict(verdict), "tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out,
            "reply": reply.text,
        }  # fmt: skip
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:  # closed, and so flushed, line by line
            file.write(json.dumps(entry) + "\n")
        self._remember(entry)

    def _remember(self, entry: dict[str, Any]) -> None:
        verdict = Verdict(float(entry["a"]), float(entry["b"]))
        self._verdicts[entry["key"]] = RecordedVerdict(verdict, entry["tokens_in"], entry["tokens_out"])
