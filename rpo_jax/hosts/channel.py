"""The connections between the processes of a run: exchanges of host data, and news of whoever stops or dies.

A star: every process keeps one TCP connection to process 0, open as long as it lives. jax's coordination service cannot
take its place. Measured with jax 0.10.2, two or three processes on one host:

- A missing, repeated or unreachable process makes `jax.distributed.initialize` end every process with a C++ fatal error
  that names nobody, and two processes 0 share a port unnoticed. So the roll call comes first (roll_call.py).
- A killed process ends the others by SIGABRT when its heartbeats have run out, or, if it was process 0, at once and
  without a name; a callback instead of the abort raises std::bad_cast. With `jax_enable_recoverability` they live on,
  but not when it was process 0. Here the kernel closes a killed process's connections, and all know its name at once.
- 256 MB of random bytes through its key-value store take 40 s, through a connection that is open anyway 3 s.

There is no encryption and no password, as in jax's service: run on a private network.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

GRACE_SECONDS = 10  # for a process to take up a failure where it works, before it is stopped
# A host that vanishes without a word is noticed after 15 + 3 * 5 seconds.
KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}
# A frame: this much about it, the header, then the bytes of the arrays that the header describes. No pickle: what comes
# from the network is never run.
PREFIX = struct.Struct("<8sIQ")  # MAGIC, bytes of the header, bytes of the arrays
MAGIC = b"rpo_jax2"
PIECE_BYTES = 2**26  # a frame is read in pieces, so that a wrong length does not take the memory at once
ARRAY = "__array__"
ALIGNMENT = 8


class OtherProtocol(ConnectionError):
    """What answers is no process of such a run."""


class PeerFailure(ConnectionError):
    """Another process was stopped by something that its user can correct; the message names it.

    Not a ValueError: nothing is wrong with what this process was given.
    """


@dataclass(frozen=True)
class Failure:
    """Why a process stopped; `is_user_error` where what a user gave was the reason."""

    message: str
    is_user_error: bool


def encode(value: Any) -> bytes:
    """A frame of dicts, lists, strings, numbers, None and NumPy arrays; tuples arrive as lists."""
    body = bytearray()

    def describe(array: Any) -> dict[str, Any]:
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{type(array).__name__} cannot be sent to another process")
        start = len(body)
        body.extend(array.tobytes())
        body.extend(bytes(-len(body) % ALIGNMENT))
        return {ARRAY: [array.dtype.str, array.shape, start]}

    header = json.dumps(value, default=describe).encode()
    return PREFIX.pack(MAGIC, len(header), len(body)) + header + body


def _decode(header: bytearray, body: bytearray) -> Any:
    def restore(node: dict[str, Any]) -> Any:
        if ARRAY not in node:
            return node
        kind, shape, start = node[ARRAY]
        count = math.prod(shape)
        return np.frombuffer(body, kind, count, start).reshape(shape) if count else np.empty(shape, kind)

    return json.loads(header, object_hook=restore)


def receive(connection: socket.socket, seconds: float | None = None, limit: float = math.inf) -> Any:
    """The value of the next frame, of at most `limit` bytes.

    Raises TimeoutError where it is not complete in time, OtherProtocol for anything that `encode` does not write, and
    ConnectionError where the other side is gone.
    """
    deadline = None if seconds is None else time.monotonic() + seconds

    def read(count: int) -> bytearray:
        content = bytearray()
        while len(content) < count:
            if deadline is not None:
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
            piece = connection.recv(min(count - len(content), PIECE_BYTES))
            if not piece:
                raise ConnectionResetError("the other side closed the connection")
            content += piece
        return content

    magic, header_bytes, body_bytes = PREFIX.unpack(read(PREFIX.size))
    if magic == MAGIC and header_bytes + body_bytes <= limit:
        with contextlib.suppress(ValueError, TypeError, OverflowError, RecursionError):
            return _decode(read(header_bytes), read(body_bytes))
    raise OtherProtocol("another program, or another version of this one, answers")


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # macOS and Windows lack some
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _stop_process(failure: Failure) -> None:
    """End this process at once, whatever its other threads wait for: the devices' programs cannot be interrupted."""
    sys.stdout.flush()
    # Not through sys.stderr, whose lock another thread may hold.
    os.write(2, f"error: {failure.message}\n".encode())
    os._exit(2 if failure.is_user_error else 1)


