"""The roll call of a run's processes, before jax starts: its own way of meeting ends a process that nobody answers.

Process 0 listens where jax's coordination service is going to; what is wrong is said on every process that came. Who
connects without a proper introduction of at most MAX_HELLO_BYTES is dropped, and holds nobody up.

Both sides prove that they know the run's secret, which is in the environment, by an HMAC of what each of them drew; the
secret itself is never sent. Where there is none, all that speak this protocol know it. multiprocessing.connection has
such a challenge too, but on Python 3.11 of MD5, without a deadline, and answered in the same form in which it is
asked, so that who knows nothing can pass on what the other side says.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import os
import queue
import secrets
import socket
import threading
import time
from typing import Any, NamedTuple

from rpo_jax.hosts.channel import OTHER, Channel, OtherProtocol, encode, receive

RETRY_SECONDS = 0.2
ACCEPT_SECONDS = 0.1
HELLO_SECONDS = 5
ANSWER_SECONDS = 10
MAX_HELLO_BYTES = 4096
MAX_HOST_CHARACTERS = 255
MAX_PROCESSES = 2**20
MAX_NAMED = 8  # of those who are turned away
UNHEARD = 64  # who may be heard at once, besides all processes
SECRET = "RPO_JAX_SECRET"  # environment variable


class Hello(NamedTuple):
    """How a process introduces itself."""

    process_id: int
    num_processes: int
    host: str


def split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def listening_at(address: str) -> str | None:
    """Where process 0 listens, and jax's service: on loopback if it is sought there, else everywhere (None).

    The name of this host does not tell the address under which the others reach it; on Debian it is 127.0.1.1 at home.
    """
    host, port = split_address(address)
    if host != "localhost" and host.partition(".")[0] == socket.gethostname().partition(".")[0]:
        return None
    try:
        addresses = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError:
        return None
    if not all(_is_loopback(str(place)) for place in addresses):
        return None
    place = sorted(map(str, addresses), key=lambda place: ":" in place)[0]
    return f"[{place}]:{port}" if ":" in place else f"{place}:{port}"


def _is_loopback(place: str) -> bool:
    address = ipaddress.ip_address(place)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def roll_call(address: str, num_processes: int, process_id: int, timeout_seconds: float) -> Channel:
    """Meet the other processes at process 0's address.

    Raises ValueError where they do not all come in time, two have one id, or they do not agree how many they are.
    """
    hello = Hello(process_id, num_processes, socket.gethostname())
    if process_id == 0:
        return _receive_all(address, hello, timeout_seconds)
    try:
        connection, hosts = _introduce(address, hello, timeout_seconds)
    except OtherProtocol as error:
        raise ValueError(
            f"{error} at the coordinator {address}; is that a run that has begun without process {process_id} "
            f"({hello.host}), because another has its id? Choose another port, or start all processes again."
        ) from None
    except OSError as error:
        raise ValueError(
            f"process {process_id} ({hello.host}) did not reach the coordinator {address} within {timeout_seconds:g} "
            f"seconds ({error}); start process 0 there, check distributed.coordinator and the firewall, or raise "
            "distributed.timeout_seconds."
        ) from None
    return Channel(process_id, hosts, {0: connection})


def _receive_all(address: str, own: Hello, timeout_seconds: float) -> Channel:
    deadline = time.monotonic() + timeout_seconds
    hellos, connections, refused = {0: own}, {}, ""
    door = _Door(own.num_processes)
    with _listen_at(address, own) as server:
        server.settimeout(ACCEPT_SECONDS)
        while len(hellos) < own.num_processes and not refused:
            door.open_for_one(server)
            while not door.heard.empty() and not refused:
                connection, hello = door.heard.get()
                refused = _refusal(hellos, hello)
                hellos.setdefault(hello.process_id, hello)
                connections[-1 if refused else hello.process_id] = connection
            if time.monotonic() > deadline and len(hellos) < own.num_processes and not refused:
                absent = ", ".join(str(i) for i in range(own.num_processes) if i not in hellos)
                turned_away = f" Turned away, without this run's {SECRET}: {', '.join(door.turned_away)}."
                refused = (
                    f"{len(hellos)} of {own.num_processes} processes met at {address} within {timeout_seconds:g} "
                    f"seconds; missing: {absent}. Start them, or raise distributed.timeout_seconds."
                    f"{turned_away if door.turned_away else ''}"
                )
    hosts = [hellos[process_id].host for process_id in sorted(hellos)]
    answer = encode({"refused": refused, "hosts": hosts})
    for connection in connections.values():
        with contextlib.suppress(OSError):  # who has gone meanwhile is missed at the first exchange
            connection.sendall(answer)
        if refused:
            connection.close()
    if refused:
        raise ValueError(refused)
    return Channel(0, hosts, connections)


class _Door:
    """Where process 0 hears who comes, so many at once, each for HELLO_SECONDS at most.

    Attributes:
        heard: those who have introduced themselves and know the secret.
        turned_away: the first of those who do not.
    """

    def __init__(self, num_processes: int) -> None:
        self.heard: queue.Queue[tuple[socket.socket, Hello]] = queue.Queue()
        self.turned_away: list[str] = []
        self._room = threading.BoundedSemaphore(num_processes + UNHEARD)

    def open_for_one(self, server: socket.socket) -> None:
        """Let in whoever comes within ACCEPT_SECONDS."""
        if not self._room.acquire(timeout=ACCEPT_SECONDS):
            return
        try:
            connection, _ = server.accept()
        except OSError as error:  # none came, or it has gone already
            self._room.release()
            if not isinstance(error, TimeoutError):
                time.sleep(ACCEPT_SECONDS)
            return
        threading.Thread(target=self._hear, args=(connection,), daemon=True).start()

    def _hear(self, connection: socket.socket) -> None:
        """Take a process's hello and its proof; what says anything else, or nothing, is dropped."""
        deadline = time.monotonic() + HELLO_SECONDS

        def read() -> Any:
            return receive(connection, deadline - time.monotonic(), MAX_HELLO_BYTES)

        try:
            with contextlib.suppress(OSError):
                hello, nonce = _hello(read())
                own_nonce = secrets.token_hex(16)
                proof = _proof("coordinator", nonce, own_nonce)
                connection.sendall(encode({"nonce": own_nonce, "proof": proof}))
                name, known = f"process {hello.process_id} ({hello.host})", False
                try:
                    known = _same(read(), _proof("process", nonce, own_nonce, *hello))
                finally:
                    if not known and len(self.turned_away) < MAX_NAMED:
                        self.turned_away.append(name)
                if known:
                    self.heard.put((connection, hello))
                    return
            connection.close()
        finally:
            self._room.release()


