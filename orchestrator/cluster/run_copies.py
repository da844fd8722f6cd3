"""A run's folder in object storage: who works in it, and the copies of it that the nodes of the cluster have."""

import logging
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.config.places import within
from actors.environment import task_environment
from actors.score_store.leases import LEASE_SECONDS
from actors.score_store.object_leases import ObjectLeases
from actors.storage.mirror import SECONDS, Mirror
from actors.storage.object_folder import ObjectFolder

logger = logging.getLogger("atkd")

CLAIM_SECONDS = 2.0
"""Between two looks whether the claim is to be renewed."""
TIDY_SECONDS = 30.0
"""How long nodes have to remove what is needed no more."""


class RunCopies:
    """The copies of one run's folder while a process works in it, which keeps this node's alike and others' when it is told.

    Args:
        mirror: the folder, and its address.
    """

    def __init__(self, mirror: Mirror) -> None:
        self._mirror, self._done, self._ended = mirror, threading.Event(), threading.Event()
        self._claim = ObjectLeases(ObjectFolder(within(mirror.address, "driver")))
        self._claiming = threading.Thread(target=self._keep_claim, name="claim", daemon=True)
        self._syncing = threading.Thread(target=self._keep_alike, name="mirror", daemon=True)

    def begin(self) -> bool:
        """Claim the run and get its files; False if another process works in it.

        Raises:
            ValueError: if the storage refuses.
            StorageError: if the storage does not answer.
        """
        if not self._claim.take(0):
            self._claim.release_all()
            return False
        self._claiming.start()  # the files may take longer to come than a claim lives
        try:
            self._mirror.sync(whole=True)
        except BaseException:
            self._give_back()
            raise
        self._syncing.start()
        return True

    def share(self) -> None:
        """Let all nodes have what was written on this one.

        Raises:
            ValueError: if another process has taken the run over, or a node cannot get the files.
        """
        self._require_claim()
        self._mirror.sync()
        sync_other_nodes(self._mirror)

    def gather(self) -> None:
        """Get what was written on other nodes.

        Raises:
            ValueError: as ``share`` does.
        """
        self._require_claim()
        sync_other_nodes(self._mirror)
        self._mirror.sync()

    def end(self) -> None:
        """Put what is not there yet, and let another process work in the run."""
        self._done.set()
        self._syncing.join()
        try:
            if self._claim.held:
                self._mirror.sync()
        finally:
            self._give_back()

    def _give_back(self) -> None:
        self._ended.set()
        self._claiming.join()
        self._claim.release_all()

    def _require_claim(self) -> None:
        if not self._claim.held:
            raise ValueError(
                f"another process has taken over {self._mirror.address}, since nothing was heard of this one for "
                f"{LEASE_SECONDS:.0f} seconds; the same command goes on when that one has ended"
            )

    def _keep_claim(self) -> None:
        while not self._ended.wait(CLAIM_SECONDS):
            try:
                self._claim.refresh()
            except (OSError, ValueError) as error:
                logger.warning("cannot renew the claim on %s: %s", self._mirror.address, error)

    def _keep_alike(self) -> None:
        """Sync this node every so often, for those who watch and for a later start."""
        while not self._done.wait(SECONDS):
            try:
                if self._claim.held:
                    self._mirror.sync()
            except (OSError, ValueError) as error:
                logger.warning("cannot keep %s alike: %s", self._mirror.address, error)


