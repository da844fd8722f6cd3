"""The files of one model on several nodes: who lacks them, who fetches, and how far they have come."""

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.environment import task_environment
from actors.model_cache.base import Fetched, ModelFiles, ModelFilesHandle
from actors.placement import Node, ResourceRequest

ANSWER_SECONDS = 10.0


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

    Args:
        files: the kind of files.
        arguments: what each node's are made of.
        nodes: where the model is to be.
    """

    def __init__(self, files: Callable[..., ModelFiles], arguments: Sequence[object], nodes: Sequence[Node]) -> None:
        actor = ray.remote(files)
        self._names = {node.id: node.name for node in nodes}
        self._actors: dict[str, ModelFilesHandle] = {
            node.id: actor.options(
                num_cpus=0,
                max_concurrency=2,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
                runtime_env={"env_vars": task_environment(1, gpu=False)},
            ).remote(*arguments)
            for node in nodes
        }
        self.fetching: list[ModelFilesHandle] = []
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


def one_of_each_cache(actors: dict[str, ModelFilesHandle]) -> list[str]:
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
def _marked(actors: dict[str, ModelFilesHandle]) -> Iterator[dict[str, str]]:
    """Leave a mark in each node's cache while the body runs; give each node's."""
    marks = {node: f".atkd-{uuid.uuid4().hex}" for node in actors}  # names that a network filesystem was never asked for
    try:
        ray.get([actor.leave_mark.remote(marks[node]) for node, actor in actors.items()])
        yield marks
    finally:
        ray.get([actor.remove_mark.remote(marks[node]) for node, actor in actors.items()])
