"""A server of chat completions that answers as a test says, and misbehaves when it is told to."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TRIAL = "Answer with the one word yes."
"""What the client asks first; answered without asking the test."""


@dataclass(frozen=True)
class Said:
    """A completion, or an error with a status."""

    text: str | None
    status: int = 200
    finish_reason: str = "stop"
    refusal: str | None = None
    after_seconds: float = 0.0
    body: str | None = None
    """In the place of a completion."""


@dataclass
class JudgeServer:
    """What stands at the other end."""

    answer: Callable[[str, int], Said]
    """Given a question, and how often it was asked before."""
    url: str = ""
    questions: list[str] = field(default_factory=list)
    """As they came, the trial apart."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, request: dict[str, Any], key: str) -> Said:
        text = request["messages"][0]["content"]
        with self.lock:
            self.requests.append(request)
            self.keys.append(key)
            before = self.questions.count(text)
            if text != TRIAL:
                self.questions.append(text)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            said = self.answer(text, before)
            said = Said("yes", after_seconds=said.after_seconds) if text == TRIAL and said.status in (200, 429, 503) else said
            time.sleep(said.after_seconds)
            return said
        finally:
            with self.lock:
                self.at_once -= 1


def completion(said: Said) -> dict[str, Any]:
    message = {"role": "assistant", "content": said.text, "refusal": said.refusal}
    return {
        "id": "c", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": said.finish_reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }  # fmt: skip


class Server(ThreadingHTTPServer):
    """One that many may call at one moment; the library's own lets five wait."""

    request_queue_size = 64


@contextmanager
def serving(answer: Callable[[str, int], Said]) -> Iterator[JudgeServer]:
    """Serve on a free port of the loopback while the body runs."""
    judge = JudgeServer(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802  # the library's own name
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            said = judge.reply(request, self.headers["Authorization"])
            content = said.body or json.dumps(completion(said) if said.status == 200 else {"error": {"message": said.text}})
            try:
                self.send_response(said.status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(content.encode())
            except (BrokenPipeError, ConnectionResetError):  # whoever asked has not waited
                pass

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
