"""The roll call of a run's processes, before jax starts: its own way of meeting ends a process that nobody answers.

Process 0 listens where jax's coordination service is going to; what is wrong is said on every process that came.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

from rpo_jax.hosts.channel import Channel, OtherProtocol, receive, send

RETRY_SECONDS = 0.2
HELLO_SECONDS = 5  # what connects without introducing itself does not hold the others up
ANSWER_SECONDS = 10


def split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def roll_call(address: str, num_processes: int, process_id: int, timeout_seconds: float) -> Channel:
    """Meet the other processes at process 0's address.

    Raises ValueError where they do not all come in time, two have one id, or they do not agree how many they are.
    """
    deadline = time.monotonic() + timeout_seconds
    hello = {"process_id": process_id, "num_processes": num_processes, "host": socket.gethostname()}
    if process_id == 0:
        return _receive_all(address, hello, deadline, timeout_seconds)
    connection, answer = _introduce(address, hello, deadline, timeout_seconds)
    return Channel(process_id, answer["hosts"], {0: connection})


def _listen_at(address: str, hello: dict[str, Any], deadline: float, timeout_seconds: float) -> socket.socket:
    host, port = split_address(address)
    loopback = host in ("127.0.0.1", "localhost")
    try:
        if loopback or not socket.has_dualstack_ipv6():
            return socket.create_server(("127.0.0.1" if loopback else "", port), backlog=4096)
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    except OSError as error:
        # If it is another process 0 that holds the port, it answers, and both say so.
        _introduce(address, hello, min(deadline, time.monotonic() + 2), timeout_seconds, holder=error)
        raise AssertionError("process 0 never gets another process 0's consent") from error


def _receive_all(address: str, hello: dict[str, Any], deadline: float, timeout_seconds: float) -> Channel:
    met: dict[int, tuple[socket.socket | None, dict[str, Any]]] = {0: (None, hello)}
    refused = ""
    late: socket.socket | None = None
    with _listen_at(address, hello, deadline, timeout_seconds) as server:
        while len(met) < hello["num_processes"] and not refused:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                absent = sorted(set(range(hello["num_processes"])) - set(met))
                refused = (
                    f"{len(met)} of {hello['num_processes']} processes met at {address} within {timeout_seconds:g} "
                    f"seconds; missing: {', '.join(map(str, absent))}. Start them, or raise "
                    "distributed.timeout_seconds."
                )
                break
            try:
                connection.settimeout(HELLO_SECONDS)
                other = receive(connection)
            except OSError:
                continue  # a port scan, or a process that was stopped while it introduced itself
            refused = _refusal(met, other)
            if refused:
                late = connection
            else:
                met[other["process_id"]] = connection, other
    connections = {peer: connection for peer, (connection, _) in met.items() if connection is not None}
    hosts = [met[peer][1]["host"] for peer in sorted(met)]
    for connection in [*connections.values(), *([late] if late else [])]:
        with contextlib.suppress(OSError):  # who has gone meanwhile is missed at the first exchange
            send(connection, {"refused": refused, "hosts": hosts})
        if refused:
            connection.close()
    if refused:
        raise ValueError(refused)
    return Channel(0, hosts, connections)


def _refusal(met: dict[int, Any], other: dict[str, Any]) -> str:
    """Why a process cannot join; empty where it can."""
    process_id, own = other["process_id"], met[0][1]
    if other["num_processes"] != own["num_processes"]:
        return (
            f"distributed.num_processes is {own['num_processes']} for process 0 ({own['host']}) and "
            f"{other['num_processes']} for process {process_id} ({other['host']}); give all the same."
        )
    if process_id in met:
        return (
            f"two processes have distributed.process_id={process_id}: one on {met[process_id][1]['host']} and one on "
            f"{other['host']}; give each its own, from 0 to {own['num_processes'] - 1}."
        )
    return ""


def _introduce(
    address: str, hello: dict[str, Any], deadline: float, timeout_seconds: float, holder: OSError | None = None
) -> tuple[socket.socket, dict[str, Any]]:
    """Connect to process 0, as often as it takes, and hear whether all is well."""
    reason: object = "nothing answers"
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection(split_address(address), max(deadline - time.monotonic(), 0.001))
        except OSError as error:
            reason = error
            time.sleep(RETRY_SECONDS)
            continue
        try:
            # All the others may come later than this one.
            connection.settimeout(timeout_seconds + ANSWER_SECONDS)
            send(connection, hello)
            answer = receive(connection)
            if not answer["refused"]:
                return connection, answer
        except OSError as error:
            connection.close()
            reason = error
            if isinstance(error, OtherProtocol):
                break
            time.sleep(RETRY_SECONDS)
            continue
        connection.close()
        raise ValueError(answer["refused"])
    if holder is not None:
        raise ValueError(
            f"process 0 cannot wait for the others at {address} ({holder}); is another program on that port? Choose "
            "another in distributed.coordinator."
        )
    if isinstance(reason, OtherProtocol):
        raise ValueError(
            f"{reason} at the coordinator {address}; is that a run that has begun without process "
            f"{hello['process_id']} ({hello['host']}), because another has its id? Choose another port, or start all "
            "processes again."
        )
    raise ValueError(
        f"process {hello['process_id']} ({hello['host']}) did not reach the coordinator {address} within "
        f"{timeout_seconds:g} seconds ({reason}); start process 0 there, check distributed.coordinator and the "
        "firewall, or raise distributed.timeout_seconds."
    )