class Channel:
    """The connections of one process to the others, after a roll call.

    Args:
        connections: process id -> connection; process 0 has one to each, the others one to process 0.
        hosts: name of each process's host.
    """

    def __init__(self, process_id: int, hosts: Sequence[str], connections: dict[int, socket.socket]) -> None:
        self.process_id, self.hosts, self._connections = process_id, list(hosts), connections
        self._arrived: dict[int, queue.Queue[dict[str, Any]]] = {peer: queue.Queue() for peer in connections}
        self._sending = {peer: threading.Lock() for peer in connections}
        self._left: set[int] = set()
        self._lock = threading.Lock()
        self._failure: Failure | None = None
        self._taken_up = threading.Event()
        for connection in connections.values():
            _keep_alive(connection)
        self._listeners = [threading.Thread(target=self._listen, args=(peer,), daemon=True) for peer in connections]
        for listener in self._listeners:
            listener.start()

    def name(self, process_id: int) -> str:
        return f"process {process_id} ({self.hosts[process_id]})"

    def gather(self, mine: Any) -> list[Any]:
        """What every process gives, in the order of their ids; all must call this, in the same order.

        Raises PeerFailure where another process has stopped instead.
        """
        if not self._connections:
            return [mine]
        if self.process_id:
            self._send({"give": mine})
            return self._next(0)
        everything = [mine, *(self._next(peer) for peer in sorted(self._connections))]
        self._send({"give": everything})
        return everything

    def _next(self, peer: int) -> Any:
        message = {} if self._failure else self._arrived[peer].get()
        if self._failure is None:
            if "give" not in message:
                raise ConnectionError(f"{self.name(peer)} has left the run already.")
            return message["give"]
        if self._failure.is_user_error:
            self._taken_up.set()
            raise PeerFailure(self._failure.message)
        time.sleep(2 * GRACE_SECONDS)  # this process is being stopped
        raise ConnectionError(self._failure.message)

    def _send(self, message: dict[str, Any], besides: int | None = None) -> None:
        """Send to all connections; of one that is closed, its listener tells."""
        frame = encode(message)
        for peer, connection in self._connections.items():
            if peer != besides:
                with contextlib.suppress(OSError), self._sending[peer]:
                    connection.sendall(frame)

    def _listen(self, peer: int) -> None:
        while True:
            try:
                message = receive(self._connections[peer])
            except OSError:
                if peer not in self._left:
                    self._fail(Failure(f"{self.name(peer)} died: its connection closed without a word.", False), peer)
                return
            if "give" not in message:
                self._left.add(peer)
            if "fail" in message:
                self._fail(Failure(**message["fail"]), peer)
            self._arrived[peer].put(message)

    def _fail(self, failure: Failure, source: int | None) -> None:
        """Remember the first failure, pass it on, and stop this process if its main thread does not."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = failure
        self._send({"fail": vars(failure)}, besides=source)
        if source is None:  # its own failure: who calls goes on with it
            return
        for arrived in self._arrived.values():
            arrived.put({})  # wakes a gather, which looks at the failure first
        if not (failure.is_user_error and self._taken_up.wait(GRACE_SECONDS)):
            self.wait_for_others()
            _stop_process(failure)

    def wait_for_others(self) -> None:
        """On process 0, until the others are gone: jax aborts them where its service, which lives here, ends first."""
        deadline = time.monotonic() + GRACE_SECONDS
        for listener in self._listeners if self.process_id == 0 else []:
            if listener is not threading.current_thread():
                listener.join(max(deadline - time.monotonic(), 0))

    def fail(self, error: str, *, is_user_error: bool) -> None:
        """Tell the others why this process stops; nothing where they know already."""
        self._taken_up.set()  # another one's failure, if it came first, stops this process no more: it has its own
        self._fail(Failure(f"{self.name(self.process_id)} stopped: {error}", is_user_error), None)

    def close(self) -> None:
        """Leave in peace: the others go on, or leave too."""
        self._left |= set(self._connections)
        self._send({"leave": None})
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that listens
        for listener in self._listeners:
            listener.join()
        for connection in self._connections.values():
            connection.close()
