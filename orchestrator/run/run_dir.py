"""The folder of a run: what was asked, what was done, and what is still to do.

config.yaml     the whole configuration, defaults included
events.jsonl    a line for whatever happened; run.log has the lines of the terminal
stages/         a file for each finished stage, with what it made
data/ tokenizer/ models/ scores.json metrics/ checkpoints/ evaluation/ student/ table.json report.html
checkpoints.json in the place of checkpoints/ where those stand elsewhere

A folder in object storage is worked in through this node's copy.
"""

import copy
import fcntl
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from actors.config.places import in_object_storage, within
from actors.config.tracking import require_installed
from actors.files import write_atomically
from losses.section import MayChange, marked
from orchestrator.cluster.logs import close_log_file, open_log_file
from orchestrator.cluster.redaction import without_secrets_within
from orchestrator.cluster.run_copies import RunCopies
from orchestrator.config.load import config_difference, dump_config
from orchestrator.config.run import RunConfig

logger = logging.getLogger("atkd")

CHANGED = "configuration_changed"
"""Name of the event of a start that says something else than the first, as far as it may."""

Facts = dict[str, Any]
"""What a stage leaves for later ones: plain JSON."""

SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What Ray sets in the environment of a driver that was started by ``ray job submit``."""

MAY_CHANGE = tuple(path for path, _ in marked(RunConfig, MayChange))
"""Keys and sections that may change between two starts of a run."""
CUT_INTO_PASSES = ("workers.count", "train.micro_batch_rows", "train.micro_batch_tokens", "train.packing")
"""What may not after all, where the loss depends on how a step is cut into forward passes."""


class RunDirError(ValueError):
    """The run's folder cannot be used for this configuration."""


