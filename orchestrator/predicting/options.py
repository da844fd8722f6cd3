"""What the command predict is told besides the run. Imports neither torch nor Ray."""

from dataclasses import dataclass
from typing import Literal

from losses.section import LARGEST_SEED

Engine = Literal["vllm", "transformers"]
DRAWING = ("top_p", "seed")
OF_LANGUAGE_MODELS = ("engine", "temperature", *DRAWING, "max_new_tokens")


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """Which rows, by which model, how, and where to."""

    rows: str
    """File of the rows."""
    output: str | None = None
    """File of the answers; None for one beside the rows."""
    model: Literal["student", "teacher"] = "student"
    """Who answers."""
    batch_rows: int | None = None
    """Rows that are answered at one time; None for what the run's configuration says."""
    format_of: str | None = None
    """Key of the source whose format the rows have; None where the run has but one format."""
    overwrite: bool = False
    """Whether answers that are there may be replaced."""
    engine: Engine | None = None
    """What a language model is served by; None for vLLM where it is installed and can."""
    temperature: float | None = None
    """Of its sampling; None for 0, which takes the most likely token."""
    top_p: float | None = None
    """Draw from the fewest tokens that hold this share of the mass; None for all."""
    max_new_tokens: int | None = None
    """Longest answer; None for ``evaluate.max_new_tokens``."""
    seed: int | None = None
    """Draws the tokens; None for the run's own."""

    def require_sound(self) -> None:
        """Raise if a value cannot be.

        Raises:
            ValueError: naming the option, its value and one that would do.
        """
        for name in ("batch_rows", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{option(name)} {value} is below 1, the least that would do")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"--temperature {self.temperature:g} is none: 0 takes the most likely token, and 1 draws tokens as likely as the "
                "model finds them"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p:g} is no share of the mass above 0; 0.9 would do, and 1 keeps all tokens")
        if self.seed is not None and not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"--seed {self.seed} is not from 0 to {LARGEST_SEED}; 0 would do")
        for name in DRAWING:
            if getattr(self, name) is not None and not self.temperature:
                raise ValueError(
                    f"{option(name)} {getattr(self, name):g} says how tokens are drawn, and at --temperature 0, the default, "
                    "none are; --temperature 1 would do"
                )

    def require_for_classes(self) -> None:
        """Raise if something is said that classifiers know nothing of.

        Raises:
            ValueError: naming the option.
        """
        for name in OF_LANGUAGE_MODELS:
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{option(name)} {getattr(self, name)} is for language models, and task.kind is classification; leave it out"
                )


def option(name: str) -> str:
    """Return a field as it stands on the command line."""
    return f"--{name.replace('_', '-')}"
