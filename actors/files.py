"""Files and folders that are whole or not there, whenever a process ends."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it and rename it: it is whole or it is not there."""
    with whole_file(path) as file:
        file.write(content)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write, which is synced and gets the name ``path`` if all goes well and is removed if not."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # process ids repeat between nodes
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield the path of a folder to write, which gets the name ``folder`` if all goes well and is removed if not."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    temporary.rename(folder)


def filesystem_time_ns(folder: Path) -> int:
    """Return the time on the clock that sets mtimes in a folder: on a shared filesystem the server's, not this node's."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="clock-", suffix=".tmp") as file:
        return os.fstat(file.fileno()).st_mtime_ns
