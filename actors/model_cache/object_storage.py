"""A model in object storage, and its copy on the disk of a node, which is loaded like any other folder.

Copies stand below ``models`` in the node's cache (``ATKD_CACHE``). They do not count among its ``ATKD_CACHE_GIB``, and none is
evicted: a model is needed whole or not at all.
"""

import fcntl
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from actors.config.places import resolved
from actors.files import write_atomically
from actors.model_cache.base import CODE, WANTED, WEIGHTS, ModelFiles
from actors.storage.local_copies import FOLDER, cache_folder

if TYPE_CHECKING:
    from actors.storage.object_folder import ObjectFolder  # loads the clouds' libraries

COPIED, BEGUN = "copied_from.json", "copying_from.json"
"""The files in which a copy says what it is a copy of: once it is whole, and before."""
AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model in object storage as it is at a time."""

    address: str
    """Of its folder."""
    files: dict[str, tuple[int, int]]
    """Bytes of each file, and when it was written, in nanoseconds of the storage's clock."""

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(size for size, _ in self.files.values())


def look_up(address: str) -> StoredModel:
    """Return what stands at an address now; of other files than those of a model nothing.

    Raises:
        ValueError: if no model stands there, or the storage refuses.
        StorageError: if the storage does not answer.
    """
    from actors.storage.object_folder import ObjectFolder

    folder = ObjectFolder(resolved(address))
    sizes, written = folder.sizes(), folder.written_ns("")
    names = [name for name in sorted(sizes) if any(fnmatch(name, pattern) for pattern in (*WANTED, CODE))]
    if not any(name in names for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"no model stands there, for there is no config.json among its {len(sizes)} files; a folder that "
                         "transformers' save_pretrained wrote, put there whole, would do")  # fmt: skip
    return StoredModel(folder.place, {name: (sizes[name], written[name]) for name in names})


def copy_folder(address: str) -> Path:
    """Return where the copy of the model at an address stands on this node, whether or not it is there."""
    place = resolved(address)
    digest = hashlib.sha256(place.encode()).hexdigest()[:16]
    return cache_folder() / "models" / digest / place.partition("?")[0].rpartition("/")[2]


def copied_from(folder: Path) -> StoredModel | None:
    """Return what the model in a folder is a whole copy of; None if it is none."""
    return _read(folder / COPIED)


class StoredModelFiles(ModelFiles):
    """The copy of a stored model in a folder of a node, at one path on all nodes.

    Args:
        model: as it is now.
        folder: of the copy.
        weights: whether they are to be copied too; without them what is there is no whole copy.
    """

    def __init__(self, model: StoredModel, folder: str, weights: bool = True) -> None:
        super().__init__(Path(folder))
        self._model, self._weights = model, weights

    def are_here(self) -> bool:
        """Whether the folder is a copy of the model as it is now, as far as it is wanted."""
        if not self._weights:
            return self._before() == self._model and not self._wanted()
        return copied_from(self._cache) == self._model and not self._missing(self._model)

    def fetch_missing(self) -> str | None:
        """Copy what is missing or was changed; return in words why it could not be, None if it could."""
        from actors.storage.object_folder import ObjectFolder

        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            with self._alone():
                if self.are_here():
                    return None
                if (coming := self.to_come()) > (free := shutil.disk_usage(self._cache).free):
                    return (
                        f"there is no room for it: {self._cache} has {free / 1e9:.1f} GB free, and {coming / 1e9:.1f} GB are to "
                        f"come; {FOLDER} in the environment of all nodes may name a folder that has"
                    )
                self._begin()
                wanted, storage = self._wanted(), ObjectFolder(self._model.address)
                with ThreadPoolExecutor(AT_ONCE) as threads:
                    list(threads.map(lambda name: self._copy(storage, name), wanted))
                if not self._missing(self._model):
                    (self._cache / BEGUN).rename(self._cache / COPIED)
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())
        return None

    def held(self) -> int:
        """Return the bytes in the folder, files that are only begun included."""
        total = 0
        for path in self._cache.glob("*"):
            with suppress(OSError):  # renamed meanwhile
                total += path.stat().st_size if path.name not in (COPIED, BEGUN) else 0
        return total

    def to_come(self) -> int:
        """Return how many bytes are missing."""
        return sum(self._model.files[name][0] for name in self._wanted())

    def _wanted(self) -> list[str]:
        """Return which files are missing that are to be copied."""
        return [name for name in self._missing(self._before()) if self._weights or not fnmatch(name, WEIGHTS)]

    def _before(self) -> StoredModel | None:
        """Return what the files in the folder were copied from; None where that is not known."""
        return copied_from(self._cache) or _read(self._cache / BEGUN)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one process at a time change the folder."""
        with open(self._cache.with_name(f"{self._cache.name}.lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _missing(self, before: StoredModel | None) -> list[str]:
        """Return which files are not there as they are now; ``before``: what those in the folder were copied from."""
        return [name for name, now in self._model.files.items() if not self._is_copied(name, now, before)]

    def _is_copied(self, name: str, now: tuple[int, int], before: StoredModel | None) -> bool:
        if before is None or before.address != self._model.address or before.files.get(name) != now:
            return False
        with suppress(FileNotFoundError):
            return (self._cache / name).stat().st_size == now[0]
        return False

    def _begin(self) -> None:
        """Remove what is not of the model as it is now, and note that it is being copied."""
        kept = {*self._model.files} - {*self._missing(self._before())}
        (self._cache / COPIED).unlink(missing_ok=True)
        for path in self._cache.iterdir():
            if path.name not in kept:
                path.unlink()
        write_atomically(self._cache / BEGUN, json.dumps(asdict(self._model)).encode())

    def _copy(self, storage: "ObjectFolder", name: str) -> None:
        path, wanted = self._cache / name, self._model.files[name][0]
        temporary = path.with_name(f"{name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            storage.download(name, temporary)
            if (found := temporary.stat().st_size) != wanted:
                raise OSError(f"{storage.place_of(name)} had {wanted:,} bytes, and {found:,} came: it was changed meanwhile")
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)


def _read(path: Path) -> StoredModel | None:
    """Return what a file says that a folder is a copy of; None if it says nothing."""
    try:
        content = json.loads(path.read_bytes())
        return StoredModel(content["address"], {name: (size, written) for name, (size, written) in content["files"].items()})
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None
