"""The end of a page: what was asked, and what it ran on. Made from the run's configuration and events."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from actors.format import GIB
from orchestrator.cluster.environment import CLUSTER, PROCESS
from orchestrator.cluster.redaction import without_secrets_within
from orchestrator.reports.page import read_json_lines
from orchestrator.run.run_dir import CHANGED

SHORT_COMMIT = 12


@dataclass(frozen=True, slots=True)
class Command:
    """One process that worked on a run."""

    when: str
    command: str
    stages: tuple[str, ...]
    """What it finished."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What one or several processes ran on."""

    facts: tuple[tuple[str, str], ...]
    """Name and value."""

    commands: tuple[Command, ...]


@dataclass(frozen=True, slots=True)
class About:
    """What was asked, and what it ran on."""

    config: str
    """The whole configuration as YAML, without secrets, as the run began with it."""

    changes: tuple[str, ...]
    """What was said otherwise when the run was resumed, a line for each time."""

    environment: tuple[Environment, ...]
    """Where processes differed in more than their command, one for each; the earliest first."""


def about_run(run_path: Path) -> About | None:
    """Return what is known of a run; None where there is no run."""
    config_path = run_path / "config.yaml"
    if not config_path.exists():
        return None
    config = without_secrets_within(yaml.safe_load(config_path.read_text(encoding="utf-8")))
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    events = read_json_lines(run_path / "events.jsonl")
    return About(text, tuple(changes_of(events)), tuple(environments_of(events)))


def changes_of(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return, for each start with another configuration than the first, when it was and what differed."""
    return [
        f"resumed {_written_time(event['time'])} with {'; '.join(event['changes'])}"
        for event in events
        if event["event"] == CHANGED
    ]


def environments_of(events: Sequence[Mapping[str, Any]]) -> list[Environment]:
    """Return what the processes ran on that finished a stage, and the last one whatever it did."""
    processes: list[tuple[Mapping[str, Any], list[str], list[Mapping[str, Any]]]] = []
    for event in events:
        if event["event"] == PROCESS:
            processes.append((event, [], []))
        elif event["event"] == "stage_finished" and processes:
            processes[-1][1].append(event["stage"])
        elif event["event"] == CLUSTER and processes:
            processes[-1][2].extend(event["nodes"])
    found: dict[tuple[tuple[str, str], ...], list[Command]] = {}
    for index, (process, stages, nodes) in enumerate(processes):
        if stages or index == len(processes) - 1:
            command = Command(_written_time(process["time"]), process["command"], tuple(stages))
            found.setdefault(facts_of(process, nodes), []).append(command)
    return [Environment(facts, tuple(commands)) for facts, commands in found.items()]


def facts_of(process: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Return what a process ran on, as names and values to show; what is not known is left out."""
    commit = process.get("commit")
    facts = {
        "atkd": process.get("atkd"),
        "commit": commit and commit[:SHORT_COMMIT] + (", files changed since" if process.get("changed") else ""),
        "cluster": written_nodes(nodes),
        "driver": _machine(process),
        "system": process.get("platform"),
        "python": process.get("python"),
        **process.get("packages", {}),
    }
    return tuple((name, str(value)) for name, value in facts.items() if value)


def written_nodes(nodes: Sequence[Mapping[str, Any]]) -> str:
    """Return the nodes of a cluster in a line, like ones counted."""
    kinds: dict[str, int] = {}
    for node in nodes:
        kind = f"{node['cpus']:g} CPUs"
        if node["gpus"]:
            kind += f", {node['gpus']:g} GPUs" + (f" ({', '.join(node['accelerators'])})" if node["accelerators"] else "")
        kinds[kind] = kinds.get(kind, 0) + 1
    return "; ".join(f"{count} × {kind}" if count > 1 else f"1 node, {kind}" for kind, count in kinds.items())


def _written_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def _machine(process: Mapping[str, Any]) -> str | None:
    if "processor" not in process:
        return None
    return f"{process['processor']}, {process['cpus']} CPUs, {process['memory_bytes'] / GIB:.0f} GiB"
