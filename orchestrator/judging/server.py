"""Where the judge's server is, and its key, from the configuration and the environment."""

import os

from actors.config.judge import JudgeConfig, plain_address

OPENAI_ADDRESS = "https://api.openai.com/v1"
ADDRESS_VARIABLE = "OPENAI_BASE_URL"


def key_of(settings: JudgeConfig) -> str | None:
    """Return the key of the judge's server from the environment; None for a server that asks for none.

    Raises:
        ValueError: if the variable is not set.
    """
    if settings.api_key_variable is None:
        return None
    if not (key := os.environ.get(settings.api_key_variable, "").strip()):
        raise ValueError(
            f"evaluate.judge.api_key_variable {settings.api_key_variable} is not set in the environment; a variable with the key "
            "of the judge's server would do, or null for a server that asks for none"
        )
    return key


def address_of(settings: JudgeConfig) -> str:
    """Return where the judge's server is, without a slash at the end.

    Raises:
        ValueError: if OPENAI_BASE_URL stands for it and is no plain address.
    """
    given = settings.base_url or os.environ.get(ADDRESS_VARIABLE)
    return plain_address(given, f"evaluate.judge.base_url, from {ADDRESS_VARIABLE},").rstrip("/") if given else OPENAI_ADDRESS
