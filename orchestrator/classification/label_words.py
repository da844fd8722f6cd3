"""The rows as a language model reads them that answers with label words: prompts, and the words' tokens behind them.

``write_prompts`` leaves ``teacher_train.arrow`` and ``teacher_heldout.arrow``, whose rows are those of ``train.arrow`` and
``heldout.arrow``, and ``label_words.json``. T tokens of a prompt, C classes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.examples import ExampleFile, write_examples
from actors.files import write_atomically
from actors.records import Example
from orchestrator.config.run import RunConfig
from orchestrator.config.sides import LabelWords
from orchestrator.config.task import ClassificationTask
from orchestrator.data.field_templates import field_template
from orchestrator.data.mixture import NumberedRow, read_splits
from orchestrator.data.special_tokens import RowText, SpecialTokens
from orchestrator.data.templates import RenderedRow
from orchestrator.data.tokenization import TokenizedRows, tokenize
from orchestrator.models.model_checks import window_of
from orchestrator.models.models import Models, config_of

KEY = "teacher.label_words"
UNCUT = 1 << 40
"""Tokens that a prompt may have for all the tokenizer cares: a prompt that is cut would end before the answer begins."""
Tokens = tuple[int, ...]
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class AskedRows:
    """What was written of the rows."""

    token_ids: tuple[Tokens, ...]
    """Of each label's word."""
    hashes: dict[str, str]
    """What names a split's prompts and the words behind them, as tokens."""
    longest: int
    """Tokens of the longest prompt, and one that stands for the label."""


def write_prompts(config: RunConfig, models: Models, tokenizer: PreTrainedTokenizerBase, folder: Path) -> AskedRows:
    """Write the rows that were prepared in ``folder`` once more, as the teacher is asked for their labels.

    Raises:
        ValueError: naming the row or the key, if the model is a classifier, a prompt cannot be made, shows the label or is too
            long, or a word does not continue it in tokens of its own.
    """
    require_language_model(models)
    prompts = PromptTokens(config, tokenizer)
    window, hashes, longest = prompt_window(config, models), dict[str, str](), 0
    for split, rows in zip(("train", "heldout"), read_splits(config.data), strict=True):
        by_number, prepared = {row.number: row for row in rows}, ExampleFile(folder / f"{split}.arrow")
        asked, digest = [], hashlib.blake2b(digest_size=16)
        for position in range(len(prepared)):
            example = prepared[position]
            prompt = prompts.of(by_number[example.row])
            _require_room(by_number[example.row], len(prompt), prompts.longest_word, window)
            digest.update(np.int32(len(prompt)).tobytes() + prompt.tobytes())
            label = np.append(prompt, example.targets)
            asked.append(Example(label, np.arange(len(label)) == len(prompt), example.key, example.row))
        digest.update(json.dumps(prompts.words).encode())
        write_examples(folder / f"teacher_{split}.arrow", asked)
        hashes[split], longest = digest.hexdigest(), max(longest, *(len(example.token_ids) for example in asked))
    found = AskedRows(prompts.words, hashes, longest)
    write_atomically(folder / "label_words.json", json.dumps(asdict(found)).encode())
    return found


def read_asked(folder: Path) -> AskedRows:
    """Return what ``write_prompts`` found."""
    content: dict[str, Any] = json.loads((folder / "label_words.json").read_text())
    return AskedRows(**{**content, "token_ids": tuple(tuple(word) for word in content["token_ids"])})


def words_identity(settings: LabelWords, labels: Sequence[str | int], asked: AskedRows, split: str) -> Mapping[str, Any]:
    """Return what the scores of a split depend on besides the teacher and the rows: how it was asked, in text and in tokens."""
    return {"prompt": settings.prompt, "words": list(settings.texts(labels)), "tokens": asked.hashes[split]}


def require_language_model(models: Models) -> None:
    """Raise if the teacher is a classifier, which has a head of its own."""
    kinds = config_of(models.named("teacher"), "teacher.model.name").architectures or []
    if any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ValueError(
            f"{KEY} are the answers of a causal language model, and teacher.model.name {models.named('teacher').name!r} is a "
            f"{kinds[0]}; {KEY}=null would do, or another teacher.model.name"
        )


