"""The judge's server, through OpenAI's client: one question, one reply. It alone knows the key, and lets it out nowhere.

The client's own retries wait 0.5 s, then twice as long each time up to 8 s, or as long as the server says.
"""

import openai
from openai.types.chat import ChatCompletion

from actors.config.judge import JudgeConfig
from orchestrator.cluster.redaction import HIDDEN, without_private_values
from orchestrator.judging.replies import FailureKind, Reply
from orchestrator.judging.server import OPENAI_ADDRESS, address_of, key_of

NO_KEY = "none"
"""What is sent to a server that asks for no key; the client sends something in any case."""

TRIAL_QUESTION = "Answer with the one word yes."
MOST_SHOWN = 400
"""Characters of a server's words that are shown."""


class JudgeClient:
    """Asks one judge. May be used by many threads."""

    def __init__(self, settings: JudgeConfig) -> None:
        """Raises: ValueError if the variable with the key is not set."""
        self._settings = settings
        self._key = key_of(settings)
        self._address = address_of(settings)
        self._client = openai.OpenAI(
            api_key=self._key or NO_KEY, base_url=self._address, timeout=settings.timeout_seconds, max_retries=settings.retries
        )

    def require_answers(self) -> None:
        """Ask something short, so that what is wrong is known before time is spent.

        Raises:
            ValueError: if nothing answers at the address, the key is refused, there is no such model, or the request is refused.
        """
        reply = self.ask(TRIAL_QUESTION)
        if reply.failure in ("no connection", "timeout"):
            raise ValueError(
                f"evaluate.judge: nothing answers at {self._address} ({reply.failure}: {reply.text}); start the server, give its "
                "address as evaluate.judge.base_url (http://localhost:8000/v1), or go without (evaluate.judge=null): the command "
                "judge can judge the run later"
            )
        if reply.failure not in (None, "refusal"):
            raise ValueError(
                f"evaluate.judge: {self._address} does not take questions ({reply.failure}: {reply.text}); what it "
                "names would do, such as temperature=null, another max_tokens, or asking later with the command judge"
            )

    def ask(self, text: str) -> Reply:
        """Return the reply to one question; what fails after all retries is a reply too, which says how.

        Raises:
            ValueError: if the key is refused or there is no such model: no question will be answered.
        """
        try:
            completion = self._client.chat.completions.create(
                model=self._settings.model,
                messages=[{"role": "user", "content": text}],
                temperature=openai.omit if self._settings.temperature is None else self._settings.temperature,
                **self._length(),
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ValueError(self._refused_key(error)) from None  # the error's own words may hold the key
        except openai.NotFoundError as error:
            raise ValueError(
                f"evaluate.judge.model {self._settings.model!r} is not served at {self._address} ({self._words(error)}); a name "
                f"that {self._address}/models lists would do"
            ) from None
        except openai.OpenAIError as error:
            return Reply(self._words(error), failure=_kind(error))
        return self._reply(completion)

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def _length(self) -> dict[str, int]:
        # OpenAI's newer models know only the new name of the bound, and most other servers only the old one.
        name = "max_completion_tokens" if self._address == OPENAI_ADDRESS else "max_tokens"
        return {name: self._settings.max_tokens}

    def _reply(self, completion: ChatCompletion) -> Reply:
        if not isinstance(completion, ChatCompletion) or not completion.choices:
            return Reply(self._shown(repr(completion)), failure="no chat completion")
        choice, usage = completion.choices[0], completion.usage
        read, written = (usage.prompt_tokens, usage.completion_tokens) if usage is not None else (0, 0)
        if choice.message.refusal or choice.finish_reason == "content_filter":
            return Reply(self._shown(choice.message.refusal or "content_filter"), read, written, "refusal")
        return Reply(self._without_key(choice.message.content or ""), read, written, cut=choice.finish_reason == "length")

    def _refused_key(self, error: openai.APIStatusError) -> str:
        variable = self._settings.api_key_variable
        remedy = (
            "the name of a variable that holds the server's key, as evaluate.judge.api_key_variable,"
            if variable is None
            else f"the server's own key in the environment variable {variable}, or another variable's name as "
            "evaluate.judge.api_key_variable,"
        )
        return f"evaluate.judge: {self._address} refuses the key ({self._words(error)}); {remedy} would do"

    def _words(self, error: openai.OpenAIError) -> str:
        cause = f": {error.__cause__}" if isinstance(error, openai.APIConnectionError) and error.__cause__ else ""
        return self._shown(f"{error}{cause}")

    def _shown(self, text: str) -> str:
        text = self._without_key(text)
        return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "…"

    def _without_key(self, text: str) -> str:
        return without_private_values(text.replace(self._key, HIDDEN) if self._key else text)


def _kind(error: openai.OpenAIError) -> FailureKind:
    if isinstance(error, openai.APITimeoutError):
        return "timeout"
    if isinstance(error, openai.APIConnectionError):
        return "no connection"
    if isinstance(error, openai.RateLimitError):
        return "too many requests"
    if isinstance(error, openai.APIStatusError):
        return "server error" if error.status_code >= 500 else "request refused"
    return "no chat completion"
