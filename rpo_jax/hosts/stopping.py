"""Requests to stop a run: signals and its time limit, taken up between two steps, by all processes at one step.

A signal is noted by a handler, which Python runs between two lines of its main thread. The second one ends the process
from a thread of its own, at once also where the main thread waits for the device or for a compiler.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from rpo_jax.hosts import processes

# The last one comes where a terminal or a connection closes; nohup has it ignored.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TIME_LIMIT = "train.max_minutes"
# `timeout` and some schedulers send a signal to the process and to its group: that is one request, sent twice.
REPEAT_SECONDS = 0.5
EXCHANGE_SECONDS = 1.0  # how long a request may stay unknown to the other processes, besides a step


class Stopped(KeyboardInterrupt):
    """A run was asked to stop before it had anything to save.

    Attributes:
        reason: the signal's name, or the time limit's key.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"stopped by {reason} before the first step")
        self.reason = reason


@dataclass
class _Pace:
    """How many calls lie between two exchanges of processes, so that exchanges cost nothing that could be measured."""

    calls: int = 0
    every: int = 1
    since: float = math.nan


class Stopping:
    """What asks one run to stop.

    Args:
        max_minutes: time limit, from the making of this object on; None where there is none.

    Attributes:
        reason: why the run stops, once all its processes have agreed on it.
        started: whether there is a run folder to go on with.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.reason: str | None = None
        self.started = False
        self._deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._signal: str | None = None
        self._deferring = False
        self._paces: dict[str, _Pace] = {}

    @property
    def has_limit(self) -> bool:
        return self._deadline < math.inf

    def defer(self) -> None:
        """From now on a signal waits until the run asks; until now it raised Stopped, as there was nothing to save."""
        self._deferring = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals inside, and give them back to who had them before.

        Only a program's main thread gets signals and may handle them: elsewhere, as in a notebook's worker thread, this
        does nothing. After jax.distributed.initialize, which sets a handler of its own.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
        earlier = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            with _second_signal_exits():
                yield
        except Stopped:
            if self.reason is None:  # the others do not know
                processes.stop_others(f"{self._signal} before the first step")
            raise
        finally:
            for number, handler in earlier.items():
                # None: a handler that is not Python's, which cannot be set again from here.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._signal is not None:
            if _is_interactive():
                raise KeyboardInterrupt  # ending the process would take the whole notebook along
            return
        self._signal = signal.Signals(number).name
        if not self._deferring:
            raise Stopped(self._signal)

    def requested(self, where: str, save_seconds: float = 0.0) -> str | None:
        """Why the run is to stop now; None where it goes on. All processes must call this equally often.

        One process looks at two variables. Several exchange theirs through the connections they have, about once a
        second, however short a step is: process 0 says how many calls of the same `where` come before the next time.

        Args:
            where: which of the run's loops asks; each has a pace of its own.
            save_seconds: what must be left of the time limit.
        """
        if self.reason is not None:
            return self.reason
        late = time.monotonic() + save_seconds >= self._deadline
        mine = self._signal or (TIME_LIMIT if late else None)
        if processes.num_processes() == 1:
            self.reason = mine
            return mine
        pace = self._paces.setdefault(where, _Pace())
        pace.calls += 1
        if pace.calls < pace.every:
            return None
        now = time.monotonic()
        # NaN the first time: then the next call exchanges again.
        per_call = (now - pace.since) / pace.calls
        wanted = int(EXCHANGE_SECONDS / per_call) if per_call > 0 else 1
        requests = processes.gather([mine, max(1, min(wanted, 2 * pace.every))])
        pace.calls, pace.every, pace.since = 0, requests[0][1], now
        self.reason = next((reason for reason, _ in requests if reason is not None), None)
        return self.reason


def _is_interactive() -> bool:
    return hasattr(sys, "ps1")  # set by Python's own prompt and by IPython, in notebooks too


@contextlib.contextmanager
def _second_signal_exits() -> Iterator[None]:
    """Inside, a second signal ends the process with status 128 and its number, whatever its main thread does."""
    if _is_interactive():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    earlier = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        writer.close()  # wakes the watcher
        watcher.join()
        reader.close()


def _watch(arrivals: socket.socket) -> None:
    """Python's C handler writes the number of each signal here as it arrives."""
    first = math.inf
    while number := arrivals.recv(1):
        if number[0] not in SIGNALS:
            continue
        if time.monotonic() - first > REPEAT_SECONDS:
            with contextlib.suppress(OSError):  # nobody may read it any more
                os.write(2, b"stopped at once by a second signal; what was not saved yet is lost\n")
            os._exit(128 + number[0])
        first = min(first, time.monotonic())
