"""A server with OpenAI's interface, in a thread."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest


class Answer(NamedTuple):
    """What the server sends."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})


class Asked(NamedTuple):
    """What it was sent."""

    path: str
    authorization: str | None
    body: dict[str, Any]


def says(text: str | None) -> Answer:
    """A chat completion."""
    message = {"role": "assistant", "content": text}
    return Answer(body=json.dumps({"choices": [{"message": message}]}).encode())


class Stub:
    """A server whose answers a test writes."""

    def __init__(self):
        self.asked: list[Asked] = []
        self.answer: Callable[[int, str], Answer] = lambda number, prompt: says(f"to {prompt}")
        """From the number of the request and the text of its only message."""
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):  # noqa: N805
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    number = len(self.asked)
                    key = handler.headers.get("Authorization")
                    self.asked.append(Asked(handler.path, key, body))
                (message,) = body["messages"]
                answer = self.answer(number, message["content"])
                handler.send_response(answer.status)
                length = {"Content-Length": str(len(answer.body))}
                for name, value in {**length, **answer.headers}.items():
                    handler.send_header(name, value)
                handler.end_headers()
                handler.wfile.write(answer.body)

            def log_message(handler, *_):  # noqa: N805
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(server, *_):  # noqa: N805
                """A client that has gone away is what some tests are about."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def url(self) -> str:
        """Its address, as a configuration has it."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def stub(monkeypatch) -> Iterator[Stub]:
    """A server that answers `to <prompt>` unless the test has other answers."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Stub()
    yield server
    server.close()
