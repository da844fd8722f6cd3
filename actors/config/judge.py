"""Configuration schema of the judge: a language model that reads the generated answers and says how good they are."""

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from losses.section import Section


class JudgeConfig(Section):
    """A judge of the answers that the models generate: any server that speaks OpenAI's chat completions."""

    model: str = Field(min_length=1)
    """Name of the judge's model, as its server calls it."""

    base_url: str | None = None
    """Address of the server (``http://localhost:8000/v1``); null for that in OPENAI_BASE_URL, else OpenAI's own."""

    api_key_variable: str | None = "OPENAI_API_KEY"
    """Name of the environment variable that holds the server's key; null for a server that asks for none. The key itself has no
    place here."""

    protocol: Literal["rating", "pairwise"] = "rating"
    """``rating``: each model's answer beside the reference, 1 to 10 for both. ``pairwise``: which answer is better, that of the
    student after or that of the teacher, of the student before."""

    prompt: str | None = None
    """File with a Jinja template of the question; null for the protocol's own."""

    rows: int | None = Field(default=None, ge=1)
    """How many of the answered prompts are judged, the first ones; null for all ``evaluate.generate_rows``."""

    concurrent: int = Field(default=8, ge=1)
    """Questions that are asked at one time."""

    retries: int = Field(default=4, ge=0)
    """How often a question is asked again after 429, 5xx, a timeout or a lost connection, each time after a longer pause."""

    timeout_seconds: float = Field(default=60.0, gt=0)
    """How long one reply may take."""

    temperature: float | None = Field(default=0.0, ge=0.0, le=2.0)
    """Of the judge's sampling; null leaves it to the server, for models that allow none."""

    max_tokens: int = Field(default=512, ge=1)
    """Longest reply; models that think before they answer need more."""

    most_failures: float = Field(default=0.2, ge=0.0, le=1.0)
    """Share of the questions that may stay without a verdict; with more the stage fails."""

    input_price: float | None = Field(default=None, ge=0)
    """Price of a million tokens that the judge reads; null for no cost."""

    output_price: float | None = Field(default=None, ge=0)
    """Price of a million tokens that the judge writes; null for no cost."""

    @field_validator("base_url")
    @classmethod
    def _an_address_without_secrets(cls, address: str | None) -> str | None:
        return None if address is None else plain_address(address, "base_url")

    @field_validator("api_key_variable")
    @classmethod
    def _name_of_a_variable(cls, name: str | None) -> str | None:
        # What does not look like a variable may be the key itself, so the message does not repeat it.
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError(
                f"api_key_variable is no name of an environment variable in capitals ({len(name)} characters, not shown: a key "
                "would be a secret); OPENAI_API_KEY would do, or null for a server that asks for none"
            )
        return name

    @model_validator(mode="after")
    def _both_prices(self) -> "JudgeConfig":
        if (self.input_price is None) != (self.output_price is None):
            given, other = ("input", "output") if self.output_price is None else ("output", "input")
            raise ValueError(f"{given}_price is given and {other}_price is null: the cost needs both; {other}_price=0 would do")
        return self


def require_answers_to_judge(judge: JudgeConfig, generate_rows: int) -> None:
    """Raise if models answer fewer prompts than are to be judged.

    Raises:
        ValueError: with a number that would do.
    """
    if generate_rows == 0:
        raise ValueError("generate_rows is 0, and judge needs answers to judge; generate_rows=100 would do, or judge=null")
    if judge.rows is not None and judge.rows > generate_rows:
        raise ValueError(
            f"judge.rows {judge.rows} is more than the generate_rows {generate_rows} that are answered; "
            f"judge.rows={generate_rows} would do, or null for all"
        )


def plain_address(address: str, name: str) -> str:
    """Return the address of a server.

    Raises:
        ValueError: if it is none, or holds a name, a password or a query, which may be secrets; ``name`` says where it stands.
    """
    parts = urlsplit(address)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{name} holds more than an address (not shown: it may be a secret); http://localhost:8000/v1 would do, with the key "
            "in the variable that api_key_variable names"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{name} {address!r} is no address of a server; http://localhost:8000/v1 would do")
    return address
