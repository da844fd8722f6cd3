"""Object storage by pyarrow's filesystems, and where Google's and Azure's do not what S3's does."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

if TYPE_CHECKING:
    from azure.storage.blob import BlobClient, BlobServiceClient

FileInfo: TypeAlias = fs.FileInfo
FileSystem: TypeAlias = fs.FileSystem
FileType: TypeAlias = fs.FileType

GOOGLE_RETRY_SECONDS = 20
"""For how long Google's library tries a request again by itself; it would take 15 minutes."""
REMOVALS = 4
"""How often a folder of Google's is emptied before it counts as one that fills again."""
AZURE_SETTINGS = "AZURE_STORAGE_CONNECTION_STRING"


class CloudStorage:
    """Object storage, as S3 does it. Paths are pyarrow's: the bucket, a slash, and the key.

    Args:
        filesystem: the storage as pyarrow opened it.
    """

    def __init__(self, filesystem: FileSystem) -> None:
        self.filesystem = filesystem

    def entries(self, path: str, recursive: bool) -> list[FileInfo]:
        """Return the files and folders in a folder, or of all below it as well; none where it is not there."""
        found: list[FileInfo] = self.filesystem.get_file_info(
            fs.FileSelector(path, allow_not_found=True, recursive=recursive)
        )
        return found

    def write(self, path: str, content: bytes | pa.Buffer) -> None:
        """Put a file whole: until all of it has arrived, what was there before stays."""
        # Not copy_files, which is silent about an upload that breaks in the background; closing a stream is not.
        with self.filesystem.open_output_stream(path) as file:
            file.write(content)

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""
        try:
            self.filesystem.delete_file(path)
        except FileNotFoundError:
            return

    def remove_folder(self, path: str) -> None:
        """Remove all that stands below a name, as far as it is there."""
        try:
            self.filesystem.delete_dir(path)
        except FileNotFoundError:
            return


class GoogleStorage(CloudStorage):
    """Google's: pyarrow lists no folder but those that have an object of their own name, and takes a bucket that is not there
    for a file that is not."""

    def entries(self, path: str, recursive: bool) -> list[FileInfo]:
        """As above, by a listing of all that is below the folder."""
        below = super().entries(path, recursive=True)
        if recursive:
            return below
        start = len(path) + 1
        files = [info for info in below if "/" not in info.path[start:]]
        inner = {info.path[start:].partition("/")[0] for info in below} - {info.base_name for info in files}
        return files + [FileInfo(f"{path}/{name}", FileType.Directory) for name in sorted(inner)]

    def write(self, path: str, content: bytes | pa.Buffer) -> None:
        """As above.

        Raises:
            OSError: if there is no such bucket.
        """
        try:
            super().write(path, content)
        except FileNotFoundError as error:
            raise OSError(f"the bucket does not exist ({error})") from error

    def remove_folder(self, path: str) -> None:
        """As above.

        Raises:
            OSError: if there is something left.
        """
        for _ in range(REMOVALS):  # one ends, well or at a file that another has removed meanwhile, and says the same
            if not self.entries(path, recursive=True):
                return
            super().remove_folder(path)
        raise OSError(f"there is still something below {path}")


class AzureStorage(CloudStorage):
    """Azure's: pyarrow empties a file before it writes it, and waits seconds to remove some, so Azure's own library does both.

    Args:
        filesystem: the storage as pyarrow opened it.
        service: the same as Azure's library did.
    """

    def __init__(self, filesystem: FileSystem, service: "BlobServiceClient") -> None:
        super().__init__(filesystem)
        self._service = service

    def write(self, path: str, content: bytes | pa.Buffer) -> None:
        """As above."""
        data = content if isinstance(content, bytes) else pa.BufferReader(content)
        with _azure_errors():
            self._blob(path).upload_blob(data, length=len(content), overwrite=True)

    def remove(self, path: str) -> None:
        """As above."""
        from azure.core.exceptions import ResourceNotFoundError

        with _azure_errors():
            try:
                self._blob(path).delete_blob()
            except ResourceNotFoundError:
                return

    def _blob(self, path: str) -> "BlobClient":
        container, _, name = path.partition("/")
        return self._service.get_blob_client(container, name)