def _hello(message: Any) -> tuple[Hello, str]:
    match message:
        case [int(process_id), int(count), str(host), str(nonce)]:
            numbers = type(process_id) is type(count) is int and 0 <= process_id < count <= MAX_PROCESSES  # no booleans
            if numbers and host.isprintable() and len(host) <= MAX_HOST_CHARACTERS:
                return Hello(process_id, count, host), nonce
    raise OtherProtocol(OTHER)


def _proof(*of: str | int) -> str:
    """That one side knows the secret, in one conversation."""
    return hmac.new(os.fsencode(os.environ.get(SECRET, "")), json.dumps(of).encode(), "sha256").hexdigest()


def _same(proof: Any, expected: str) -> bool:
    return isinstance(proof, str) and hmac.compare_digest(proof.encode(errors="replace"), expected.encode())


def _listen_at(address: str, own: Hello) -> socket.socket:
    host, port = split_address(listening_at(address) or f":{split_address(address)[1]}")
    everywhere = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if everywhere or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=4096, dualstack_ipv6=everywhere)
    except OSError as holder:
        try:  # if it is another process 0 that holds the port, it answers, and both say so
            _introduce(address, own, timeout_seconds=2)
        except OSError:
            raise ValueError(
                f"process 0 cannot wait for the others at {address} ({holder}); is another program on that port? "
                "Choose another in distributed.coordinator."
            ) from None
        raise AssertionError("process 0 never gets another process 0's consent") from holder


def _refusal(hellos: dict[int, Hello], other: Hello) -> str:
    """Why a process cannot join; empty where it can."""
    own = hellos[0]
    if other.num_processes != own.num_processes:
        return (
            f"distributed.num_processes is {own.num_processes} for process 0 ({own.host}) and {other.num_processes} "
            f"for process {other.process_id} ({other.host}); give all the same."
        )
    if other.process_id in hellos:
        return (
            f"two processes have distributed.process_id={other.process_id}: one on {hellos[other.process_id].host} and "
            f"one on {other.host}; give each its own, from 0 to {own.num_processes - 1}."
        )
    return ""


def _introduce(address: str, hello: Hello, timeout_seconds: float) -> tuple[socket.socket, list[str]]:
    """Connect to process 0, as often as it takes, and hear who has come: the connection, and the names of all hosts.

    Raises ValueError where process 0 refuses this one or another, OtherProtocol where another program answers, and the
    last OSError where nothing does in time.
    """
    deadline = time.monotonic() + timeout_seconds
    reason = OSError("nothing answers")
    while (left := deadline - time.monotonic()) > 0:
        try:
            with contextlib.ExitStack() as unless_met:
                connection = unless_met.enter_context(socket.create_connection(split_address(address), left))
                nonce = secrets.token_hex(16)
                connection.sendall(encode([*hello, nonce]))
                # Process 0 may have started later than this one, and the others later still.
                seconds = timeout_seconds + ANSWER_SECONDS
                match receive(connection, seconds, MAX_HELLO_BYTES):
                    case {"nonce": str(theirs), "proof": proof}:
                        if not _same(proof, _proof("coordinator", nonce, theirs)):
                            raise ValueError(
                                f"process {hello.process_id} ({hello.host}) and the coordinator {address} do not have "
                                f"the same {SECRET} in their environments; give it to all processes, or to none."
                            )
                        connection.sendall(encode(_proof("process", nonce, theirs, *hello)))
                    case _:
                        raise OtherProtocol(OTHER)
                match receive(connection, seconds, MAX_HELLO_BYTES * (hello.num_processes + 1)):
                    case {"refused": "", "hosts": [*hosts]} if len(hosts) == hello.num_processes:
                        unless_met.pop_all()
                        return connection, hosts
                    case {"refused": str(refused)} if refused:
                        raise ValueError(refused)
                raise OtherProtocol(OTHER)
        except OtherProtocol:
            raise
        except OSError as error:
            reason = error
            time.sleep(RETRY_SECONDS)
    raise reason
