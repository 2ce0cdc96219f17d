"""Processes of a run that are stopped, continued and killed, and strangers who would take their places.

They are real processes that exchange, without devices, so that a start takes a second.
"""

import contextlib
import hmac
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest

from rpo_jax.hosts import roll_call as calls
from rpo_jax.hosts.channel import MAGIC, PREFIX, OtherProtocol, encode, receive
from rpo_jax.hosts.roll_call import MAX_HELLO_BYTES, SECRET, listening_at, roll_call
from tests.processes import REPOSITORY, Ended, free_port

HOST = socket.gethostname()
ENDLESS = 10**9
SILENT = 3  # seconds


class Members:
    """Processes that meet on loopback; killed at the end of the block, whatever they do."""

    def __init__(self, folder, count, rounds=ENDLESS, size=1, silent=SILENT, secrets=None, ids=None):
        port = free_port()
        self.outputs = [folder / f"process-{i}.txt" for i in range(count)]
        self.running = []
        for i, output in enumerate(self.outputs):
            process_id = i if ids is None else ids[i]
            numbers = map(str, (port, count, process_id, rounds, size, silent))
            secret = (secrets or {}).get(i)
            environment = {key: value for key, value in os.environ.items() if key != SECRET}
            with output.open("wb") as file:
                self.running.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.member", *numbers],
                        cwd=REPOSITORY,
                        env=environment | ({} if secret is None else {SECRET: secret}),
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.running:
            process.kill()
            process.wait()

    def signal(self, number, *which):
        for i in which:
            self.running[i].send_signal(number)

    def until_they_exchange(self):
        lines = [output.read_text().count("\n") for output in self.outputs]
        deadline = time.monotonic() + 60
        while not all(o.read_text().count("\n") > n for o, n in zip(self.outputs, lines, strict=True)):
            assert time.monotonic() < deadline, [output.read_text() for output in self.outputs]
            time.sleep(0.05)

    def ended(self, *which):
        which = which or range(len(self.running))
        return [Ended(self.running[i].wait(60), self.outputs[i].read_text()) for i in which]


def errors(output):
    return [line for line in output.splitlines() if not line.replace(" ", "").isdigit()]


@pytest.mark.parametrize(
    ("victim", "size"),
    [(0, 1), *(pytest.param(1, size, marks=pytest.mark.slow) for size in (1, 5_000_000))],
    ids=["main", "other", "full buffers"],
)
def test_who_is_stopped_for_ever_ends_the_run_by_its_name(tmp_path, victim, size):
    expected = (
        f"error: process {victim} ({HOST}) has not answered for {SILENT} seconds: it is stopped, or its host hangs."
    )
    with Members(tmp_path, 3, size=size) as members:
        members.until_they_exchange()
        members.signal(signal.SIGSTOP, victim)
        for process in members.ended(*({0, 1, 2} - {victim})):
            assert process.status == 1, process.output
            assert errors(process.output) == [expected]
        members.signal(signal.SIGCONT, victim)
        (late,) = members.ended(victim)
        assert late.status == 1
        assert len(errors(late.output)) == 1, late.output
        assert errors(late.output)[0].startswith("error: process "), late.output


@pytest.mark.parametrize("victims", [(0,), *(pytest.param(both, marks=pytest.mark.slow) for both in ((1,), (0, 1)))])
def test_a_pause_changes_nothing(tmp_path, victims):
    """Of one process while the others have patience, and of all of them however long: a suspended machine."""
    seconds = 1 if len(victims) == 1 else SILENT + 2
    with Members(tmp_path, 2, rounds=200, silent=60 if len(victims) == 1 else SILENT) as members:
        members.until_they_exchange()
        members.signal(signal.SIGSTOP, *victims)
        time.sleep(seconds)
        members.signal(signal.SIGCONT, *victims)
        for process in members.ended():
            assert process.status == 0, process.output
            assert process.output.splitlines() == [f"{number} {number}" for number in range(200)]


@pytest.mark.parametrize("victim", [0, 1])
def test_who_is_killed_is_named_to_all(tmp_path, victim):
    with Members(tmp_path, 3) as members:
        members.until_they_exchange()
        members.signal(signal.SIGKILL, victim)
        for process in members.ended(*({0, 1, 2} - {victim})):
            assert process.status == 1
            told = errors(process.output)
            assert told == [f"error: process {victim} ({HOST}) died: its connection closed without a word."]


