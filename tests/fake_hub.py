"""A hub of models on this machine: as much of the protocol as huggingface_hub speaks when it fetches. It counts its requests."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Serves folders as models, each at one commit, which is its branch main."""

    models: dict[str, Path]
    """Folder of each model, by its name on the hub."""
    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each request."""

    def fetched(self, name: str) -> int:
        """How often the content of a file was asked for, by the end of its path."""
        return sum(method == "GET" and path.endswith(f"/{name}") for method, path in self.asked)

    def knows(self, path: str) -> bool:
        """Whether a path is one of a model that is here."""
        return any(f"/{name}/" in f"{path}/" for name in self.models)

    def answer(self, path: str) -> tuple[bytes, dict[str, str]] | None:
        """Return the content at a path and its headers; None where there is nothing."""
        if path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            if name not in self.models:
                return None
            files = [(one.relative_to(self.models[name]).as_posix(), one.stat().st_size) for one in self._files(name)]
            content: object = {
                "id": name, "sha": COMMIT, "siblings": [{"rfilename": file, "size": size} for file, size in files],
            }  # fmt: skip
            if "/tree/" in path:
                content = [{"type": "file", "path": file, "size": size, "oid": self._etag(name, file)} for file, size in files]
            return json.dumps(content).encode(), {"Content-Type": "application/json"}
        owner, model, _, _, *rest = [*path.strip("/").split("/"), "", "", ""]
        name, file = f"{owner}/{model}", "/".join(part for part in rest if part)
        if name not in self.models or not (self.models[name] / file).is_file():
            return None
        return (self.models[name] / file).read_bytes(), {"ETag": f'"{self._etag(name, file)}"'}

    def _files(self, name: str) -> list[Path]:
        return sorted(path for path in self.models[name].rglob("*") if path.is_file())

    def _etag(self, name: str, file: str) -> str:
        return hashlib.sha1((self.models[name] / file).read_bytes()).hexdigest()


@contextmanager
def fake_hub(models: dict[str, Path]) -> Iterator[FakeHub]:
    """Serve models on a free port of this machine while the body runs."""
    hub = FakeHub(models)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(with_content=True)

        def do_HEAD(self) -> None:
            self._send(with_content=False)

        def _send(self, with_content: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path))
            found = hub.answer(path)
            content, headers = found or (b"", {"X-Error-Code": "EntryNotFound" if hub.knows(path) else "RepoNotFound"})
            self.send_response(200 if found else 404)
            for name, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_content:
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
