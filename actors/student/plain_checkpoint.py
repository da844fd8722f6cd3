"""Reads checkpoints without running what is in them.

``torch.distributed.checkpoint`` keeps its list of contents and all that is no tensor as pickles, and reads them as such: a pickle
can run any code. What our checkpoints hold beside tensors is numbers, tuples and a list of a few known kinds, and nothing else is
let through.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

CONTENTS = ".metadata"
"""Name of the list of contents."""

KNOWN_KINDS = {
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),  # their names in Python 3.13
    ("pathlib._local", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
}  # fmt: skip
"""Module and name of all that a list of contents is made of, beside the types of numbers."""


def read_tensors(folder: Path, state: dict[str, Any]) -> None:
    """Put a checkpoint into ``state``, in place; all workers call it together.

    Raises:
        ValueError: if it holds anything that a checkpoint of a training does not, or its list of contents cannot be read.
    """
    reader = _ReadContents(folder, _contents(folder))
    try:
        dcp.load(state, storage_reader=reader, planner=_PlainValues())
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise _unknown(folder, cause) if isinstance(cause, pickle.UnpicklingError) else cause from None


class _KnownKinds(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN_KINDS and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class _ReadContents(dcp.FileSystemReader):
    """Takes the list of contents from whoever looked at it, and reads no other: not the one that each rank may have."""

    def __init__(self, folder: Path, contents: Metadata) -> None:
        super().__init__(folder)
        self._contents = contents

    def read_metadata(self) -> Metadata:  # torch asks for a rank's own list only where it can
        self._contents.storage_meta = self._contents.storage_meta or StorageMeta()
        self._contents.storage_meta.load_id = self.load_id
        return self._contents


class _PlainValues(dcp.DefaultLoadPlanner):
    """Reads values that are no tensors as plain ones; torch gets them in bytes of our own making."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        ours = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), ours)
        ours.seek(0)
        super().load_bytes(read_item, ours)


def _contents(folder: Path) -> Metadata:
    try:
        with open(folder / CONTENTS, "rb") as file:
            contents = _KnownKinds(file).load()
    except Exception as error:  # a pickle that is cut or forged can end in any
        raise _unknown(folder, error) from error
    if not isinstance(contents, Metadata):
        raise _unknown(folder, TypeError(f"its list of contents is {type(contents).__name__}"))
    return contents


def _unknown(folder: Path, error: BaseException) -> ValueError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    met = next((line for line in lines if "GLOBAL" in line), lines[0])  # torch says it in the middle of advice
    return ValueError(
        f"the checkpoint {folder} holds what no checkpoint of a training does, and is not read: {met}; delete that folder if you "
        "do not know who wrote it"
    )
