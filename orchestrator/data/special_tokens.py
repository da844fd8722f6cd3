"""Special tokens inside people's text: found, and kept, removed, refused, or read as the ordinary characters that they are.

While a row is rendered, what is to be read as ordinary characters is hidden: each of its characters is replaced by one of
Unicode's private use, so that neither the template nor a search for the end of a turn meets a special token there, and no
position in the text changes. ``reveal`` puts the text back and says where it stood.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

FIRST_HIDDEN = 0x100000  # plane 16, private use
MOST_HIDDEN = 0xFFFD
HIDDEN = re.compile(f"[{chr(FIRST_HIDDEN)}-{chr(FIRST_HIDDEN + MOST_HIDDEN)}]+")

Policy = Literal["split", "strip", "keep", "refuse"]


def special_strings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts that the tokenizer reads as special tokens, the longest first.

    A token for what is unknown, and for nothing else, steers no model and is ordinary text.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    roles = {str(token) for role, token in tokenizer.special_tokens_map.items() if role != "unk_token"}
    found = (added | set(tokenizer.all_special_tokens)) - ({str(tokenizer.unk_token)} - roles)
    return sorted(found - {""}, key=lambda text: (-len(text), text))


class SpecialTokens:
    """The special tokens of one tokenizer, and what ``data.special_tokens`` does to them in people's text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, policy: Policy) -> None:
        self.policy = policy
        self.strings = [] if tokenizer is None else special_strings(tokenizer)
        """Their texts, the longest first."""
        assert len(self.strings) <= MOST_HIDDEN, "more special tokens than private characters"
        self.pattern = re.compile("|".join(map(re.escape, self.strings)) or r"(?!)")
        """Matches any of them."""


class RowText:
    """The texts of one row on their way into a template and out of it."""

    def __init__(self, special: SpecialTokens) -> None:
        self._special = special
        self.found: Counter[str] = Counter()
        """Special tokens that the texts held."""
        self._holds_private = False

    def treat(self, value: Any) -> Any:
        """Return a value, the texts within it treated as the policy says.

        Raises:
            ValueError: naming the token, if such text is to be refused.
        """
        if isinstance(value, str):
            return self._treat_text(value)
        if isinstance(value, list):
            return [self.treat(inner) for inner in value]
        if isinstance(value, Mapping):
            return {name: self.treat(inner) for name, inner in value.items()}
        return value

    def treat_fields(self, fields: Mapping[str, Any], read: Collection[str]) -> dict[str, Any]:
        """Return a row's fields, those that are ``read`` treated, or raise ValueError as ``treat`` does."""
        return {name: self.treat(value) if name in read else value for name, value in fields.items()}

    def reveal(self, text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Return a rendered text as it reads, and the stretches, in characters, in which special tokens are ordinary text.

        Raises:
            ValueError: if the row's own texts hold characters with which such stretches are marked.
        """
        if not self.found or self._special.policy != "split":
            return text, ()
        if self._holds_private:
            raise ValueError(
                f"its text holds the special token {min(self.found)!r} and characters of Unicode's private plane 16, with which "
                "data.special_tokens=split marks such tokens; strip would do"
            )
        return HIDDEN.sub(self._revealed, text), tuple(match.span() for match in HIDDEN.finditer(text))

    def _treat_text(self, text: str) -> str:
        self._holds_private |= HIDDEN.search(text) is not None
        pattern, policy = self._special.pattern, self._special.policy
        names = pattern.findall(text)
        if not names:
            return text
        self.found.update(names)
        if policy == "refuse":
            raise ValueError(
                f"its text holds the special token {names[0]!r}; data.special_tokens=split would read it as ordinary text, strip "
                "would remove it"
            )
        if policy == "strip":
            while (stripped := pattern.sub("", text)) != text:  # what remains may form one anew
                text = stripped
            return text
        return pattern.sub(self._hidden, text) if policy == "split" else text

    def _hidden(self, match: re.Match[str]) -> str:
        return chr(FIRST_HIDDEN + self._special.strings.index(match.group())) * len(match.group())

    def _revealed(self, match: re.Match[str]) -> str:
        return "".join(self._repeated(run.group()) for run in re.finditer(r"(.)\1*", match.group()))

    def _repeated(self, run: str) -> str:
        """Return a special token as often as its hidden character says; a template may have cut the last one short."""
        string = self._special.strings[ord(run[0]) - FIRST_HIDDEN]
        return (string * (len(run) // len(string) + 1))[: len(run)]
