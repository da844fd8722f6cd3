"""One local Ray for the whole test session, and small helpers that many tests share."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.s3_world import Faults  # loads libraries that are to find the settings below

# The same inputs in every run, so that a failure comes back; and no limit in time, since a machine may stand still.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A private Ray with 4 CPUs, started once."""
    import ray

    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # AF_UNIX paths are limited to about 107 bytes
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="WARNING",
        object_store_memory=200 << 20, _temp_dir=folder,
    )  # fmt: skip
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server on the loopback, one for the tests of a file; each test has a folder there."""
    from tests.s3_world import s3_server

    with s3_server(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


@pytest.fixture
def faults(endpoint: str, tmp_path: Path) -> "Iterator[Faults]":
    """What goes wrong on the way to the server, and a cache of this test alone."""
    from tests.s3_world import faulty_storage

    with faulty_storage(tmp_path, endpoint) as faults:
        yield faults


@pytest.fixture(scope="session")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server that speaks as Google's storage does, and what has a process use it."""
    from tests.cloud_world import google_server

    with google_server(tmp_path_factory.mktemp("google")) as settings:
        yield settings


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The same of Azure's; where its emulator is not installed, tests are left out."""
    from tests.cloud_world import AZURITE, azure_server

    if AZURITE is None:
        pytest.skip("Azure's emulator is not installed; npm install -g azurite does it")
    with azure_server(tmp_path_factory.mktemp("azure")) as settings:
        yield settings


@pytest.fixture(params=["s3", "gs", "abfs"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a folder that only this test has, in each kind of object storage."""
    from tests.cloud_world import storage_of

    with storage_of(request.param, request, tmp_path) as place:
        yield place


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--drills``, which ``make drills`` gives."""
    parser.addoption("--drills", action="store_true", help="run the long drills as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long drills unless they are asked for, and let one that fails run once more.

    Drills kill processes of a cluster at their work, on a machine that may stand still meanwhile.
    """
    for item in items:
        if item.get_closest_marker("drill") and not config.getoption("--drills"):
            item.add_marker(pytest.mark.skip(reason="a long drill; make drills runs it"))
        if item.get_closest_marker("ray") and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.flaky(reruns=1))
