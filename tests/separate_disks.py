"""A cluster whose nodes have disks of their own for their copies: each is a family of processes with its own view of a folder."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.ray_heads import RAY, ROOT, START_SECONDS, end, free_ports, wait_until

CAN = shutil.which("unshare") is not None and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
"""Whether this process may give others a view of the disk of their own."""
STORE = f"--object-store-memory={80 << 20}"


@dataclass
class Node:
    """One node."""

    process: psutil.Popen
    """Its ``ray start``."""
    cache: Path
    """Where it has its copies, as it sees it."""

    def command(self, words: Sequence[str]) -> list[str]:
        """Return a command line that runs a command with this node's view."""
        return ["nsenter", "-t", str(self.process.pid), "-m", f"--wd={ROOT}", *words]

    def files(self) -> list[str]:
        """Return the files of its cache, by their paths within."""
        words = self.command(["find", str(self.cache), "-type", "f", "-printf", "%P\\n"])
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()


@dataclass
class DiskCluster:
    """A cluster with a head that has no CPUs, beside which the driver works."""

    address: str
    """At which drivers find it."""
    environment: dict[str, str] = field(repr=False)
    """Of all that runs in it."""
    cache: Path = field(repr=False)
    """The path of all copies."""
    nodes: list[Node] = field(default_factory=list)
    """The head, and those that were added."""

    def add_node(self, cpus: int = 2) -> Node:
        """Start a node and wait until it is there."""
        count = alive(self)
        node = self._start("--block", f"--address={self.address}", f"--num-cpus={cpus}", STORE)
        wait_until(lambda: alive(self) > count, START_SECONDS, "the node does not come", node.process)
        return node

    def lose_node(self, node: Node) -> None:
        """Kill a node, and wait until the head knows."""
        count = alive(self)
        end(node.process)
        wait_until(lambda: alive(self) < count, START_SECONDS, "the head does not miss the node")

    def begin(self, command: str, *overrides: str) -> "subprocess.Popen[str]":
        """Begin a command of ours on the head."""
        words = [sys.executable, "-m", "orchestrator", command, *overrides]
        environment = {**self.environment, "RAY_ADDRESS": self.address}
        return psutil.Popen(
            self.nodes[0].command(words), env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def _start(self, *words: str) -> Node:
        own = f'mount -t tmpfs none {self.cache} && exec "$@"'
        command = ["unshare", "-m", "--propagation", "private", "sh", "-c", own, "sh", RAY, "start", *words]
        with open(self.cache.parent / f"node-{len(self.nodes)}.log", "w") as log:
            process = psutil.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT)
        self.nodes.append(Node(process, self.cache))
        return self.nodes[-1]


@contextlib.contextmanager
def disk_cluster(cache: Path) -> Iterator[DiskCluster]:
    """Start a head, and let go of it and all that was added; ``cache`` is the path of all copies, and stays empty itself."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # AF_UNIX paths are limited to about 107 bytes
    (port,) = free_ports(1)
    cache.mkdir(parents=True, exist_ok=True)
    settings = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "ATKD_CACHE": str(cache)}
    cluster = DiskCluster(f"127.0.0.1:{port}", {**os.environ, **settings}, cache)
    try:
        head = cluster._start(
            "--head", "--block", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={folder}", STORE
        )
        wait_until(lambda: alive(cluster) >= 1, START_SECONDS, "the head does not answer", head.process)
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            end(node.process)
        shutil.rmtree(folder, ignore_errors=True)


def alive(cluster: DiskCluster) -> int:
    """Return how many nodes the cluster has now; 0 where nobody answers."""
    script = "import ray; ray.init(logging_level=40, log_to_driver=False); print(sum(node['Alive'] for node in ray.nodes()))"
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.address}
    asked = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    return int(asked.stdout) if asked.returncode == 0 else 0
