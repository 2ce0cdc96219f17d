"""The connections between the processes of a run: exchanges of host data, and news of whoever stops or dies.

A star: every process keeps one TCP connection to process 0, open as long as it lives. jax's coordination service cannot
take its place. Measured with jax 0.10.2, two or three processes on one host:

- A missing, repeated or unreachable process makes `jax.distributed.initialize` end every process with a C++ fatal error
  that names nobody, and two processes 0 share a port unnoticed. So the roll call comes first (roll_call.py).
- A killed process ends the others by SIGABRT when its heartbeats have run out, or, if it was process 0, at once and
  without a name; a callback instead of the abort raises std::bad_cast. With `jax_enable_recoverability` they live on,
  but not when it was process 0. Here the kernel closes a killed process's connections, and all know its name at once.
- 256 MB of random bytes through its key-value store take 40 s, through a connection that is open anyway 3 s.

A process that is stopped (SIGSTOP, a suspended machine) keeps its connections, so every process says every
BEAT_SECONDS that it runs, and who has said nothing for SILENT_SECONDS ends the run by its name. No clocks are compared.

Who takes part is checked at the roll call; what is exchanged is not encrypted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

GRACE_SECONDS = 10  # for a process to take up a failure where it works, before it is stopped
NEWS_SECONDS = 5.0  # how long the news of a death may take, where a device's program fails of it first
BEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0  # devices' programs on CPU give up on a process after 30 to 40 s, some of them by an abort
QUIET_BEATS = 3  # missed by a process that may be the reason why a device's program failed
# A host that vanishes without a word is noticed after 15 + 3 * 5 seconds.
KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}
# A frame: this much about it, the header, then the bytes of the arrays that the header describes. No pickle: what comes
# from the network is never run.
PREFIX = struct.Struct("<8sIQ")  # MAGIC, bytes of the header, bytes of the arrays
MAGIC = b"rpo_jax4"
PIECE_BYTES = 2**26  # a frame is read in pieces, so that a wrong length does not take the memory at once
ARRAY = "__array__"
ALIGNMENT = 8
OTHER = "another program, or another version of this one, answers"


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


def receive(
    connection: socket.socket,
    seconds: float | None = None,
    limit: float = math.inf,
    on_bytes: Callable[[], object] = lambda: None,
) -> Any:
    """The value of the next frame, of at most `limit` bytes; `on_bytes` is called as they come.

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
            on_bytes()
        return content

    magic, header_bytes, body_bytes = PREFIX.unpack(read(PREFIX.size))
    if magic == MAGIC and header_bytes + body_bytes <= limit:
        with contextlib.suppress(ValueError, TypeError, OverflowError, RecursionError, SyntaxError):
            return _decode(read(header_bytes), read(body_bytes))
    raise OtherProtocol(OTHER)


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # macOS and Windows lack some
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _tell(failure: Failure) -> None:
    sys.stdout.flush()
    # Not through sys.stderr, whose lock another thread may hold.
    os.write(2, f"error: {failure.message}\n".encode(errors="backslashreplace"))


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
        self._done = {peer: threading.Event() for peer in connections}  # it leaves; process 0: all the others do
        self._silence = dict.fromkeys(connections, 0.0)  # seconds of this process's own time
        self._quiet_elsewhere = False
        self._lock = threading.Lock()
        self._failure: Failure | None = None
        self._taken_up = threading.Event()
        self._closing = threading.Event()
        for connection in connections.values():
            _keep_alive(connection)
        self._listeners = {
            peer: threading.Thread(target=self._listen, args=(peer,), daemon=True) for peer in connections
        }
        watcher = [threading.Thread(target=self._watch, daemon=True)] if connections else []
        self._threads = [*self._listeners.values(), *watcher]
        for thread in self._threads:
            thread.start()

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

    def _send(self, message: dict[str, Any]) -> None:
        """Send to all connections; of one that is closed, its listener tells."""
        frame = encode(message)
        for peer, connection in self._connections.items():
            with contextlib.suppress(OSError), self._sending[peer]:
                connection.sendall(frame)

    def _send_short(self, message: dict[str, Any], seconds: float = 0.0, hopeless: int | None = None) -> None:
        """Send what is short to those that take it within so many seconds: who does not read holds up nobody."""
        frame, deadline, waiting = encode(message), time.monotonic() + seconds, set(self._connections)
        while True:
            waiting -= {peer for peer in waiting if self._sent(frame, peer)}
            if waiting <= {hopeless} or time.monotonic() >= deadline:
                return
            time.sleep(BEAT_SECONDS / 10)

    def _sent(self, frame: bytes, peer: int) -> bool:
        """Send to one that has room for it and is sent nothing else just now."""
        if not self._sending[peer].acquire(blocking=False):
            return False
        try:
            with contextlib.suppress(OSError, ValueError):  # it is closed
                room = select.poll()
                room.register(self._connections[peer], select.POLLOUT)
                if not room.poll(0):
                    return False
                self._connections[peer].sendall(frame)
            return True
        finally:
            self._sending[peer].release()

    def _listen(self, peer: int) -> None:
        def heard() -> None:
            self._silence[peer] = 0.0

        while True:
            try:
                message = receive(self._connections[peer], on_bytes=heard)
            except OSError:
                if peer not in self._left:
                    self._fail(Failure(f"{self.name(peer)} died: its connection closed without a word.", False), peer)
                self._done[peer].set()
                return
            if "quiet" in message:
                self._quiet_elsewhere = message["quiet"]
                continue
            if "all leave" in message:
                self._done[peer].set()
                continue
            if "give" not in message:
                self._left.add(peer)
                if self.process_id == 0:
                    self._done[peer].set()
            if "fail" in message:
                self._fail(Failure(**message["fail"]), peer)
            self._arrived[peer].put(message)

    def _watch(self) -> None:
        """Say that this process runs, and end the run where another one does not."""
        before = time.monotonic()
        while not self._closing.wait(BEAT_SECONDS):
            now = time.monotonic()
            # While it was stopped itself, nobody else was silent.
            passed, before = min(now - before, 2 * BEAT_SECONDS), now
            for peer in self._silence.keys() - self._left:
                self._silence[peer] += passed
                if self._silence[peer] >= SILENT_SECONDS:
                    silent = f"{self.name(peer)} has not answered for {SILENT_SECONDS:g} seconds"
                    self._fail(Failure(f"{silent}: it is stopped, or its host hangs.", False), peer)
                    return
            self._send_short({"quiet": self._some_are_quiet()})

    def _some_are_quiet(self) -> bool:
        waiting = (seconds for peer, seconds in self._silence.items() if peer not in self._left)
        return max(waiting, default=0.0) > QUIET_BEATS * BEAT_SECONDS

    def _fail(self, failure: Failure, source: int | None) -> None:
        """Remember the first failure, pass it on, and stop this process if its main thread does not."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = failure
        self._send_short({"fail": vars(failure)}, NEWS_SECONDS, hopeless=source)
        if source is None:  # its own failure: who calls goes on with it
            return
        for arrived in self._arrived.values():
            arrived.put({})  # wakes a gather, which looks at the failure first
        if not (failure.is_user_error and self._taken_up.wait(GRACE_SECONDS)):
            # At once, whatever other threads wait for: the devices' programs cannot be interrupted.
            _tell(failure)
            self.wait_for_others(besides=source)
            os._exit(2 if failure.is_user_error else 1)

    def wait_for_others(self, besides: int | None = None) -> None:
        """On process 0, until the others are gone: jax aborts them where its service, which lives here, ends first."""
        deadline = time.monotonic() + GRACE_SECONDS
        for peer, listener in self._listeners.items() if self.process_id == 0 else ():
            if peer != besides and listener is not threading.current_thread():
                listener.join(max(deadline - time.monotonic(), 0))

    def wait_for_news(self) -> None:
        """After a device's program has failed: if that is because another process died or is stopped, its name comes
        now, and ends this process."""
        deadline = time.monotonic() + NEWS_SECONDS
        while self._connections and (time.monotonic() < deadline or self._quiet_elsewhere or self._some_are_quiet()):
            time.sleep(BEAT_SECONDS / 10)

    def fail(self, error: str, *, is_user_error: bool) -> None:
        """Tell the others why this process stops; nothing where they know already."""
        self._taken_up.set()  # another one's failure, if it came first, stops this process no more: it has its own
        self._fail(Failure(f"{self.name(self.process_id)} stopped: {error}", is_user_error), None)

    def leave(self) -> None:
        """Close when all others leave too: jax aborts every process where one is a minute later than another."""
        self._send_short({"leave": None}, NEWS_SECONDS)
        for done in self._done.values():
            done.wait()
        if self.process_id == 0:
            self._send_short({"all leave": None}, NEWS_SECONDS)
        self.close()

    def close(self) -> None:
        """Leave in peace: the others go on, or leave too."""
        self._left |= set(self._connections)
        self._closing.set()
        self._send_short({"leave": None}, NEWS_SECONDS)
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that listens
        for thread in self._threads:
            thread.join()
        for connection in self._connections.values():
            connection.close()
