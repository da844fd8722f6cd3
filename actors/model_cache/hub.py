"""A hub model's files in the cache of a node, fetched by huggingface_hub."""

import json
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.utils import filter_repo_objects

from actors.model_cache.base import CODE, WANTED, ModelFiles
from actors.model_source import ModelSource

UNWANTED = ("*/*.safetensors", "consolidated*.safetensors")
"""The same weights once more, for other programs."""


class HubFiles(ModelFiles):
    """A model of the hub in the cache that huggingface_hub keeps on a node."""

    def __init__(self, model: ModelSource, commit: str) -> None:
        """``commit`` is what the model's revision stands for."""
        super().__init__(Path(constants.HF_HUB_CACHE))
        self._model, self._commit = model, commit
        self._folder = self._cache / f"models--{model.name.replace('/', '--')}"

    def are_here(self) -> bool:
        """Whether the cache holds the model at its commit."""
        return is_whole(self._folder / "snapshots" / self._commit)

    def fetch_missing(self) -> str | None:
        """Fetch what is missing; return in words why it could not, None if it could."""
        try:
            folder = snapshot_download(
                self._model.name, revision=self._model.revision, allow_patterns=self._patterns(), ignore_patterns=list(UNWANTED)
            )
        except Exception as error:  # some errors of the library cannot travel between processes
            return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
        return None if is_whole(Path(folder)) else "it has no model.safetensors, and no other weights are read"

    def held(self) -> int:
        """Return the bytes of the model in the cache, files that are only begun included."""
        total = 0
        for path in (self._folder / "blobs").glob("*"):
            with suppress(OSError):  # renamed meanwhile
                total += path.stat().st_size
        return total

    def to_come(self) -> int:
        """Return how many bytes are missing; 0 where the hub does not say."""
        with suppress(Exception):  # only the line of progress needs it
            files = HfApi().model_info(self._model.name, revision=self._model.revision, files_metadata=True).siblings or []
            sizes = {file.rfilename: file.size or 0 for file in files}
            named = filter_repo_objects(sizes, allow_patterns=self._patterns(), ignore_patterns=list(UNWANTED))
            return max(0, sum(sizes[name] for name in named) - self.held())
        return 0

    def _patterns(self) -> list[str]:
        return [*WANTED, *([CODE] if self._model.trust_remote_code else [])]


def is_whole(folder: Path) -> bool:
    """Whether a snapshot of the cache has all weights that its index names, or the one file where it has none."""
    index = folder / "model.safetensors.index.json"
    weights = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    return (folder / "config.json").is_file() and all((folder / name).is_file() for name in weights)