def test_a_common_secret_lets_all_in(tmp_path):
    with Members(tmp_path, 2, rounds=3, secrets={0: "sésame", 1: "sésame"}) as members:
        assert [process.status for process in members.ended()] == [0, 0]


@pytest.mark.parametrize("own", [None, "", "other"])
def test_another_secret_is_told_to_who_has_it(tmp_path, own):
    with Members(tmp_path, 2, secrets={0: "one", 1: own}) as members:
        (process,) = members.ended(1)
    assert process.status == 2
    assert f"error: process 1 ({HOST}) and the coordinator 127.0.0.1:" in process.output
    assert f"do not have the same {SECRET} in their environments; give it to all processes" in process.output


def frame(value, magic=MAGIC, header_bytes=None, body_bytes=0):
    header = json.dumps(value).encode()
    return PREFIX.pack(magic, len(header) if header_bytes is None else header_bytes, body_bytes) + header


def hello(process_id: object = 1, count: object = 2, host: object = "b", nonce: object = "n"):
    return frame([process_id, count, host, nonce])


# What somebody says who is no process of the run.
STRANGERS = {
    "nothing": b"",
    "half a hello": hello()[:-3],
    "a browser": b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    "another version": frame([1, 2, "b"], magic=b"rpo_jax2"),
    "a hello of an earlier version": frame([1, 2, "b"]),
    "an endless header": frame([1, 2, "b", "n"], header_bytes=2**31),
    "an endless array": frame([1, 2, "b", "n"], body_bytes=2**40),
    "a header of one byte more": frame(" " * (MAX_HELLO_BYTES - 1)),
    "no hello": frame({}),
    "an id that nobody has": hello(99),
    "an id below zero": hello(-5),
    "an id that is no number": hello("1"),
    "an id that is true": hello(True),
    "half an id": hello(1.0),
    "too many processes": hello(1, 10**9),
    "an endless number": frame([1, 10**3000, "b", "n"]),
    "a host that is no text": hello(host={}),
    "a host that colours the terminal": hello(host="\33[31m"),
    "half a character": hello(host="\ud800"),
    "a long host": hello(host="b" * 256),
    "no nonce": hello(nonce=None),
    "brackets": PREFIX.pack(MAGIC, 4000, 0) + b"[" * 4000,
    "an array": frame({"__array__": ["|u1", [2**60], 0]}),
    "an array of objects": frame({"__array__": ["O", [0], 0]}),
    "an array without a shape": frame({"__array__": 1}),
    "a hello, and no proof": hello(),
    "a hello, and a wrong proof": hello() + frame("0" * 64),
    "a hello, and another thing": hello() + frame({}),
    "a hello, and half a character": hello() + frame("\ud800"),
}


def met(address, count, meanwhile):
    """The channels of a run's processes, as threads of this one; `meanwhile` comes before process 1."""
    found = {}

    def join(process_id):
        found[process_id] = roll_call(address, count, process_id, 30)

    threads = [threading.Thread(target=join, args=(process_id,)) for process_id in range(count)]
    threads[0].start()
    meanwhile()
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[process_id] for process_id in range(count)]


def connected(port):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), 10)
    raise AssertionError("nobody listens")


def assert_starts(port, meanwhile):
    channels = met(f"127.0.0.1:{port}", 2, meanwhile)
    assert [channel.hosts for channel in channels] == [[HOST, HOST]] * 2
    for channel in channels:
        channel.close()


