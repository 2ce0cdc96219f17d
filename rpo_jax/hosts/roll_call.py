"""The roll call of a run's processes, before jax starts: its own way of meeting ends a process that nobody answers.

Process 0 listens where jax's coordination service is going to; what is wrong is said on every process that came. Who
connects without a proper introduction of at most MAX_HELLO_BYTES is dropped, and holds nobody up.
"""

from __future__ import annotations

import contextlib
import ipaddress
import queue
import socket
import threading
import time
from typing import NamedTuple

from rpo_jax.hosts.channel import Channel, OtherProtocol, encode, receive

RETRY_SECONDS = 0.2
ACCEPT_SECONDS = 0.1
HELLO_SECONDS = 5
ANSWER_SECONDS = 10
MAX_HELLO_BYTES = 4096


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

    A host's name does not tell the address under which the others reach it; on Debian it is 127.0.1.1 at home.
    """
    host, port = split_address(address)
    if host == "localhost":
        return f"127.0.0.1:{port}"
    with contextlib.suppress(ValueError):
        return address if ipaddress.ip_address(host).is_loopback else None
    return None


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
    heard: queue.Queue[tuple[socket.socket, Hello]] = queue.Queue()
    with _listen_at(address, own) as server:
        server.settimeout(ACCEPT_SECONDS)
        while len(hellos) < own.num_processes and not refused:
            with contextlib.suppress(OSError):  # none came, or it has gone already
                threading.Thread(target=_hear, args=(server.accept()[0], heard), daemon=True).start()
            while not heard.empty() and not refused:
                connection, hello = heard.get()
                refused = _refusal(hellos, hello)
                hellos.setdefault(hello.process_id, hello)
                connections[-1 if refused else hello.process_id] = connection
            if time.monotonic() > deadline and len(hellos) < own.num_processes and not refused:
                absent = ", ".join(str(i) for i in range(own.num_processes) if i not in hellos)
                refused = (
                    f"{len(hellos)} of {own.num_processes} processes met at {address} within {timeout_seconds:g} "
                    f"seconds; missing: {absent}. Start them, or raise distributed.timeout_seconds."
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


def _hear(connection: socket.socket, heard: queue.Queue[tuple[socket.socket, Hello]]) -> None:
    """Take a process's hello; what says anything else, or nothing, is dropped."""
    with contextlib.suppress(OSError):
        match receive(connection, HELLO_SECONDS, MAX_HELLO_BYTES):
            case [int(process_id), int(count), str(host)] if 0 <= process_id < count and host.isprintable():
                heard.put((connection, Hello(process_id, count, host)))
                return
    connection.close()


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
                connection.sendall(encode(hello))
                # Process 0 may have started later than this one, and the others later still.
                answer = receive(connection, timeout_seconds + ANSWER_SECONDS)
                match answer:
                    case {"refused": "", "hosts": [*hosts]} if len(hosts) == hello.num_processes:
                        unless_met.pop_all()
                        return connection, hosts
                    case {"refused": str(refused)} if refused:
                        raise ValueError(refused)
                raise OtherProtocol("another program, or another version of this one, answers")
        except OtherProtocol:
            raise
        except OSError as error:
            reason = error
            time.sleep(RETRY_SECONDS)
    raise reason
