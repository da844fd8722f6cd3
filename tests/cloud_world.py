"""Servers on the loopback that speak as Google's and Azure's storage do, each with one bucket."""

import base64
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.storage.clouds import open_storage
from tests.s3_world import BUCKET, environment, wait_for

ACCOUNT = "anaccount"
KEY = base64.b64encode(b"a key of the tests' own, of 64 bytes".ljust(64, b".")).decode()
AZURITE = shutil.which("azurite-blob", path=f"{os.environ.get('AZURITE', '')}{os.pathsep}{os.environ.get('PATH', '')}")
"""Azure's own emulator (``npm install -g azurite``), on the path or in the folder that AZURITE names."""

GOOGLE = "from gcp_storage_emulator.server import create_server; create_server('127.0.0.1', {port}, True, '{bucket}').run()"


@contextmanager
def google_server(folder: Path) -> Iterator[dict[str, str]]:
    """Serve Google's storage; yield what has a process use it, for addresses of ``google_place``."""
    port = _free_port()
    command = [sys.executable, "-c", GOOGLE.format(port=port, bucket=BUCKET)]
    with _running(command, port, folder / "google.log"):
        yield {"CLOUD_STORAGE_EMULATOR_ENDPOINT": f"http://127.0.0.1:{port}"}


@contextmanager
def azure_server(folder: Path) -> Iterator[dict[str, str]]:
    """Serve Azure's storage; yield what has a process use it, for addresses of ``azure_place``."""
    assert AZURITE is not None, "azurite is installed"
    port = _free_port()
    quiet = ("--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry")
    with _running(
        [AZURITE, "--blobPort", str(port), *quiet], port, folder / "azure.log", {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
    ):
        settings = {"AZURE_STORAGE_CONNECTION_STRING": connection(port)}
        with environment(settings):
            storage, path = open_storage(azure_place(""))
            storage.filesystem.create_dir(path.strip("/"))
        yield settings


@contextmanager
def storage_of(scheme: str, request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """Have this process use the storage of a scheme, with its copies in a folder; yield the address of a folder there."""
    if scheme == "s3":
        request.getfixturevalue("faults")
        yield f"s3://{BUCKET}/{folder.name}"
        return
    settings, place = ("google", google_place) if scheme == "gs" else ("azure", azure_place)
    with environment({**request.getfixturevalue(settings), "ATKD_CACHE": str(folder / "cache"), "ATKD_CACHE_GIB": "1"}):
        yield place(folder.name)


def connection(port: int, key: str = KEY) -> str:
    """Return the connection string of Azure's storage at a port."""
    endpoint = f"BlobEndpoint=http://127.0.0.1:{port}/{ACCOUNT}"
    return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={key};{endpoint}"


def google_place(name: str) -> str:
    """Return the address of a folder in Google's storage."""
    return f"gs://anonymous@{BUCKET}/{name}"


def azure_place(name: str) -> str:
    """Return the address of a folder in Azure's storage."""
    return f"abfs://{BUCKET}@{ACCOUNT}.dfs.core.windows.net/{name}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def _running(command: Sequence[str], port: int, log: Path, settings: dict[str, str] | None = None) -> Iterator[None]:
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **(settings or {})})
        try:
            wait_for(port, process)
            yield
        finally:
            process.terminate()
            process.wait()
