"""Where the traceback of a failure is kept, since the terminal gets a few words only."""

import os
import tempfile
import traceback
from pathlib import Path

from orchestrator.cluster.redaction import without_private_values


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run which has begun."""
    return (folder / "config.yaml").is_file()


def write_traceback(folder: Path, error: BaseException) -> Path | None:
    """Keep the traceback in a folder that is there; None if it cannot be written."""
    path = folder / "error.log"
    try:
        path.write_text(_story(error))
    except OSError:
        return None
    return path


def write_traceback_elsewhere(error: BaseException) -> Path | None:
    """Keep the traceback in a temporary file that only its owner can read; None if there is no place for it."""
    try:
        handle, name = tempfile.mkstemp(prefix="atkd-error-", suffix=".log")
        with os.fdopen(handle, "w") as file:
            file.write(_story(error))
    except OSError:
        return None
    return Path(name)


def _story(error: BaseException) -> str:
    return without_private_values("".join(traceback.format_exception(error)))
