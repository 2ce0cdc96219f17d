"""A server that speaks the chat completions protocol, well or badly, on this machine."""

from __future__ import annotations

import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """status and body of an HTTP answer; `body` is sent as it is, or, where it is a dict, as JSON."""

    body: str | dict[str, Any]
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012 (never written)
    seconds: float = 0.0


def completion(text: str | None, **changes: Any) -> Reply:
    """A chat completion as OpenAI's API reference describes it."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "judge",
        "choices": [choice],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
    return Reply(body, **changes)


def failure(status: int, message: str, code: str | None = None, **changes: Any) -> Reply:
    return Reply({"error": {"message": message, "type": "error", "code": code}}, status, **changes)


class JudgeServer:
    """Answers by `behave(request body, number of this request from 0)`; keeps what it was asked."""

    def __init__(self, behave: Callable[[dict[str, Any], int], Reply]) -> None:
        self.behave = behave
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_once, self._now, self._lock = 0, 0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                assert self.path == "/v1/chat/completions", self.path
                with server._lock:
                    number = len(server.requests)
                    server.requests.append(body)
                    server.headers.append(dict(self.headers.items()))
                    server.times.append(time.monotonic())
                    server._now += 1
                    server.most_at_once = max(server.most_at_once, server._now)
                reply = server.behave(body, number)
                time.sleep(reply.seconds)
                with server._lock:
                    server._now -= 1
                content = (reply.body if isinstance(reply.body, str) else json.dumps(reply.body)).encode()
                try:
                    self.send_response(reply.status)
                    for name, value in {"content-type": "application/json", **reply.headers}.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the client was killed, or did not wait
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def questions(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.requests]


@contextmanager
def serving(behave: Callable[[dict[str, Any], int], Reply]) -> Iterator[JudgeServer]:
    server = JudgeServer(behave)
    server._thread.start()
    try:
        yield server
    finally:
        server._http.shutdown()
        server._http.server_close()
        server._thread.join()


class RawServer(socketserver.ThreadingTCPServer):
    """Answers every request by the bytes that `behave(question, number of this request from 0)` gives, one piece after
    another, until they end or the client has gone; keeps whole requests."""

    daemon_threads, block_on_close, allow_reuse_address = True, False, True

    def __init__(self, behave: Callable[[str, int], Iterator[bytes]]) -> None:
        server = self
        self.requests: list[str] = []
        self.sent = 0
        lock = threading.Lock()

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                head = b""
                while line := self.rfile.readline():
                    head += line
                    if line == b"\r\n":
                        break
                size = next(
                    (int(h.split(b":")[1]) for h in head.lower().splitlines() if h[:14] == b"content-length"), 0
                )
                body = self.rfile.read(size)
                with lock:
                    number = len(server.requests)
                    server.requests.append((head + body).decode())
                question = json.loads(body)["messages"][0]["content"] if body else ""
                try:
                    for piece in server.behave(question, number):
                        self.wfile.write(piece)
                        server.sent += len(piece)
                except OSError:  # the client has gone
                    pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = behave
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def serving_raw(behave: Callable[[str, int], Iterator[bytes]]) -> Iterator[RawServer]:
    with RawServer(behave) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