@pytest.mark.parametrize("packet", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_at_the_roll_call_is_dropped_and_the_start_goes_on(packet, monkeypatch):
    monkeypatch.setattr(calls, "HELLO_SECONDS", 1000)  # nobody waits for a stranger to go on
    port = free_port()
    with contextlib.ExitStack() as stack:
        assert_starts(port, lambda: stack.enter_context(connected(port)).sendall(packet))


def test_strangers_who_say_a_byte_now_and_then_hold_nobody_up(monkeypatch):
    monkeypatch.setattr(calls, "HELLO_SECONDS", 0.5)
    monkeypatch.setattr(calls, "UNHEARD", 1)
    port, ended = free_port(), threading.Event()
    with contextlib.ExitStack() as stack:

        def come():
            slow = [stack.enter_context(connected(port)) for _ in range(10)]  # more than are heard at once

            def drip():
                for byte in hello():
                    for connection in slow:
                        with contextlib.suppress(OSError):
                            connection.sendall(bytes([byte]))
                    if ended.wait(0.1):
                        return

            dripping = threading.Thread(target=drip)
            stack.callback(dripping.join)
            stack.callback(ended.set)
            dripping.start()

        assert_starts(port, come)


def test_who_speaks_the_protocol_without_the_secret_gets_no_seat(monkeypatch):
    monkeypatch.setenv(SECRET, "open sesame")
    port, answers = free_port(), []

    def come():
        with connected(port) as stranger:
            stranger.sendall(hello())
            challenge = receive(stranger, 10)
            proof = hmac.new(b"", json.dumps(["process", "n", challenge["nonce"], 1, 2, "b"]).encode(), "sha256")
            stranger.sendall(encode(proof.hexdigest()))
            with pytest.raises(ConnectionError):
                answers.append(receive(stranger, 10))

    assert_starts(port, come)
    assert not answers


def test_who_was_turned_away_is_named_where_somebody_is_missing(monkeypatch):
    monkeypatch.setenv(SECRET, "open sesame")
    port = free_port()

    def come():
        with connected(port) as stranger:
            stranger.sendall(hello(host="elsewhere"))
            receive(stranger, 10)
            stranger.sendall(encode("what the coordinator said"))

    coming = threading.Thread(target=come)
    coming.start()
    with pytest.raises(ValueError, match=rf"missing: 1\..* without this run's {SECRET}: process 1 \(elsewhere\)\."):
        roll_call(f"127.0.0.1:{port}", 2, 0, 2)
    coming.join()


IMPOSTORS = {
    "a web server": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "an endless header": frame({}, header_bytes=2**31),
    "an endless array": frame({}, body_bytes=2**40),
    "an answer at once": frame({"refused": "", "hosts": ["a", "b"]}),
    "an answer that is no text": frame({"nonce": {}, "proof": "x"}),
}


@pytest.mark.parametrize("packet", IMPOSTORS.values(), ids=IMPOSTORS)
def test_another_program_at_the_coordinator_is_told_apart(packet):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with contextlib.ExitStack() as stack:
            answering = threading.Thread(
                target=lambda: stack.enter_context(server.accept()[0]).sendall(packet), daemon=True
            )
            answering.start()
            with pytest.raises(ValueError, match=f"version of this one, answers at the coordinator 127.0.0.1:{port}"):
                roll_call(f"127.0.0.1:{port}", 2, 1, 20)
            answering.join()


def test_nothing_is_made_room_for_before_the_sender_is_known():
    for packet in STRANGERS.values():
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(packet)
            theirs.shutdown(socket.SHUT_WR)
            tracemalloc.start()
            with contextlib.suppress(OtherProtocol, ConnectionError):
                receive(ours, 10, MAX_HELLO_BYTES)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < 2**18, packet[:80]


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("localhost:1", "127.0.0.1:1"),
        ("127.0.0.1:1", "127.0.0.1:1"),
        ("127.0.0.2:1", "127.0.0.2:1"),
        ("127.1:1", "127.0.0.1:1"),
        ("2130706433:1", "127.0.0.1:1"),
        ("[::1]:1", "[::1]:1"),
        ("[0:0::1]:1", "[::1]:1"),
        ("[::ffff:127.0.0.1]:1", "[::ffff:127.0.0.1]:1"),
        ("10.0.0.1:1", None),
        ("0.0.0.0:1", None),
        ("home:1", "127.0.0.7:1"),
        ("outside:1", None),
        ("both:1", None),
        ("nowhere:1", None),
        ("this.cluster:1", None),
    ],
)
def test_on_loopback_a_run_listens_nowhere_else(monkeypatch, address, place):
    names = {"home": ["127.0.0.7"], "outside": ["10.0.0.1"], "both": ["127.0.0.1", "10.0.0.1"], "this": ["127.0.1.1"]}
    real = socket.getaddrinfo

    def found(host, port, **options):
        if host == "nowhere":
            raise socket.gaierror
        return [entry for address in names.get(host, [host]) for entry in real(address, port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    monkeypatch.setattr(socket, "gethostname", lambda: "this")
    assert listening_at(address) == place
