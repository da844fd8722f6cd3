"""A hub model's files on the nodes of a cluster: each node's cache gets them once, before anything loads the model.

Replicas and workers would fetch what they miss themselves, while they hold their devices, and without a word of how far it is.
"""

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import ray
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.utils import filter_repo_objects
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.environment import task_environment
from actors.handles import RemoteMethod
from actors.model_source import ModelSource
from actors.placement import Node, ResourceRequest

WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Files of a model: its weights, its configuration and its tokenizer."""
CODE = "*.py"
"""Wanted too where the model's own code may be run."""
UNWANTED = ("*/*.safetensors", "consolidated*.safetensors")
"""The same weights once more, for other programs."""
ANSWER_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came to a node's cache."""

    bytes: int
    """Of files that were not there before."""
    seconds: float
    """How long it took."""


class HubFiles:
    """One model's files in the cache of one node. Becomes a Ray actor there, which answers while it fetches."""

    def __init__(self, model: ModelSource, commit: str) -> None:
        """``commit`` is what the model's revision stands for."""
        self._model, self._commit = model, commit
        self._cache = Path(constants.HF_HUB_CACHE)
        self._folder = self._cache / f"models--{model.name.replace('/', '--')}"
        self._held_before, self._missing_bytes = 0, 0

    def are_here(self) -> bool:
        """Whether the cache holds the model at its commit; no other machine is asked."""
        return is_whole(self._folder / "snapshots" / self._commit)

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

    def fetch(self) -> Fetched | str:
        """Fetch what is missing; return what came, or in words why it could not."""
        started = time.monotonic()
        self._held_before = self._held()
        self._missing_bytes = self._to_come()
        try:
            folder = snapshot_download(
                self._model.name, revision=self._model.revision, allow_patterns=self._patterns(), ignore_patterns=list(UNWANTED)
            )
        except Exception as error:  # some errors of the library cannot travel between processes
            return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
        if not is_whole(Path(folder)):
            return "it has no model.safetensors, and no other weights are read"
        return Fetched(self._held() - self._held_before, time.monotonic() - started)

    def progress(self) -> tuple[int, int]:
        """Return the bytes that came so far, and how many were missing; 0 where that is not known."""
        return self._held() - self._held_before, self._missing_bytes

    def _patterns(self) -> list[str]:
        return [*WANTED, *([CODE] if self._model.trust_remote_code else [])]

    def _held(self) -> int:
        """Return the bytes of the model in the cache, files that are only begun included."""
        total = 0
        for path in (self._folder / "blobs").glob("*"):
            with suppress(OSError):  # renamed meanwhile
                total += path.stat().st_size
        return total

    def _to_come(self) -> int:
        with suppress(Exception):  # only the line of progress needs it
            files = HfApi().model_info(self._model.name, revision=self._model.revision, files_metadata=True).siblings or []
            sizes = {file.rfilename: file.size or 0 for file in files}
            named = filter_repo_objects(sizes, allow_patterns=self._patterns(), ignore_patterns=list(UNWANTED))
            return max(0, sum(sizes[name] for name in named) - self._held_before)
        return 0


class HubFilesHandle(Protocol):
    """Handle of the actor that ``HubFiles`` becomes."""

    @property
    def are_here(self) -> RemoteMethod[[], bool]:
        """See ``HubFiles.are_here``."""
        ...

    @property
    def leave_mark(self) -> RemoteMethod[[str], None]:
        """See ``HubFiles.leave_mark``."""
        ...

    @property
    def marks(self) -> RemoteMethod[[Sequence[str]], list[str]]:
        """See ``HubFiles.marks``."""
        ...

    @property
    def remove_mark(self) -> RemoteMethod[[str], None]:
        """See ``HubFiles.remove_mark``."""
        ...

    @property
    def fetch(self) -> RemoteMethod[[], Fetched | str]:
        """See ``HubFiles.fetch``."""
        ...

    @property
    def progress(self) -> RemoteMethod[[], tuple[int, int]]:
        """See ``HubFiles.progress``."""
        ...


