"""How a place is named: the path of a folder, or the address of one in object storage. Imports nothing heavy."""

from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

SCHEMES = {"s3": "Amazon S3 and what speaks like it", "gs": "Google Cloud Storage", "abfs": "Azure", "abfss": "Azure, by TLS"}
"""Schemes of object storage that pyarrow's filesystems speak."""

ANONYMOUS: dict[str, tuple[str, ...]] = {"s3": (), "gs": ("anonymous",)}
"""Users that need no key: ``gs://anonymous@bucket/rows.jsonl`` is read without one."""


def in_object_storage(place: str | Path) -> bool:
    """Whether a place is named by an address, as ``s3://bucket/folder``, and not by a path."""
    return "://" in str(place)


def resolved(place: str) -> str:
    """Return the absolute path of a folder as text, or an address without the slash at its end.

    Raises:
        ValueError: if an address is of a scheme that is not known, names no bucket or holds a key.
    """
    if not in_object_storage(place):
        return str(Path(place).expanduser().resolve())
    parts = urlsplit(place)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"{place} begins with {parts.scheme}://; a path, or an address of {', '.join(SCHEMES)} would do")
    if not parts.netloc:
        raise ValueError(f"{place} names no bucket; {parts.scheme}://bucket/folder would do")
    if ":" in parts.netloc or (parts.scheme in ("s3", "gs") and parts.username not in (None, *ANONYMOUS[parts.scheme])):
        raise ValueError(
            f"an address of {parts.scheme}:// holds a key, which would be written into files that others read; the environment's "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what the cloud gives its machines) would do"
        )
    return urlunsplit(parts._replace(path=parts.path.rstrip("/")))


def within(place: str, name: str) -> str:
    """Return the place of something in a folder."""
    if not in_object_storage(place):
        return str(Path(place) / name)
    parts = urlsplit(place)
    return urlunsplit(parts._replace(path=f"{parts.path}/{name}"))


def parent_and_name(place: str) -> tuple[str, str]:
    """Return the place of the folder in which something stands, and its name there."""
    if not in_object_storage(place):
        return str(Path(place).parent), Path(place).name
    parts = urlsplit(place)
    parent, _, name = parts.path.rpartition("/")
    return urlunsplit(parts._replace(path=parent)), name
