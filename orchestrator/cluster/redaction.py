"""Keeps passwords and access tokens out of whatever is written for others to read: events, error logs, reports."""

import html
import os
import re
from collections.abc import Mapping
from typing import Any

from markupsafe import escape

HIDDEN = "(hidden)"

SECRET_NAME = re.compile(
    r"(?:^|[_.-])(?:token|secret|password|passwd|passphrase|credentials?|connection_?string|(?:api)?key)$", re.IGNORECASE
)
"""What a name ends in whose value is nobody else's business: HF_TOKEN, WANDB_API_KEY, db.password; not max_tokens."""

SECRET_SHAPE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[opsu]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|AKIA[0-9A-Z]{16}"
    r"|xox[abprs]-[\w-]{10,})|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|(?<=AccountKey=)[^;\s]+|(?<=SharedAccessSignature=)[^;\s]+"
    r"|(?<=[?&]sig=)[^&;\s'\"]+"
)
"""What access tokens of well-known services look like, name and password in an address, and keys in a connection string."""

SETTING = re.compile(r"(?P<name>[\w.-]+)(?P<between>\s*[=:]\s*)(?P<value>'[^']*'|\"[^\"]*\"|\S+)")

FEWEST_CHARACTERS = 8
"""A shorter value in the environment is a switch rather than a secret, and would be found in any text."""


def without_private_values(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Return a text without the values of variables whose names say that they are secret.

    Args:
        text: plain, HTML or JSON; the values are found however those write them.
        environment: the variables; this process's unless given.
    """
    if len(text) < FEWEST_CHARACTERS:  # as most of what an event says
        return text
    variables = os.environ if environment is None else environment
    secrets = {value for name, value in variables.items() if SECRET_NAME.search(name) and len(value) >= FEWEST_CHARACTERS}
    for secret in sorted(secrets, key=len, reverse=True):
        for written in (secret, html.escape(secret), str(escape(secret))):
            text = text.replace(written, HIDDEN)
    return text


def without_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Return a text about settings, such as a command, without values that are secret by their name, place or look."""

    def hidden(setting: re.Match[str]) -> str:
        return setting["name"] + setting["between"] + HIDDEN if SECRET_NAME.search(setting["name"]) else setting[0]

    return SECRET_SHAPE.sub(HIDDEN, SETTING.sub(hidden, without_private_values(text, environment)))


def without_secrets_within(value: Any, environment: Mapping[str, str] | None = None, name: str = "") -> Any:
    """Return plain JSON, such as a configuration, with each text treated as ``without_secrets`` does."""
    if isinstance(value, Mapping):
        return {key: without_secrets_within(inner, environment, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets_within(inner, environment, name) for inner in value]
    if value is not None and SECRET_NAME.search(name):
        return HIDDEN
    return SECRET_SHAPE.sub(HIDDEN, without_private_values(value, environment)) if isinstance(value, str) else value
