"""Chat templates: a conversation as text, where the assistant's turns begin and end in it, and templates that cannot serve."""

import datetime
import re
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from orchestrator.config.formats import ConversationFormat
from orchestrator.data.conversations import Conversation, Message
from orchestrator.data.row_values import shown

WAY_OUT = "data.format.template=... with a template that only appends would do"
LAST_ONLY = "data.format.turns=last would learn the last turn alone"
RENDERED_TWICE = 8  # conversations; a template that draws random numbers does so in each


@dataclass(frozen=True, slots=True)
class LearnedTurn:
    """One of the assistant's turns that is learned."""

    span: tuple[int, int]
    """Start and end of its targets in the text, in characters: all behind the generation prompt, its end token included."""

    end: str
    """The special token that ends it; empty if none does."""

    respaced: bool
    """Whether the template writes it with other white space than the row."""


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """A conversation as text."""

    text: str
    """The whole of it."""

    turns: tuple[LearnedTurn, ...]
    """Those that are learned."""


class ChatTemplate:
    """Renders conversations with one chat template and one set of arguments, by a clock that stands still."""

    def __init__(self, format: ConversationFormat, tokenizer: PreTrainedTokenizerBase, special: list[str]) -> None:
        """Args: the format, the tokenizer whose special tokens may end a turn, and those tokens as text.

        Raises:
            ValueError: if there is no template.
        """
        if format.template is None and tokenizer.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template and data.format.template is null: data.format.template=... names one, "
                "or data.format.kind instruction would do"
            )
        self.format = format
        self._tokenizer = tokenizer
        one = "|".join(map(re.escape, special)) or r"(?!)"
        self._special = re.compile(one)
        self._closing = re.compile(rf"(?:\s|{one})*\Z")
        self.asked_for_date = False
        """Whether the template has asked what day it is."""
        self._rendered = 0

    def render(self, conversation: Conversation) -> RenderedConversation:
        """Render a conversation, and find the turns that are learned.

        Raises:
            ValueError: naming the message and what would do, if the template refuses the messages, does not write what the
                assistant said, does not end a prompt where the answer begins, or rewrites earlier turns that are learned.
        """
        messages, turns = conversation.messages, conversation.assistant_turns
        whole = self._apply(conversation, len(messages), False)
        self._rendered += 1
        if self._rendered <= RENDERED_TWICE and whole != self._apply(conversation, len(messages), False):
            raise ValueError(f"the chat template renders the same messages differently each time; {WAY_OUT}")
        last = turns[-1]
        learned = tuple(
            self._learned_turn(conversation, turn, whole, turn == last)
            for turn in (turns if self.format.turns == "all" else [last])
        )
        return RenderedConversation(whole, learned)

    def prompt(self, conversation: Conversation) -> str:
        """Render a conversation that has no answer, as far as where the answer begins.

        Raises:
            ValueError: if the template refuses the messages.
        """
        return self._apply(conversation, len(conversation.messages), True)

    def _learned_turn(self, conversation: Conversation, turn: int, whole: str, is_last: bool) -> LearnedTurn:
        prompt = self._apply(conversation, turn, True)
        remedy = WAY_OUT if is_last else f"{LAST_ONLY}, or {WAY_OUT}"
        if not whole.startswith(prompt):
            raise ValueError(
                f"the chat template renders the prompt for message {turn} differently once the answer follows, so training would "
                f"not see what generation gets; {remedy}"
            )
        until_turn = whole if is_last else _shared(whole, self._apply(conversation, turn + 1, False))
        written, start = until_turn[len(prompt) :], len(prompt)
        message = conversation.messages[turn]
        content = message["content"].strip()
        if message.get("tool_calls"):
            _require_calls(message, written, turn)
            behind = self._closing_of(written)
        elif content in written:
            place = self._place_of(content, written)
            self._require_no_header(conversation, turn, written[:place])
            behind = place + len(content)
        elif _squeezed(content) in _squeezed(written):
            behind = self._closing_of(written)
        else:
            raise ValueError(
                f"the chat template does not write message {turn} as it stands in the row ({shown(content)}) but "
                f"{shown(written)}; {remedy}"
            )
        respaced = not message.get("tool_calls") and message["content"] not in written
        end = self._special.search(written, behind)
        if end is None:
            return LearnedTurn((start, len(until_turn)), "", respaced)
        return LearnedTurn((start, start + end.end()), end.group(), respaced)

    def _closing_of(self, written: str) -> int:
        """Return where the special tokens and white space begin with which a turn's text ends."""
        closing = self._closing.search(written)
        assert closing is not None, "the end of a text always matches"
        return closing.start()

    def _place_of(self, content: str, written: str) -> int:
        """Return where a turn's content stands in its text: behind it there is nothing but the end of the turn."""
        places = [match.start() for match in re.finditer(f"(?={re.escape(content)})", written)]
        closed = [place for place in places if self._closing.match(written, place + len(content))]
        return closed[0] if closed else places[-1]

    def _require_no_header(self, conversation: Conversation, turn: int, header: str) -> None:
        """Raise if a template has no generation prompt: models would be asked without the header they saw in training."""
        if header.strip() and self._apply(conversation, turn, True) == self._apply(conversation, turn, False):
            raise ValueError(
                f"the chat template has no generation prompt (add_generation_prompt changes nothing), so {shown(header)} before "
                f"message {turn} would be a target, and generation would not begin with it; data.format.template=... with a "
                "template that appends it would do"
            )

    def _apply(self, conversation: Conversation, messages: int, add_generation_prompt: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    conversation.messages[:messages], tools=conversation.tools, chat_template=self.format.template,
                    tokenize=False, add_generation_prompt=add_generation_prompt, strftime_now=self._strftime_now,
                    **self.format.template_args,
                )
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, KeyError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    def _strftime_now(self, form: str) -> str:
        self.asked_for_date = True
        return datetime.datetime.combine(self.format.date, datetime.time()).strftime(form)


def with_default_args(template: str, args: dict[str, Any]) -> str:
    """Return a chat template in which arguments that a caller leaves out have these values: it prompts as training did."""
    defaults = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}" for name, value in args.items()
    ]  # a Python literal is one of Jinja's too
    return "".join(defaults) + template


def _require_calls(message: Message, written: str, turn: int) -> None:
    """Raise if a template leaves out a tool call."""
    rest = written.replace(message["content"].strip(), "", 1) if message["content"].strip() else written
    for call in message["tool_calls"]:
        name = call.get("function", call)["name"]
        if name not in rest:
            raise ValueError(
                f"the chat template leaves out the call of {name!r} in message {turn}; data.format.template=... with a template "
                "that writes tool_calls would do"
            )


def _shared(whole: str, beginning: str) -> str:
    """Return how far two texts are the same; most often one begins with the other, which is found out fast."""
    return beginning if whole.startswith(beginning) else commonprefix([whole, beginning])


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)
