"""Object storage for the tests of whoever reads and writes there."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3_world import Faults, faulty_storage, s3_server


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server on the loopback, one for the tests of a file; each test has a folder there."""
    with s3_server(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


@pytest.fixture
def faults(endpoint: str, tmp_path: Path) -> Iterator[Faults]:
    """What goes wrong on the way to the server, and a cache of this test alone."""
    with faulty_storage(tmp_path, endpoint) as faults:
        yield faults
