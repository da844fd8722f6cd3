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

CONTENTS = ".metadata"
"""Name of the list of contents."""

KNOWN_KINDS = {
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
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
        ValueError: if it holds anything that a checkpoint of a training does not.
    """
    _require_known_kinds(folder)
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), planner=_PlainValues())
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise _unknown(folder, cause) if isinstance(cause, pickle.UnpicklingError) else cause from None


class _KnownKinds(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN_KINDS and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class _PlainValues(dcp.DefaultLoadPlanner):
    """Looks at each value that is no tensor before it is read."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def _require_known_kinds(folder: Path) -> None:
    try:
        with open(folder / CONTENTS, "rb") as file:
            _KnownKinds(file).load()
    except pickle.UnpicklingError as error:
        raise _unknown(folder, error) from error


def _unknown(folder: Path, error: BaseException) -> ValueError:
    lines = str(error).splitlines()
    met = next((line for line in lines if "GLOBAL" in line), lines[0])  # torch says it in the middle of advice
    return ValueError(
        f"the checkpoint {folder} holds what no checkpoint of a training does, and is not read: {met}; delete that folder if you "
        "do not know who wrote it"
    )