def open_storage(place: str) -> tuple[CloudStorage, str]:
    """Return the storage of an address, and the path of the folder in it.

    Raises:
        ValueError: if the address, or what the environment says beside it, cannot be used.
        OSError: if the storage is asked something and does not answer.
    """
    parts = urlsplit(place)
    if parts.scheme == "gs":
        filesystem, path = fs.FileSystem.from_uri(_with_query(place, f"retry_limit_seconds={GOOGLE_RETRY_SECONDS}"))
        return GoogleStorage(filesystem), path
    if parts.scheme in ("abfs", "abfss"):
        return _open_azure(place)
    filesystem, path = fs.FileSystem.from_uri(_with_query(place, "allow_delayed_open=true"))  # a small file by one request
    return CloudStorage(filesystem), path


def _open_azure(place: str) -> tuple[AzureStorage, str]:
    """Open Azure's storage by the connection string in the environment; else by what its own library finds there.

    Raises:
        ValueError: if that library is not installed, or the string is of another account than the address.
    """
    written = os.environ.get(AZURE_SETTINGS, "")
    settings, parts = connection_settings(written), urlsplit(place)
    account, container, suffix = azure_names(place, settings)
    named = settings.get("accountname", account)
    if account != named:
        raise ValueError(
            f"{place} is of the account {account!r}, and {AZURE_SETTINGS} of {named!r}; the former's connection string would do, "
            "or none, for what Azure gives its machines"
        )
    try:
        service = _azure_service(f"https://{account}.blob.{suffix}", written)
    except ImportError as error:
        raise ValueError(f"{place} needs a library that is not here ({error}); pip install '.[azure]' gets it") from error
    endpoint, token = urlsplit(service.primary_endpoint), settings.get("sharedaccesssignature")
    emulator = None if endpoint.netloc.startswith(f"{account}.") else endpoint.netloc  # which has accounts in its paths
    filesystem = fs.AzureFileSystem(
        account, account_key=settings.get("accountkey"), sas_token=token and f"?{token.removeprefix('?')}",
        blob_storage_authority=emulator or f".blob.{suffix}", blob_storage_scheme=endpoint.scheme,
        dfs_storage_authority=emulator or f".dfs.{suffix}", dfs_storage_scheme=endpoint.scheme,
    )  # fmt: skip
    return AzureStorage(filesystem, service), f"{container}{parts.path}"


@cache
def _azure_service(url: str, connection: str) -> "BlobServiceClient":
    """Return the client of an account, one in each process: it keeps the token that it was given."""
    from azure.identity import DefaultAzureCredential
    from azure.storage.blob import BlobServiceClient

    if connection:
        return BlobServiceClient.from_connection_string(connection)
    return BlobServiceClient(url, DefaultAzureCredential())


def azure_names(place: str, settings: Mapping[str, str]) -> tuple[str, str, str]:
    """Return account, container, and the end of the names of Azure's hosts, as an address and a connection string have them.

    Raises:
        ValueError: if it is no such address, or neither names the account.
    """
    parts = urlsplit(place)
    user, _, host = parts.netloc.rpartition("@")
    suffix, named = settings.get("endpointsuffix", "core.windows.net"), settings.get("accountname", "")
    account, dot, rest = host.partition(".dfs.")
    if dot and user and rest and not parts.query:
        return account, user, rest
    if "." not in host and (user or named) and not parts.query:
        return user or named, host, suffix
    why = "it has a question mark" if parts.query else "it names no account" if "." not in host else "its host is no .dfs. one"
    raise ValueError(
        f"{place} is not accepted: {why}; {parts.scheme}://container@account.dfs.core.windows.net/folder would do, or "
        f"{parts.scheme}://container/folder with {AZURE_SETTINGS} in the environment"
    )


@contextmanager
def _azure_errors() -> Iterator[None]:
    """Raise what Azure's library raises as pyarrow would."""
    from azure.core.exceptions import AzureError

    try:
        yield
    except AzureError as error:
        raise OSError(str(error)) from error


def connection_settings(written: str) -> Mapping[str, str]:
    """Return what a connection string of Azure says, by names in small letters; nothing of an empty one.

    Raises:
        ValueError: if it names no account, without the string, which holds a key.
    """
    fields = (field.partition("=") for field in written.split(";"))
    settings = {name.strip().lower(): value.strip() for name, _, value in fields if name.strip()}
    if settings and not settings.get("accountname"):
        raise ValueError(
            f"{AZURE_SETTINGS} names no account; AccountName=…;AccountKey=… would do, with SharedAccessSignature=… for the key"
        )
    return settings


def _with_query(place: str, setting: str) -> str:
    return f"{place}{'&' if urlsplit(place).query else '?'}{setting}"
