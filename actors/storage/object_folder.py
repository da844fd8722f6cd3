"""A folder in object storage, by pyarrow's filesystems: whatever a put has written is whole, and a name that is written last
publishes the others. Listings, puts and removals must be seen at once by all, as they are on S3, Google's and Azure's storage.
"""

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import pyarrow as pa

from actors.config.places import within
from actors.storage.clouds import FileInfo, FileSystem, FileType, open_storage
from actors.storage.local_copies import FOLDER, LIMIT, LocalCopies, cache_folder

logger = logging.getLogger("atkd")

Result = TypeVar("Result")
PATIENCE_SECONDS = 90.0
"""For how long a request is tried again, beside the few tries of the library itself."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0
FETCHED_AT_ONCE = 16
READ_BYTES = 8 << 20

EXAMPLES = {
    "s3": "s3://bucket/folder", "gs": "gs://bucket/folder", "abfs": "abfs://container@account.dfs.core.windows.net/folder",
    "abfss": "abfss://container@account.dfs.core.windows.net/folder",
}  # fmt: skip
REFUSALS = (
    (r"NO_SUCH_BUCKET|bucket does not exist|Bucket '.*' not found|[Cc]ontainer .*not exist|ContainerNotFound",
     "there is no such bucket; make it, or name another"),
    (r"INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|InvalidAccessKeyId|ExpiredToken|EXPIRED_TOKEN|UNAUTHENTICATED|AuthenticationFailed"
     r"|[Ff]ailed to authenticate",
     "the keys are not valid there; other ones in this node's environment would do (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
     "GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_CONNECTION_STRING, or the role of the machine)"),
    (r"ACCESS_DENIED|PERMISSION_DENIED|HTTP status 403|Authorization(Failure|\w+Mismatch)|\w+NotPermitted|[Ff]orbidden",
     "access is denied: keys are missing in this node's environment, or their owner may not list, get, put and delete "
     "objects there"),
    (r"PERMANENT_REDIRECT|PermanentRedirect|HTTP status 301|AuthorizationHeaderMalformed|wrong region|region.*is wrong",
     "the bucket is in another region; AWS_REGION=… in the environment, or ?region=… at the end of the address, would do"),
    (r"InvalidBucketName|HTTP status 400", "the address is not accepted; s3://bucket/folder would do"),
)  # fmt: skip
"""What storage says to those who ask in vain, and what would do; whatever else it says is taken for a passing trouble."""
NO_KEYS = (
    r"Could not create a OAuth2 access token|AuthenticationException|failed to retrieve a token",
    "no keys are found, or nobody is there to change them for a token; GOOGLE_APPLICATION_CREDENTIALS, "
    "AZURE_STORAGE_CONNECTION_STRING or their like in this node's environment would do, or the role of the machine",
)
"""The same of those who have nothing to show; to who has been let in, a passing trouble too."""
SIGNATURE = re.compile(r"(?<=sig=)[^&\s'\"]+")
"""The secret part of an address that Azure's library was given."""


class StorageError(OSError):
    """Object storage did not answer, or did not let a file be read or written."""


