"""Values of a row's fields: what may be learned from, and how errors name them."""

from collections.abc import Mapping
from typing import Any


class NoAnswer(ValueError):
    """A row has no answer to learn; ``data.without_answer`` says what happens to it."""


def require_text(value: Any, what: str) -> str:
    """Return ``value`` if it is text with something in it.

    Raises:
        NoAnswer: if it is null or empty.
        ValueError: if it is of another kind.
    """
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{what} must be text, not {shown(value)}")
    if value is None or not value.strip():
        raise NoAnswer(
            f"{what} is {'null' if value is None else 'empty'}: there is nothing to learn; "
            "data.without_answer=drop would leave such rows out"
        )
    return value


def require_unicode(text: str) -> str:
    """Raise if a text holds half a surrogate pair, which JSON can express and no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the character {text[error.start]!r} is half of a surrogate pair, no text") from error
    return text


def fields_of(row: Mapping[str, Any]) -> str:
    """Return a row's field names in words."""
    return f"its fields are {', '.join(map(repr, row)) or 'none at all'}"


def shown(value: Any) -> str:
    """Return a value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
