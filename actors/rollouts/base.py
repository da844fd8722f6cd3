"""What an engine that samples is: what it is built from, what it is asked, what it answers.

T tokens of a prompt, N of a response, C candidates.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from actors.config.models import EngineConfig
from actors.model_source import ModelSource
from actors.records import Example, example_key


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int
    """N at most."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Draw from the fewest tokens that hold this share of the mass."""
    seed: int = 0
    """With step, row and sample it gives the random numbers of a response, whatever else is sampled beside it."""


@dataclass(frozen=True, slots=True)
class SamplerSpec:
    """All that an engine is built from."""

    engine: EngineConfig
    """How the model is served."""
    model: ModelSource
    """Who writes; a folder must be one that every node sees."""
    sampling: Sampling
    """How."""
    ends: tuple[int, ...]
    """Tokens at which a response ends; the one that ends it is part of it."""
    longest_prompt: int
    """Tokens of the longest prompt."""
    ids_below: int | None = None
    """Draw no token from this id on: the tokenizer or the student has none. None draws all."""
    candidates: int = 0
    """C: how many of the tokens that the writer holds most likely are noted at each token that it draws."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be continued."""

    token_ids: np.ndarray
    """int32 [T]."""
    row: int
    """Which row of the data it is of."""
    sample: int = 0
    """Which of the row's samples this is."""
    step: int = 0
    """For which optimizer step; 0 where it is for none."""
    written: int = 0
    """Tokens of the response that are there already, at the end of ``token_ids``."""
    most: int | None = None
    """Tokens to add at most, where they are fewer than the sampling allows."""


@dataclass(frozen=True, slots=True)
class Response:
    """What was written."""

    token_ids: np.ndarray
    """int32 [N], the end included where there is one."""
    logprobs: np.ndarray
    """float32 [N], the writer's log-probability of each, before temperature and ``top_p``."""
    ended: bool
    """Whether it ended by itself, and was not cut."""
    candidates: np.ndarray | None = None
    """int32 [N, C], the writer's most likely tokens in the place of each, before temperature and ``top_p``, below ``ids_below``;
    ``NO_TOKEN`` where there are fewer. None where none are wanted."""


class Sampler(Protocol):
    """Something that writes responses. Not thread-safe; one at a time in a process."""

    def sample(self, prompts: Sequence[Prompt]) -> list[Response]:
        """Return a response to each prompt, in their order."""
        ...

    def load(self, model: ModelSource) -> None:
        """Write by other weights of the same model from now on; nothing of the old ones may be remembered."""
        ...

    def logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """Return the log-probability of each token of a text but the first, float32 [T-1]."""
        ...

    def close(self) -> None:
        """Give the device back."""
        ...


SamplerFactory = Callable[[SamplerSpec], Sampler]


def most_tokens(sampling: Sampling, prompt: Prompt) -> int:
    """Return how many tokens are added to a prompt at most."""
    return sampling.max_new_tokens if prompt.most is None else prompt.most


def seed_of(sampling: Sampling, prompt: Prompt) -> int:
    """Return the seed of a response, from 0 to 2**63 - 1."""
    content = f"{sampling.seed} {prompt.step} {prompt.row} {prompt.sample}"
    if prompt.written:
        content += f" {prompt.written}"  # what is continued draws anew
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little") >> 1


def written_row(prompt: Prompt, response: Response) -> Example:
    """Return the row of a prompt and its response, whose tokens are the targets."""
    token_ids = np.concatenate([prompt.token_ids, response.token_ids]).astype(np.int32)
    loss_mask = np.arange(len(token_ids)) >= len(prompt.token_ids)
    return Example(token_ids, loss_mask, example_key(token_ids, loss_mask), prompt.row, response.candidates)
