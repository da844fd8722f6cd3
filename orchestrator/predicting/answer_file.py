"""The file of the answers while it is written: whole lines batch by batch, and after a kill the lines that are missing.

answers.jsonl               the answers, once all are there
answers.jsonl.partial       those that are there so far
answers.jsonl.partial.json  by what, of which rows, and how they are made; others are never mixed in
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from actors.files import write_atomically
from orchestrator.config.load import config_difference


class AnswerFile:
    """Lines that become a file when all are there. A context manager; what was written stays if the body raises."""

    def __init__(self, target: Path, identity: Mapping[str, Any], overwrite: bool = False) -> None:
        """Begin the file, or go on with it.

        Args:
            target: the file.
            identity: all that the lines depend on, in plain fields.
            overwrite: whether what is there of others may be replaced.

        Raises:
            ValueError: if it may not, its folder is not there, or another process writes it.
        """
        self._target = target
        self.path = target.with_name(f"{target.name}.partial")
        """Where they are so far."""
        self._identity_path = target.with_name(f"{target.name}.partial.json")
        self._require_place()
        ours = json.loads(json.dumps(identity))
        goes_on = self._goes_on(ours, overwrite)
        self._file = open(self.path, "ab")  # noqa: SIM115  # held open as long as lines are written
        self._lock()
        self.lines = 0
        """Lines that are there."""
        if goes_on:
            self.lines, end = whole_lines(self.path)
            self._file.truncate(end)
        else:
            self._file.truncate(0)
            write_atomically(self._identity_path, json.dumps(ours, indent=1).encode())

    def write(self, lines: Sequence[str]) -> None:
        """Append lines; they are on the disk when this returns."""
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines += len(lines)

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            os.replace(self.path, self._target)
            self._identity_path.unlink(missing_ok=True)
        self._file.close()

    def _require_place(self) -> None:
        folder = self._target.absolute().parent
        if not folder.is_dir():
            raise ValueError(f"--output {self._target}: there is no folder {folder}; one that is there would do")
        if self._target.is_dir():
            raise ValueError(f"--output {self._target} is a folder; a file in it, such as {self._target}/answers.jsonl, would do")

    def _goes_on(self, identity: Mapping[str, Any], overwrite: bool) -> bool:
        """Return whether the lines that are there are of the same answers."""
        if self.path.exists() and self._identity_path.exists():
            theirs = json.loads(self._identity_path.read_text())
            differing = config_difference(identity, theirs, sides=("now", "then"))
            if not differing or overwrite:
                return not differing
            raise ValueError(
                f"{self.path} is a part of other answers; --overwrite would begin anew, or another --output would do:\n  "
                + "\n  ".join(differing)
            )
        if self._target.exists() and not overwrite:
            raise ValueError(f"{self._target} is there already; --overwrite would replace it, or another --output would do")
        return False

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"another process writes {self.path}; wait for it, or another --output would do") from None


def whole_lines(path: Path) -> tuple[int, int]:
    """Return how many lines of a file are whole, and of how many bytes they are; a kill may have cut the last one."""
    count = end = 0
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
    return count, end