class ObjectFolder:
    """A folder in object storage.

    Args:
        place: its address, as ``places.resolved`` returns it.

    Raises:
        ValueError: if it cannot be used with what the environment holds.
    """

    poll_seconds = 1.0

    def __init__(self, place: str) -> None:
        self.place, self._was_let_in = place, False
        self._copies = LocalCopies(place)
        try:
            self._storage, self._path = self._patiently("open", lambda: open_storage(place))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{place} is not accepted: {error}; {EXAMPLES[urlsplit(place).scheme]} would do") from error
        self._files = self._storage.filesystem

    def opened(self) -> tuple[str, FileSystem]:
        """Return the folder's path and the filesystem in which it is one, for libraries that speak to pyarrow's."""
        return self._path, self._files

    def place_of(self, name: str) -> str:
        """Return the address of a file."""
        return within(self.place, name)

    def begin(self) -> None:
        """Do nothing: there are no folders, only names."""

    def folders(self) -> list[str]:
        """Return the names of the folders within, sorted."""
        return sorted(info.base_name for info in self._list() if info.type == FileType.Directory)

    def names(self) -> list[str]:
        """Return the names of all that is there."""
        return [info.base_name for info in self._list()]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file that is there, by one listing."""
        return {info.base_name: info.size for info in self._list() if info.type == FileType.File}

    def size(self, name: str) -> int | None:
        """Return a file's bytes; None if it is not there."""
        return self._patiently(f"look for {name}", lambda: self._size(name))

    def written_ns(self, inner: str) -> dict[str, int]:
        """Return when each file below an inner folder, or in the folder itself, was last written, in nanoseconds of the storage's
        own clock."""
        files = (info for info in self._list(inner) if info.type == FileType.File)
        return {info.path.removeprefix(f"{self._path}/"): info.mtime_ns for info in files}

    def files(self) -> dict[str, tuple[int, int]]:
        """Return, for each file in the folder and below it, its bytes, and when it was written by the storage's own clock, in
        nanoseconds."""
        found = self._patiently("list files", lambda: self._storage.entries(self._path, recursive=True))
        files = (info for info in found if info.type == FileType.File)
        return {info.path.removeprefix(f"{self._path}/"): (info.size, info.mtime_ns) for info in files}

    def read(self, name: str) -> bytes:
        """Return what a file holds now."""
        return self._patiently(f"read {name}", lambda: self._read(name))

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """Return what some files hold now, read many at once."""
        with ThreadPoolExecutor(FETCHED_AT_ONCE) as threads:
            return list(threads.map(self.read, names))

    def copy_of(self, name: str) -> Path:
        """Return this node's copy of a file, made if need be.

        Raises:
            FileNotFoundError: if the file is not there.
            ValueError: if there is no room for a copy.
        """
        if (copy := self._copy(name)) is None:
            raise ValueError(
                f"{self.place_of(name)} has {self.size(name):,} bytes, for which this node's cache, {cache_folder()}, has no "
                f"room; {LIMIT} in its environment sets how many GiB it holds, {FOLDER} where it is"
            )
        return copy

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes of a file from ``start`` up to ``end``, from this node's copy where there is room for one."""
        copy = self._copy(name)
        if copy is not None:
            try:
                with open(copy, "rb") as file:
                    return os.pread(file.fileno(), end - start, start)
            except FileNotFoundError:
                pass  # evicted since
        return self._patiently(f"read {name}", lambda: self._read_range(name, start, end))

    def mapped(self, name: str) -> pa.Buffer:
        """Return a file as a map of this node's copy, or in memory where there is no room for one."""
        copy = self._copy(name)
        if copy is not None:
            try:
                return pa.memory_map(str(copy)).read_buffer()
            except FileNotFoundError:
                pass  # evicted since
        return pa.py_buffer(self.read(name))

    def fetch(self, names: Iterable[str]) -> None:
        """Copy files to this node, many at once."""
        with ThreadPoolExecutor(FETCHED_AT_ONCE) as threads:
            list(threads.map(self._fetch, names))

    def forget(self, names: Iterable[str]) -> bool:
        """Drop this node's copies of files; whether there were any."""
        return any([self._copies.drop(name) for name in names])

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Put a file; it is whole or it is not there."""
        self._patiently(f"write {name}", lambda: self._storage.write(self._key(name), content))

    def upload(self, path: Path, name: str | None = None) -> None:
        """Put a file of the disk, of any size, under its own name or another; what was there before stays until all has arrived.

        A large one is mapped, and must not be cut short meanwhile.
        """
        large = path.stat().st_size > READ_BYTES
        self.write(name or path.name, pa.memory_map(str(path)).read_buffer() if large else path.read_bytes())

    def download(self, name: str, path: Path) -> None:
        """Copy a file of any size to a path on the disk, outside of the node's copies.

        Raises:
            FileNotFoundError: if it is not there.
        """
        self._patiently(f"read {name}", lambda: self._download(name, path))

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self._copies.drop(name)
        self._patiently(f"remove {name}", lambda: self._storage.remove(self._key(name)))

    def remove_folder(self, name: str) -> None:
        """Remove all that stands below a name, as far as it is there."""
        self._patiently(f"remove {name}", lambda: self._storage.remove_folder(self._key(name)))

    def remove_leftovers(self, idle_seconds: float) -> None:
        """Do nothing: an upload that was cut short is not there. Its parts go by the bucket's own rule for such."""

    def _fetch(self, name: str) -> None:
        try:
            self._copy(name)
        except FileNotFoundError:
            return

    def _copy(self, name: str) -> Path | None:
        """Return this node's copy of a file, made if need be; None where there is no room for it."""
        if (copy := self._copies.find(name)) is not None:
            return copy
        if (size := self.size(name)) is None:
            raise FileNotFoundError(self.place_of(name))
        return self._copies.keep(name, size, lambda: self.read(name))

    def _list(self, inner: str = "") -> list[FileInfo]:
        """List the folder itself, or all that stands below an inner one."""
        path = self._key(inner) if inner else self._path
        return self._patiently("list files", lambda: self._storage.entries(path, recursive=bool(inner)))

    def _key(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _size(self, name: str) -> int | None:
        """Return a file's bytes by one request, where the library's ``get_file_info`` takes two for one that is not there."""
        try:
            with self._files.open_input_file(self._key(name)) as file:
                return int(file.size())
        except FileNotFoundError:
            return None

    def _read(self, name: str) -> bytes:
        with self._files.open_input_stream(self._key(name)) as file:
            content: bytes = file.read()
        return content

    def _download(self, name: str, path: Path) -> None:
        with self._files.open_input_stream(self._key(name)) as file, open(path, "wb") as copy:
            shutil.copyfileobj(file, copy, READ_BYTES)

    def _read_range(self, name: str, start: int, end: int) -> bytes:
        with self._files.open_input_file(self._key(name)) as file:
            content: bytes = file.read_at(min(end, file.size()) - start, start) if start < file.size() else b""
        return content

    def _patiently(self, what: str, request: Callable[[], Result]) -> Result:
        """Make a request until it succeeds, is refused, or has failed for ``PATIENCE_SECONDS``.

        Raises:
            ValueError: if it is refused; naming what would do.
            StorageError: if it fails for longer.
        """
        start, pause = time.monotonic(), FIRST_PAUSE_SECONDS
        while True:
            try:
                answer = request()
            except (FileNotFoundError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise
            except (OSError, pa.ArrowException) as error:
                said = SIGNATURE.sub("…", " ".join(str(error).split()))
                if (remedy := _remedy(said, self._was_let_in)) is not None:
                    raise ValueError(f"{self.place}: cannot {what}: {remedy} ({said})") from error
                if time.monotonic() - start + pause > PATIENCE_SECONDS:
                    raise StorageError(f"{self.place}: cannot {what}, tried for {PATIENCE_SECONDS:.0f} s: {said}") from error
                logger.warning("%s: cannot %s, trying again in %.1f s: %s", self.place, what, pause, said)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                self._was_let_in |= what != "open"  # which asks nothing of some
                return answer


def _remedy(said: str, was_let_in: bool) -> str | None:
    """Return what would do about a request that was refused; None for a trouble that may pass."""
    refusals = REFUSALS if was_let_in else (NO_KEYS, *REFUSALS)
    return next((remedy for pattern, remedy in refusals if re.search(pattern, said)), None)