@contextmanager
def nodes_kept_alike(mirror: Mirror | None) -> Iterator[None]:
    """Sync all nodes now, and those that join while the body runs as they come; without a mirror do nothing. Needs Ray.

    Raises:
        ValueError: naming the nodes that cannot be, and why.
    """
    if mirror is None:
        yield
        return
    known: set[str] = set()
    sync_other_nodes(mirror, known)
    done = threading.Event()
    thread = threading.Thread(target=_sync_new_nodes, args=(done, mirror, known), name="new nodes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()  # before Ray goes


def _sync_new_nodes(done: threading.Event, mirror: Mirror, known: set[str]) -> None:
    while not done.wait(SECONDS):
        try:
            sync_other_nodes(mirror, known)
        except (OSError, ValueError, RayError) as error:
            logger.warning("%s", error)


def sync_other_nodes(mirror: Mirror, known: set[str] | None = None) -> None:
    """Sync the copies of all nodes but this one, or of those that are not among the ``known``, to which they are added.

    Raises:
        ValueError: naming the nodes that cannot, and why.
    """
    if not ray.is_initialized():
        return
    nodes = _other_nodes()
    new = {node: name for node, name in nodes.items() if known is None or node not in known}
    syncing = {node: ray.remote(_sync).options(**_on(node)).remote(mirror) for node in new}
    troubles = {}
    for node, answer in syncing.items():
        try:
            ray.get(answer)
        except RayTaskError as error:
            troubles[node] = str(error.cause)
        except RayError as error:
            if any(other["NodeID"] == node and other["Alive"] for other in ray.nodes()):
                troubles[node] = str(error)
    if known is not None:
        known |= {*new} - {*troubles}
    if troubles:
        told = "; ".join(f"{nodes[node]}: {trouble}" for node, trouble in troubles.items())
        raise ValueError(f"{mirror.address} cannot be copied to {len(troubles)} of {len(nodes) + 1} nodes: {told}")


@dataclass(frozen=True, slots=True)
class PassingFolder:
    """A folder for a while, by which this process and tasks on any node hand each other files."""

    path: Path
    """Where it is on each node."""
    root: str
    """Path or address of a folder for what stands where all see it."""
    mirror: Mirror | None = None
    """How the nodes' copies of the former are kept alike; None where they all see the one."""

    def share(self) -> None:
        """Let all nodes have what was written on this one.

        Raises:
            ValueError: if a node cannot get the files.
        """
        if self.mirror is not None:
            self.mirror.sync()
            sync_other_nodes(self.mirror)

    def place(self, name: str) -> str:
        """Return the path or address of something that all see where it is."""
        return within(self.root, name)


@contextmanager
def passing_folder(parent: Path, address: str | None, prefix: str) -> Iterator[PassingFolder]:
    """Have a folder for what goes from node to node; it goes with the body. Needs Ray where it is in object storage.

    Args:
        parent: folder in which it is made.
        address: of that folder, if each node has a copy of its own.
        prefix: of its name.
    """
    if address is None:
        with tempfile.TemporaryDirectory(prefix=prefix, suffix=".tmp", dir=parent, ignore_cleanup_errors=True) as folder:
            yield PassingFolder(Path(folder), folder)
        return
    name = f"{prefix}{uuid.uuid4().hex[:12]}.tmp"  # which the copies of the parent leave out
    here, root = parent / name, within(address, name)
    mirror = Mirror(str(here / "passed"), within(root, "passed"))
    Path(mirror.folder).mkdir(parents=True)
    try:
        yield PassingFolder(Path(mirror.folder), root, mirror)
    finally:
        tidy_on_all_nodes(shutil.rmtree, str(here), True)
        ObjectFolder(address).remove_folder(name)


def tidy_on_all_nodes(tidy: Callable[..., None], *given: Any) -> None:
    """Have something removed on each node that answers soon. Needs Ray."""
    tidy(*given)
    with suppress(RayError):  # what failed before is what matters
        if tidying := [ray.remote(tidy).options(**_on(node)).remote(*given) for node in _other_nodes()]:
            ray.wait(tidying, num_returns=len(tidying), timeout=TIDY_SECONDS)


def _other_nodes() -> dict[str, str]:
    """Return the addresses of all nodes but this one, by their ids."""
    here = ray.get_runtime_context().get_node_id()
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here}


def _on(node: str) -> dict[str, Any]:
    return {
        "num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        "runtime_env": {"env_vars": task_environment(1, gpu=False)},
    }  # fmt: skip


def _sync(mirror: Mirror) -> None:
    mirror.sync()


def place_of(mirror: Mirror | None, path: Path) -> str:
    """Return where a file of a run stands for all: at its address, or its path."""
    if mirror is None or not path.is_relative_to(mirror.folder):
        return str(path)
    return within(mirror.address, path.relative_to(mirror.folder).as_posix())
