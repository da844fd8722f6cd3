"""A causal language model that tells labels apart by what it would answer: of each label its word is looked at.

R rows, C classes, W tokens of a word. A row's token ids are a prompt with the row's label behind it, as classifiers have them;
what the model reads is the prompt with the tokens of a word. The log-probability of a class is that of its word, summed over the
word's tokens and normalised over the C words: the model might say other things, and how likely those are drops out.

Each row is read C times. The prompt is computed anew every time, in vLLM too: a prefix from its cache has no log-probabilities.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from actors.engines.base import TeacherEngine, TeacherSpec, require_top_k, scores_from_likeliest
from actors.records import Example, TeacherScores, example_key

OTHERS = 1
"""Tokens that the language model is asked to name beside each of a word's: none is read, and one is the least."""


class LabelWordsEngine:
    """Scores rows with an engine of language models, ``rows_per_call`` prompts with a word at once."""

    def __init__(self, spec: TeacherSpec, build: Callable[[TeacherSpec], TeacherEngine]) -> None:
        """``build`` loads the language model that answers.

        Raises:
            ValueError: if more others are to be kept than there are labels besides a row's own.
        """
        self._words = [np.array(word, dtype=np.int32) for word in spec.label_words]
        self.vocab_size = len(self._words)
        require_top_k(spec.top_k, self.vocab_size)
        longest = spec.longest_row - 1 + max(map(len, self._words))
        self._engine = build(replace(spec, top_k=OTHERS, longest_row=longest, ids_below=None, label_words=()))
        self._spec = spec
        self.way = f"{self._engine.way}; {self.vocab_size} label words"

    def score(self, examples: Sequence[Example]) -> list[TeacherScores]:
        """Return the scores of each row, in their order."""
        asked = [asked_of(example, word) for example in examples for word in self._words]
        step, answered = self._spec.engine.rows_per_call, list[TeacherScores]()
        for first in range(0, len(asked), step):
            answered += self._engine.score(asked[first : first + step])
        of_words = np.array([answer.target_logprob.sum(dtype=np.float64) for answer in answered])
        logprobs = normalised(of_words.reshape(len(examples), self.vocab_size) / self._spec.temperature)  # [R, C]
        return [self._scores_of(example, logprobs[row]) for row, example in enumerate(examples)]

    def close(self) -> None:
        """Give the device back."""
        self._engine.close()

    def _scores_of(self, example: Example, logprobs: np.ndarray) -> TeacherScores:
        ranked = np.argsort(-logprobs, kind="stable")
        scores = scores_from_likeliest(example, logprobs[example.targets], ranked[None], logprobs[ranked][None], self._spec)
        assert scores is not None, "all classes are named"
        return scores


def asked_of(example: Example, word: np.ndarray) -> Example:
    """Return what the language model reads of a row to answer with a word, int32 [W]: its tokens are the targets."""
    prompt = example.token_ids[:-1]
    token_ids = np.concatenate([prompt, word])
    loss_mask = np.arange(len(token_ids)) >= len(prompt)
    return Example(token_ids, loss_mask, example_key(token_ids, loss_mask), example.row)


def normalised(logprobs: np.ndarray) -> np.ndarray:
    """Return float64 [R, C] of which each row's mass is one, from log-probabilities [R, C] of words among all texts."""
    highest = logprobs.max(axis=1, keepdims=True)
    return logprobs - highest - np.log(np.exp(logprobs - highest).sum(axis=1, keepdims=True))