class RunDir:
    """Books of one run. Only one process at a time may hold them.

    Args:
        path: the folder, or this node's copy of it.
        place: the folder, or its address.
    """

    def __init__(self, path: Path, place: str | None = None) -> None:
        self.path, self.place = path, place or str(path)
        self._log: logging.Handler | None = None
        self._copies: RunCopies | None = None

    @classmethod
    def open(cls, config: RunConfig) -> "RunDir":
        """Begin the run's folder, or resume it.

        Raises:
            RunDirError: if another process holds it, it was made by another configuration, or it would go with the job.
            ValueError: if a tracker is asked for and not installed.
        """
        require_installed(config.tracking)
        relative = not in_object_storage(config.output) and not Path(config.output).expanduser().is_absolute()
        if os.environ.get(SUBMITTED_JOB) and relative:
            raise RunDirError(
                f"output {config.output!r} is relative, and a submitted job works in Ray's copy of the working directory, which "
                "goes with it; output=/a/folder/that/all/nodes/see would do"
            )
        path = config.run_dir
        (path / "stages").mkdir(parents=True, exist_ok=True)
        run_dir = cls(path, config.place)
        run_dir._lock()
        if config.mirror is not None:
            run_dir._claim(RunCopies(config.mirror))
        run_dir._log = open_log_file(path)
        config_path = path / "config.yaml"
        if not config_path.exists():
            write_atomically(config_path, dump_config(config).encode())
            return run_dir
        ours, theirs = config.model_dump(mode="json"), yaml.safe_load(config_path.read_text())
        if lines := other_configuration(ours, theirs):
            run_dir.close()
            raise RunDirError(
                f"{path} was made by another configuration; give this run another name (name=...) or delete the folder:\n  "
                + "\n  ".join(lines)
            )
        if lines := config_difference(ours, theirs, sides=("now", "at first")):
            run_dir.event(CHANGED, changes=lines)
        return run_dir

    def stage(self, name: str, work: Callable[[], Facts]) -> Facts:
        """Return what a stage made, doing its work only if that is not there yet."""
        if (facts := self.result(name)) is not None:
            logger.info(f"{name}: done before")
            return facts
        self.event("stage_started", stage=name)
        self.share()
        started = time.monotonic()
        facts = {**work(), "seconds": round(time.monotonic() - started, 2)}
        self.finish(name, facts)
        return facts

    def finish(self, name: str, facts: Facts) -> None:
        """Record a stage as done."""
        write_atomically(result_path(self.path, name), json.dumps(facts, indent=1).encode())
        self.event("stage_finished", stage=name, **facts)
        self.gather()
        logger.info(f"{name}: done in {facts['seconds']:.1f} s")

    def result(self, name: str) -> Facts | None:
        """Return what a finished stage made; None if it is not finished."""
        path = result_path(self.path, name)
        return json.loads(path.read_text()) if path.exists() else None

    def event(self, name: str, **fields: Any) -> None:
        """Append a line to the event log; it holds no secrets."""
        line = {"time": time.time(), "event": name, **without_secrets_within(fields)}
        logger.debug(json.dumps({key: value for key, value in line.items() if key != "time"}))
        with open(self.path / "events.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def share(self) -> None:
        """Let all nodes have what stands in the folder on this one, where each has a copy."""
        if self._copies is not None:
            self._copies.share()

    def gather(self) -> None:
        """Have in the folder what was written to it on other nodes, where each has a copy."""
        if self._copies is not None:
            self._copies.gather()

    def checkpoints(self, root: str | None) -> str:
        """Return where trainings keep their checkpoints: below a root under a name that only this run has, or in its folder."""
        if root is None:
            return within(self.place, "checkpoints")
        pointer = self.path / "checkpoints.json"
        if not pointer.exists():  # drawn, since another folder of the same name may have left some there
            write_atomically(pointer, json.dumps({"place": within(root, f"{self.path.name}-{uuid.uuid4().hex[:12]}")}).encode())
        place: str = json.loads(pointer.read_text())["place"]
        return place

    def close(self) -> None:
        """Let another process take the folder."""
        if self._log is not None:
            close_log_file(self._log)
        try:
            if self._copies is not None:
                self._copies.end()
        finally:
            self._lock_file.close()

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is not None:
            with suppress(OSError):  # on a full disk the error itself matters, not that it could not be written down
                self.event("ended_by_error", error=f"{kind.__name__}: {error}")
        try:
            self.close()
        except (OSError, ValueError) as failure:
            if kind is None:
                raise
            logger.warning(f"what this run wrote last is in {self.path} alone: {failure}")

    def _claim(self, copies: RunCopies) -> None:
        """Claim a run in object storage and get its files."""
        try:
            if copies.begin():
                self._copies = copies
                return
        except BaseException:
            self._lock_file.close()
            raise
        self._lock_file.close()
        raise RunDirError(
            f"another process works in {self.place}, or was lost less than a minute ago; wait for it, or give this run another "
            "name (name=...)"
        )

    def _lock(self) -> None:
        self._lock_file = open(self.path / "lock", "w")  # noqa: SIM115  # held open as long as the run lives
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.close()
            raise RunDirError(
                f"another process works in {self.path}; wait for it, or give this run another name (name=...)"
            ) from None


def result_path(folder: Path, stage: str) -> Path:
    """Return the file that stands in a run's folder once a stage is finished."""
    return folder / "stages" / f"{stage}.json"


def other_configuration(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return a line for each key in which two dumped configurations differ although one run has it from its start to its end."""
    return config_difference(_of_the_run(ours), _of_the_run(theirs))


def _of_the_run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dumped configuration without what may change between two starts."""
    kept: dict[str, Any] = copy.deepcopy(dict(settings))
    for path in MAY_CHANGE:
        section, name = _section_of(kept, path)
        section.pop(name, None)
    if settings["loss"].get("scope") == "microbatch":
        for path in CUT_INTO_PASSES:
            section, name = _section_of(settings, path)
            kept[path] = section.get(name) or None  # what is off and what is not there are the same
    return kept


def _section_of(settings: Mapping[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """Return the section in which a dotted path ends, empty if it is not there, and the path's last name."""
    *sections, name = path.split(".")
    inner: Any = settings
    for section in sections:
        inner = inner.get(section) or {}
    return inner, name
