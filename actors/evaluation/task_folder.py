"""A folder with tasks of the user's own for the lm-evaluation-harness: that it can be read, and what it holds, as a hash."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml


class _PlainLoader(yaml.SafeLoader):
    """Reads the harness's ``!function`` and other tags as the text that stands after them."""


def _text_of(loader: yaml.Loader, suffix: str, node: yaml.Node) -> str:
    return str(node.value)


_PlainLoader.add_multi_constructor("!", _text_of)


def settled_folder(folder: str | None) -> Path | None:
    """Return a folder of tasks as a whole path; None where there is none."""
    return None if folder is None else Path(folder).expanduser().resolve()


def require_task_folder(folder: Path) -> None:
    """Raise if a folder of tasks is not there, or one of its files is not YAML.

    Raises:
        ValueError: naming folder or file, and what would do.
    """
    if not folder.is_dir():
        raise ValueError(
            f"evaluate.benchmarks.folder: there is no folder {folder}; one that holds a YAML file for each task would do, or null"
        )
    for path in sorted(folder.rglob("*.yaml")):
        try:
            read_task(path)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(
                f"evaluate.benchmarks.folder: {path} is not YAML ({' '.join(str(error).split())}); correct it, or take it away"
            ) from None


def folder_hash(folder: Path | None) -> str | None:
    """Return a hash over all files of a folder of tasks and the files of rows that they name; None where there is no folder."""
    if folder is None:
        return None
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    digest = hashlib.sha256()
    for path in dict.fromkeys([*files, *sorted(rows_of(folder))]):
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def rows_of(folder: Path) -> set[Path]:
    """Return the files of rows that tasks name, also those outside of the folder, as far as they are there."""
    found: set[Path] = set()
    for path in folder.rglob("*yaml*"):  # what others include is often called _template_yaml
        if path.is_file() and isinstance(task := read_task(path), Mapping):
            files = (task.get("dataset_kwargs") or {}).get("data_files")
            found |= {place for text in _texts(files) if (place := (folder / text).resolve()).is_file()}
    return found


def read_task(path: Path) -> Any:
    """Return what a task's YAML file says, Python that it names as text.

    Raises:
        yaml.YAMLError, UnicodeDecodeError: if it is no YAML.
    """
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value
