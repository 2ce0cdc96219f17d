"""Plain TCP between the processes of a run: exchanges of host data, and news of whoever stops or dies.

A star: every process keeps one connection to process 0, open as long as it lives. The kernel closes it when a process
is killed, so the others learn at once who died; a host that loses its power stops answering keep-alive probes. jax's
own service says nothing before its heartbeats run out, and then no name. There is no encryption and no password, as in
that service: run on a private network.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAGIC = "rpo_jax.channel.1"
GRACE_SECONDS = 10  # for a process to take a failure up where it works, before it is stopped
# A host that vanishes without a word is noticed after 15 + 3 * 5 seconds.
KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}
MAX_HEADER_BYTES = 2**31
PIECE_BYTES = 2**26  # arrays are read in pieces, so that a wrong length does not take the memory at once


class OtherProtocol(ConnectionError):
    """What answers is no process of such a run."""


class PeerFailure(ValueError):
    """Another process was stopped by something that its user can mend; the message names it."""


@dataclass(frozen=True)
class Failure:
    """Why a process stopped; `mendable` where what a user gave was the reason."""

    message: str
    mendable: bool


# A frame is its header's length, the header, then the bytes of the arrays that the header describes. No pickle: what
# comes from the network is never run.


def _flatten(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, np.ndarray):
        arrays.append(np.ascontiguousarray(value))
        return {"array": len(arrays) - 1}
    if isinstance(value, dict):
        return {"dict": {name: _flatten(item, arrays) for name, item in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [_flatten(item, arrays) for item in value]}
    return {"plain": value}


def _restore(node: dict[str, Any], arrays: Sequence[np.ndarray]) -> Any:
    [(kind, value)] = node.items()
    if kind == "array":
        return arrays[value]
    if kind == "dict":
        return {name: _restore(item, arrays) for name, item in value.items()}
    return [_restore(item, arrays) for item in value] if kind == "list" else value


def send(connection: socket.socket, value: Any) -> None:
    """Write dicts, lists, strings, numbers, None and NumPy arrays; tuples arrive as lists."""
    arrays: list[np.ndarray] = []
    tree = _flatten(value, arrays)
    kinds = [(array.dtype.str, array.shape) for array in arrays]
    header = json.dumps({"magic": MAGIC, "tree": tree, "arrays": kinds}).encode()
    connection.sendall(struct.pack("<Q", len(header)) + header)
    for array in arrays:
        connection.sendall(array.data.cast("B") if array.size else b"")


def _read(connection: socket.socket, count: int) -> bytearray:
    content = bytearray()
    while len(content) < count:
        piece = connection.recv(min(count - len(content), PIECE_BYTES))
        if not piece:
            raise ConnectionResetError("the other side closed the connection")
        content += piece
    return content


def receive(connection: socket.socket) -> Any:
    """What `send` wrote; ConnectionError where the other side is gone or speaks another language."""
    (length,) = struct.unpack("<Q", _read(connection, 8))
    if length > MAX_HEADER_BYTES:
        raise OtherProtocol("another program answers")
    try:
        header = json.loads(_read(connection, length))
        if header["magic"] != MAGIC:
            raise ValueError(header["magic"])
    except (ValueError, KeyError, TypeError):
        raise OtherProtocol("another program, or another version of this one, answers") from None
    arrays = []
    for kind, shape in header["arrays"]:
        dtype = np.dtype(kind)
        content = _read(connection, dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
        arrays.append(np.frombuffer(content, dtype).reshape(shape))
    return _restore(header["tree"], arrays)


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # macOS and Windows lack some
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def stop_process(failure: Failure) -> None:
    """End this process at once, whatever its other threads wait for: the devices' programs cannot be interrupted."""
    sys.stdout.flush()
    # Not through sys.stderr, whose lock another thread may hold.
    os.write(2, f"error: {failure.message}\n".encode())
    os._exit(2 if failure.mendable else 1)


class Channel:
    """The connections of one process to the others, after a roll call.

    Args:
        connections: process id -> connection; process 0 has one to each, the others one to process 0.
        hosts: name of each process's host.
        stop: what to do where the main thread does not take up a failure, or cannot.
    """

    def __init__(
        self,
        process_id: int,
        hosts: Sequence[str],
        connections: dict[int, socket.socket],
        stop: Callable[[Failure], None] = stop_process,
    ) -> None:
        self.process_id, self.hosts = process_id, list(hosts)
        self._connections, self._stop = connections, stop
        self._arrived: dict[int, queue.Queue[Any]] = {peer: queue.Queue() for peer in connections}
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
        try:
            if self.process_id:
                self._send(0, {"give": mine})
                return self._next(0)
            everything = [mine, *(self._next(peer) for peer in sorted(self._connections))]
            for peer in self._connections:
                self._send(peer, {"give": everything})
            return everything
        except OSError:
            time.sleep(2 * GRACE_SECONDS)  # the thread that listens says who is gone, and stops this process
            raise

    def _next(self, peer: int) -> Any:
        self._check()
        got = self._arrived[peer].get()
        self._check()
        return got

    def _check(self) -> None:
        if self._failure is None:
            return
        if self._failure.mendable:
            self._taken_up.set()
            raise PeerFailure(self._failure.message)
        time.sleep(2 * GRACE_SECONDS)  # this process is being stopped
        raise ConnectionError(self._failure.message)

    def _send(self, peer: int, message: dict[str, Any]) -> None:
        with self._sending[peer]:
            send(self._connections[peer], message)

    def _listen(self, peer: int) -> None:
        while True:
            try:
                [(kind, value)] = receive(self._connections[peer]).items()
            except OSError:
                if peer not in self._left:
                    self._fail(Failure(f"{self.name(peer)} died: its connection closed without a word.", False), peer)
                return
            if kind == "give":
                self._arrived[peer].put(value)
            elif kind == "leave":
                self._left.add(peer)
            else:
                self._left.add(peer)
                self._fail(Failure(**value), peer)

    def _fail(self, failure: Failure, source: int | None) -> None:
        """Remember the first failure, pass it on, and stop this process if its main thread does not."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = failure
        for peer in self._connections:
            if peer != source:
                with contextlib.suppress(OSError):  # that one may be gone too
                    self._send(peer, {"fail": vars(failure)})
        if source is None:  # its own failure: who calls goes on with it
            return
        for arrived in self._arrived.values():
            arrived.put(None)  # wakes a gather, which looks at the failure first
        if not (failure.mendable and self._taken_up.wait(GRACE_SECONDS)):
            self.wait_for_others()
            self._stop(failure)

    def wait_for_others(self) -> None:
        """On process 0, until the others are gone: jax aborts them where its service, which lives here, ends first."""
        deadline = time.monotonic() + GRACE_SECONDS
        for listener in self._listeners if self.process_id == 0 else []:
            if listener is not threading.current_thread():
                listener.join(max(deadline - time.monotonic(), 0))

    def fail(self, error: str, *, mendable: bool) -> None:
        """Tell the others why this process stops; nothing where they know already."""
        self._taken_up.set()  # another one's failure, if it came first, stops this process no more: it has its own
        self._fail(Failure(f"{self.name(self.process_id)} stopped: {error}", mendable), None)

    def close(self) -> None:
        """Leave in peace: the others go on, or leave too."""
        for peer, connection in self._connections.items():
            self._left.add(peer)
            with contextlib.suppress(OSError):
                self._send(peer, {"leave": None})
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that listens
        for listener in self._listeners:
            listener.join()
        for connection in self._connections.values():
            connection.close()
