"""Configuration schema of forward passes: what of a step one worker takes through the model at once."""

from typing import Annotated

from pydantic import Field, model_validator

from losses.section import MayChange, Section


class PassesConfig(Section):
    """How the rows of a step are cut into forward passes."""

    micro_batch_rows: Annotated[int, MayChange()] = Field(default=8, ge=1)
    """Rows of one forward pass on one worker; changes memory and speed, not the result."""

    micro_batch_tokens: Annotated[int | None, MayChange()] = Field(default=None, ge=1)
    """Tokens of one forward pass, padding included, in the place of ``micro_batch_rows``: many short rows or few long ones, and
    passes equally large. A longer row is a pass by itself."""

    packing: Annotated[bool, MayChange()] = False
    """Lay the rows of a pass one after the other into one of up to ``micro_batch_tokens``, without padding; none sees another.
    Only for models that keep them apart, which is tried before the first step."""

    @model_validator(mode="after")
    def _packs_have_a_size(self) -> "PassesConfig":
        if self.packing and self.micro_batch_tokens is None:
            raise ValueError(
                "packing true needs micro_batch_tokens, which is null: how many tokens are laid into one row; "
                "micro_batch_tokens 2048 would do, or packing false"
            )
        return self


def pass_size(train: PassesConfig) -> tuple[str, int]:
    """Return the key that says how large forward passes are, and its value."""
    if train.micro_batch_tokens is not None:
        return "micro_batch_tokens", train.micro_batch_tokens
    return "micro_batch_rows", train.micro_batch_rows