class PromptTokens:
    """Makes the prompts of rows, and sees to it that each word continues them in the same tokens of its own."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises: ValueError if the prompt is no Jinja template, or reads the label."""
        settings, task = config.teacher.label_words, config.task
        assert settings is not None and isinstance(task, ClassificationTask)
        self._template = field_template(settings.prompt, f"{KEY}.prompt")
        if task.field in self._template.fields:
            raise ValueError(
                f"{KEY}.prompt reads the field {task.field!r}, which is the label (task.field): the teacher would be told the "
                "answer; a prompt without it would do"
            )
        self._tokenizer, self._data = tokenizer, config.data.model_copy(update={"max_tokens": UNCUT})
        self._special = SpecialTokens(tokenizer, config.data.special_tokens)
        self._texts = settings.texts(task.labels)
        self._opening = opening_of(tokenizer)
        self.words: tuple[Tokens, ...] = ()
        """The tokens of each label's word; known once a row was read."""

    @property
    def longest_word(self) -> int:
        """Tokens of the longest word."""
        return max(map(len, self.words))

    def of(self, row: NumberedRow) -> np.ndarray:
        """Return the prompt of a row, int32 [T].

        Raises:
            ValueError: naming the row, and what is wrong with its prompt or the words behind it.
        """
        try:
            prompt, words = self._read(*self._fill(row))
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
        if not self.words:
            require_apart(self._texts, words)
            self.words = words
        if words != self.words:
            place = next(place for place, pair in enumerate(zip(words, self.words, strict=True)) if pair[0] != pair[1])
            raise ValueError(
                f"{row.place}: the tokens of {self._texts[place]!r} ({KEY}.words) are {list(words[place])} behind its prompt, "
                f"and {list(self.words[place])} behind those before: a {KEY}.prompt that ends in one text for all rows would do"
            )
        return prompt

    def _fill(self, row: NumberedRow) -> tuple[str, Spans]:
        """Return a row's prompt, and the stretches in which special tokens are ordinary characters."""
        texts, fields = RowText(self._special), self._template.fields
        treated = {name: texts.treat(value) if name in fields else value for name, value in row.fields.items()}
        prompt = self._template.fill(treated)
        if not prompt:
            raise ValueError(f"{KEY}.prompt is empty for this row: nothing would come before the word; a text around it would do")
        opening = "" if prompt.startswith(self._opening) else self._opening
        return texts.reveal(opening + prompt)

    def _read(self, prompt: str, ordinary: Spans) -> tuple[np.ndarray, tuple[Tokens, ...]]:
        found = self._tokens(prompt, ordinary, self._texts)
        prompts = [example.token_ids[~example.loss_mask] for example in found.examples]
        apart = not found.merged_at_border and not found.without_target
        if not apart or not all(np.array_equal(one, prompts[0]) for one in prompts):
            raise ValueError(self._why_not(prompt, ordinary))
        return prompts[0], tuple(tuple(example.targets.tolist()) for example in found.examples)

    def _tokens(self, prompt: str, ordinary: Spans, words: Sequence[str]) -> TokenizedRows:
        rows = [
            RenderedRow(
                0, prompt + word, ((len(prompt), len(prompt + word)),), prompt, word, None, ordinary_spans=ordinary,
                is_conversation=True,
            )
            for word in words
        ]  # fmt: skip
        return tokenize(rows, self._tokenizer, self._data)

    def _continues(self, prompt: str, ordinary: Spans, word: str) -> bool:
        """Whether the tokens of the prompt stay as they are when the word comes behind it."""
        found = self._tokens(prompt, ordinary, [word])
        return not found.merged_at_border and not found.without_target

    def _why_not(self, prompt: str, ordinary: Spans) -> str:
        word = next((word for word in self._texts if not self._continues(prompt, ordinary, word)), self._texts[0])
        others = [text for text in (f" {word.lstrip()}", word.lstrip()) if text and text != word]
        other = next((text for text in others if self._continues(prompt, ordinary, text)), None)
        remedy = f"{other!r}" if other else f"a {KEY}.prompt that ends without space, and words that begin with one,"
        return (
            f"{KEY}.words has {word!r}, which the tokenizer joins with the end of the prompt, {prompt[-12:]!r}, so that the word "
            f"has no tokens of its own; {remedy} would do"
        )


def opening_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token that a tokenizer puts before every text, as text; empty where there is none."""
    begins = tokenizer.bos_token is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if begins else ""


def require_apart(texts: Sequence[str], words: Sequence[Tokens]) -> None:
    """Raise if the tokens of one word begin those of another: whoever says the longer one has said the shorter one too."""
    for (short_text, short), (text, word) in permutations(zip(texts, words, strict=True), 2):
        if word[: len(short)] == short:
            raise ValueError(
                f"{KEY}.words has {short_text!r} and {text!r}, and the tokens of the first begin those of the second, which "
                "could then never be the likelier one; words that begin otherwise would do"
            )


def prompt_window(config: RunConfig, models: Models) -> int | None:
    """Return how many tokens prompt and word may have; vLLM needs room for one more."""
    by_vllm = config.teacher.engine.kind == "vllm"
    window = window_of(config_of(models.named("teacher"), "teacher.model.name"), by_vllm)
    return None if window is None else window - by_vllm


def _require_room(row: NumberedRow, prompt: int, word: int, window: int | None) -> None:
    if window is not None and prompt + word > window:
        raise ValueError(
            f"{row.place}: its prompt ({KEY}.prompt) has {prompt} tokens and the longest word {word}, and the teacher reads "
            f"{window}; a prompt of {window - word} would do"
        )