def is_whole(folder: Path) -> bool:
    """Whether a snapshot of the cache has all weights that its index names, or the one file where it has none."""
    index = folder / "model.safetensors.index.json"
    weights = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    return (folder / "config.json").is_file() and all((folder / name).is_file() for name in weights)


def nodes_for(requests: Sequence[ResourceRequest], nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes on which any of these may come to stand: those with room now; all that hold it, for one that must wait.

    Which of several Ray will choose is not known before.
    """
    chosen: dict[str, Node] = {}
    for request in requests:
        holding = [node for node in nodes if request.times_on(node)]
        with_room = [node for node in holding if request.times_in(node.free)]
        chosen |= {node.id: node for node in with_room or holding}
    return list(chosen.values())


class NodeDownloads:
    """The files of one model on several nodes: which lack them, and how far they have come.

    Nodes that share a cache fetch once. A context manager; it ends its actors.
    """

    def __init__(self, model: ModelSource, commit: str, nodes: Sequence[Node]) -> None:
        actor = ray.remote(HubFiles)
        self._names = {node.id: node.name for node in nodes}
        self._actors: dict[str, HubFilesHandle] = {
            node.id: actor.options(
                num_cpus=0,
                max_concurrency=2,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
                runtime_env={"env_vars": task_environment(1, gpu=False)},
            ).remote(model, commit)
            for node in nodes
        }
        self.fetching: list[HubFilesHandle] = []
        """Of the nodes that fetch, one for each cache."""

    def __enter__(self) -> "NodeDownloads":
        here = dict(zip(self._actors, ray.get([actor.are_here.remote() for actor in self._actors.values()]), strict=True))
        lacking = {node: actor for node, actor in self._actors.items() if not here[node]}
        self.fetching = [lacking[node] for node in one_of_each_cache(lacking)]
        return self

    def __exit__(self, *error: object) -> None:
        for actor in self._actors.values():
            ray.kill(actor)

    def fetch(self) -> list[Fetched]:
        """Fetch what is missing, and return what came to each node that fetched.

        Raises:
            RuntimeError: naming a node that could not, and why.
        """
        waiting = {actor.fetch.remote(): actor for actor in self.fetching}
        done: list[Fetched] = []
        while waiting:
            (reference,), _ = ray.wait(list(waiting))
            actor, found = waiting.pop(reference), ray.get(reference)
            if isinstance(found, str):
                node = next(node for node, one in self._actors.items() if one is actor)
                raise RuntimeError(f"on node {self._names[node]} {found}")
            done.append(found)
        return done

    def progress(self) -> tuple[int, int]:
        """Return the bytes that came to all nodes so far, and how many are to come in all."""
        found = ray.get([actor.progress.remote() for actor in self.fetching], timeout=ANSWER_SECONDS)
        return sum(came for came, _ in found), sum(missing for _, missing in found)


def one_of_each_cache(actors: dict[str, HubFilesHandle]) -> list[str]:
    """Return one node of each group whose members see the same cache."""
    if len(actors) < 2:
        return list(actors)
    with _marked(actors) as marks:
        names = list(marks.values())
        seen = {node: ray.get(actor.marks.remote(names)) for node, actor in actors.items()}
    first_of: dict[str, str] = {}
    for node, here in seen.items():
        first_of.setdefault(min(here), node)
    return list(first_of.values())


@contextmanager
def _marked(actors: dict[str, HubFilesHandle]) -> Iterator[dict[str, str]]:
    """Leave a mark in each node's cache while the body runs; give each node's."""
    marks = {node: f".atkd-{uuid.uuid4().hex}" for node in actors}  # names that a network filesystem was never asked for
    try:
        ray.get([actor.leave_mark.remote(marks[node]) for node, actor in actors.items()])
        yield marks
    finally:
        ray.get([actor.remove_mark.remote(marks[node]) for node, actor in actors.items()])
