"""Heads of a Ray cluster on ports of their own, and the jobs submitted to them, seen from outside by HTTP."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
START_SECONDS = 120.0


@dataclass(frozen=True)
class LMHead:
    """A head that runs."""

    url: str
    """Of its dashboard, to which jobs are submitted."""
    port: int
    """At which other nodes and drivers find it."""
    environment: dict[str, str] = field(repr=False)
    """Of whoever speaks to it."""

    def ask(self, path: str, token: str | None = None) -> Any:
        """Return the JSON at a path, as whoever holds ``token``; that of the environment unless given."""
        token = self.environment.get("RAY_AUTH_TOKEN", "") if token is None else token
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {token}"} if token else {})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def submit(self, job: str, *command: str, **variables: str) -> "subprocess.Popen[str]":
        """Submit the working tree with a command of ours, and follow the job's output to its end."""
        words = [
            RAY, "job", "submit", "--address", self.url, "--submission-id", job, "--working-dir", ".",
            "--runtime-env-json", json.dumps({"env_vars": variables}), "--", sys.executable, "-m", "orchestrator", *command,
        ]  # fmt: skip
        return subprocess.Popen(
            words, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def stop(self, job: str) -> None:
        """Give the command that stops a job, and wait for it."""
        words = [RAY, "job", "stop", "--address", self.url, job]
        subprocess.run(words, env=self.environment, check=True, capture_output=True, timeout=300)

    def job(self, job: str) -> dict[str, Any]:
        """What Ray knows of a job: ``status``, ``driver_exit_code`` and more."""
        found: dict[str, Any] = self.ask(f"/api/jobs/{job}")
        return found

    def said(self, job: str) -> list[str]:
        """The lines of a job's own output."""
        log: str = self.ask(f"/api/jobs/{job}/logs")["logs"]
        return log.split("Running entrypoint for job", 1)[1].splitlines()[1:]

    def left(self) -> list[str]:
        """The actors and placement groups that are not dead or removed, by class and by number."""
        listed = [self.ask(f"/api/v0/{kind}?limit=1000")["data"]["result"]["result"] for kind in ("actors", "placement_groups")]
        there = [one for found in listed for one in found if one["state"] not in ("DEAD", "REMOVED")]
        return [one.get("class_name") or one["placement_group_id"] for one in there]


@contextlib.contextmanager
def head(**variables: str) -> Iterator[LMHead]:
    """Start a head of two CPUs with a label and a custom resource; end it, and all that came from it, after the body."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # AF_UNIX paths are limited to about 107 bytes
    port, dashboard, agent, client = free_ports(4)
    environment = {**os.environ, **variables, "RAY_TMPDIR": folder}
    words = [
        RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", "--num-cpus=2",
        f"--object-store-memory={200 << 20}", "--labels=role=student", '--resources={"student_node": 2}',
    ]  # fmt: skip
    with open(Path(folder) / "head.log", "w") as log:
        process = psutil.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        running = LMHead(f"http://127.0.0.1:{dashboard}", port, environment)
        wait_until(lambda: answers(running), START_SECONDS, "the head does not answer", process)
        yield running
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with contextlib.ExitStack() as sockets:
        opened = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in opened:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in opened]


def answers(running: LMHead) -> bool:
    """Whether the head takes jobs already."""
    try:
        running.ask("/api/jobs/")
    except (OSError, ValueError):
        return False
    return True


def wait_until(condition: Callable[[], object], seconds: float, otherwise: str, process: Any = None) -> None:
    """Wait for a condition, as long as a process lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"{otherwise}: the process ended with {process.poll()}"
        assert time.monotonic() < deadline, f"{otherwise} within {seconds:.0f} s"
        time.sleep(0.1)


def end(process: psutil.Popen) -> None:
    """End a process and all its children, and theirs."""
    family = [process]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += process.children(recursive=True)
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(family, timeout=30)
