"""What the files of one model in the cache of one node are asked."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from actors.handles import RemoteMethod

WEIGHTS = "*.safetensors"
WANTED = (WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Files of a model: its weights, its configuration and its tokenizer."""
CODE = "*.py"
"""Wanted too where the model's own code may be run."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came to a node's cache."""

    bytes: int
    """Of files that were not there before."""
    seconds: float
    """How long it took."""


class ModelFiles(ABC):
    """One model's files in the cache of one node. Becomes a Ray actor there, which answers while it fetches.

    Args:
        cache: the folder that nodes share or do not.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._held_before, self._missing_bytes = 0, 0

    @abstractmethod
    def are_here(self) -> bool:
        """Whether the cache holds the whole model; no other machine is asked."""

    @abstractmethod
    def fetch_missing(self) -> str | None:
        """Fetch what is missing; return in words why it could not, None if it could."""

    @abstractmethod
    def held(self) -> int:
        """Return the bytes of the model in the cache, files that are only begun included."""

    @abstractmethod
    def to_come(self) -> int:
        """Return how many bytes are missing; 0 where that is not known."""

    def fetch(self) -> Fetched | str:
        """Fetch what is missing; return what came, or in words why it could not."""
        started = time.monotonic()
        self._held_before = self.held()
        self._missing_bytes = self.to_come()
        failure = self.fetch_missing()
        return failure or Fetched(self.held() - self._held_before, time.monotonic() - started)

    def progress(self) -> tuple[int, int]:
        """Return the bytes that came so far, and how many were missing; 0 where that is not known."""
        return self.held() - self._held_before, self._missing_bytes

    def leave_mark(self, name: str) -> None:
        """Leave an empty file in the cache, by which nodes that share it know each other."""
        self._cache.mkdir(parents=True, exist_ok=True)
        (self._cache / name).touch()

    def marks(self, names: Sequence[str]) -> list[str]:
        """Return which of the marks are in the cache."""
        return [name for name in names if (self._cache / name).exists()]

    def remove_mark(self, name: str) -> None:
        """Take a mark away."""
        (self._cache / name).unlink(missing_ok=True)


class ModelFilesHandle(Protocol):
    """Handle of the actor that ``ModelFiles`` become."""

    @property
    def are_here(self) -> RemoteMethod[[], bool]:
        """See ``ModelFiles.are_here``."""
        ...

    @property
    def leave_mark(self) -> RemoteMethod[[str], None]:
        """See ``ModelFiles.leave_mark``."""
        ...

    @property
    def marks(self) -> RemoteMethod[[Sequence[str]], list[str]]:
        """See ``ModelFiles.marks``."""
        ...

    @property
    def remove_mark(self) -> RemoteMethod[[str], None]:
        """See ``ModelFiles.remove_mark``."""
        ...

    @property
    def fetch(self) -> RemoteMethod[[], Fetched | str]:
        """See ``ModelFiles.fetch``."""
        ...

    @property
    def progress(self) -> RemoteMethod[[], tuple[int, int]]:
        """See ``ModelFiles.progress``."""
        ...
