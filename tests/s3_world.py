"""A real S3 server on the loopback (moto's), and a proxy before it that does what networks and clouds do."""

import http.client
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from urllib.parse import urlsplit

import pyarrow.fs

BUCKET = "scores"
KEYS = {
    "AWS_ACCESS_KEY_ID": "a-user", "AWS_SECRET_ACCESS_KEY": "the-users", "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@contextmanager
def s3_server(folder: Path, *, knows_users: bool = False) -> Iterator[str]:
    """Serve S3, with one bucket; yield the address of the endpoint. One that knows its users knows none, and lets none in."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    settings = {**os.environ, **({"INITIAL_NO_AUTH_ACTION_COUNT": "2"} if knows_users else {})}
    with open(folder / "s3.log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log, env=settings) as process:
        try:
            wait_for(port, process)
            endpoint = f"http://127.0.0.1:{port}"
            with environment({**KEYS, "AWS_ENDPOINT_URL": endpoint}):
                filesystem, _ = pyarrow.fs.FileSystem.from_uri(f"s3://{BUCKET}?allow_bucket_creation=true")
                filesystem.create_dir(BUCKET)
            yield endpoint
        finally:
            process.terminate()


@contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """Set variables of the environment for a while."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def wait_for(port: int, process: "subprocess.Popen[bytes]", seconds: float = 60.0) -> None:
    """Wait until something listens at a port."""
    deadline = time.monotonic() + seconds
    while True:
        assert process.poll() is None, "the server ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.05)


@dataclass
class Faults:
    """What the proxy does to the next requests; each number counts down."""

    slow_down: int = 0
    """Requests that are told to come back later."""
    cut_answers: int = 0
    """Reads of files whose answer breaks off half way."""
    cut_uploads: int = 0
    """Puts of files of which half arrives before the connection breaks."""
    refuse: tuple[int, str] | None = None
    """Status and code of the error that all requests get."""
    answer_seconds: float = 0.0
    """How late each answer is."""
    at_once: int = 0
    """Requests that wait for their answers now."""
    most_at_once: int = 0
    """The most of them since this was set to 0."""
    old_listings: bool = False
    """Answer listings as they were when this was set."""
    seen: list[str] = field(default_factory=list)
    """Method and path of each request."""
    listings: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    """The last answer to each listing."""

    def takes(self, name: str) -> bool:
        """Whether a fault is due now; it counts down."""
        left = getattr(self, name)
        if left:
            setattr(self, name, left - 1)
        return bool(left)


@contextmanager
def faulty_proxy(endpoint: str) -> Iterator[tuple[str, Faults]]:
    """Serve what another server serves, with faults; yield the address and the faults."""
    faults, upstream = Faults(), urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            return

        def answer(self) -> None:
            faults.at_once += 1
            faults.most_at_once = max(faults.most_at_once, faults.at_once)
            time.sleep(faults.answer_seconds)
            try:
                self.answer_now()
            finally:
                faults.at_once -= 1

        def answer_now(self) -> None:
            faults.seen.append(f"{self.command} {self.path}")
            is_listing = self.command == "GET" and "list-type" in self.path
            is_file = not is_listing and self.path.count("/") > 1
            body = self.body()
            if faults.refuse is not None:
                status, code = faults.refuse
                return self.send(status, f"<Error><Code>{code}</Code></Error>".encode(), {"Content-Type": "application/xml"})
            if faults.takes("slow_down"):
                return self.send(503, SLOW_DOWN, {"Content-Type": "application/xml"})
            if self.command == "PUT" and is_file and faults.takes("cut_uploads"):
                return self.hang_up()
            if is_listing and faults.old_listings and self.path in faults.listings:
                status, content = faults.listings[self.path]
                return self.send(status, content, {"Content-Type": "application/xml"})
            connection = http.client.HTTPConnection(upstream, timeout=60)
            dropped = ("connection", "transfer-encoding", "content-length", "expect")
            headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
            connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
            response = connection.getresponse()
            content = response.read()
            if is_listing and not faults.old_listings:
                faults.listings[self.path] = (response.status, content)
            kept = {name: value for name, value in response.getheaders()}
            if self.command == "GET" and is_file and response.status in (200, 206) and faults.takes("cut_answers"):
                self.start(response.status, len(content), kept)
                self.wfile.write(content[: len(content) // 2])
                return self.hang_up()
            return self.send(response.status, content, kept)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            length = headers.get("Content-Length", str(len(content))) if self.command == "HEAD" else str(len(content))
            self.start(status, int(length), headers)
            if self.command != "HEAD":
                self.wfile.write(content)

        def start(self, status: int, length: int, headers: dict[str, str]) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def hang_up(self) -> None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815  # names of http.server

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def faulty_storage(folder: Path, endpoint: str) -> Iterator[Faults]:
    """Have this process use an S3 server through a proxy, with its copies in a folder; yield the proxy's faults."""
    settings = {**KEYS, "ATKD_CACHE": str(folder / "cache"), "ATKD_CACHE_GIB": "1"}
    with faulty_proxy(endpoint) as (address, faults), environment({**settings, "AWS_ENDPOINT_URL": address}):
        yield faults


def main() -> int:
    """Run a command beside an S3 server with one bucket, whose answers come some milliseconds late; print what was asked of it.

    python -m tests.s3_world MILLISECONDS COMMAND ...
    """
    with TemporaryDirectory() as folder, s3_server(Path(folder)) as endpoint, faulty_storage(Path(folder), endpoint) as faults:
        faults.answer_seconds = float(sys.argv[1]) / 1000
        code = subprocess.run(sys.argv[2:], check=False).returncode
        kinds = Counter("listings" if "list-type" in line else line.split()[0] for line in faults.seen)
        print("asked of the storage:", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
        return code


if __name__ == "__main__":
    raise SystemExit(main())
