"""How a run's processes meet, and what they exchange besides the devices' programs.

All that is here holds for one process too: it gathers what it gives.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from rpo_jax.config import Config
from rpo_jax.hosts import cluster
from rpo_jax.hosts.channel import Channel, PeerFailure
from rpo_jax.hosts.roll_call import listening_at, roll_call

T = TypeVar("T")

OWN_KEYS = ("run.cache_dir",)  # settings that may differ from host to host
SHUTDOWN_SECONDS = 60


class _Run:
    """This process's place among the others; a process is in one run of processes from its first to its last."""

    channel = Channel(0, [socket.gethostname()], {})
    cluster: cluster.Cluster | None = None


def initialize(config: Config) -> str:
    """Meet the run's other processes and start jax among them; returns one line that says what was chosen and why.

    Again in the same process, it only compares the new configuration.

    Raises ValueError where the processes do not meet in time, two have one id, or their configurations differ.
    """
    if _Run.cluster is None:
        _join(config)
    else:
        joined = dataclasses.replace(_Run.cluster, reason="as configured")
        if config.distributed.num_processes is not None and cluster.find_cluster(config.distributed) != joined:
            raise ValueError(
                f"this process is {joined.process_id} of {joined.num_processes} at {joined.coordinator} already, and "
                "cannot join other ones; use the same distributed section, or another process."
            )
        _compare(config)
    if _Run.cluster is None:
        return "1 process: distributed.* names no others, and no cluster was found"
    chosen = _Run.cluster
    return (
        f"{chosen.num_processes} processes, {chosen.reason}: coordinator {chosen.coordinator}, this is process "
        f"{chosen.process_id} on {_Run.channel.hosts[chosen.process_id]}"
    )


def _join(config: Config) -> None:
    if jax.distributed.is_initialized():
        raise ValueError("jax.distributed.initialize() was called before; leave it to rpo_jax (distributed.*).")
    chosen = cluster.find_cluster(config.distributed)
    if chosen is None:
        return
    if cluster.has_backends():
        raise ValueError("jax is in use already, so this process can join no others; start the run in a new process.")
    seconds = config.distributed.timeout_seconds
    _Run.channel = roll_call(chosen.coordinator, chosen.num_processes, chosen.process_id, seconds)
    _Run.cluster = chosen
    with stopping_together():
        # Before jax starts: from then on all must stay together.
        _compare(config)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            chosen.coordinator,
            chosen.num_processes,
            chosen.process_id,
            chosen.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=seconds,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            coordinator_bind_address=listening_at(chosen.coordinator),
        )
    atexit.register(_Run.channel.leave)  # before jax's own way out, which was registered earlier


def _compare(config: Config) -> None:
    """ValueError on every process where the configurations or versions of two differ."""
    settings = {
        f"{section}.{key}": value
        for section, values in dataclasses.asdict(config).items()
        if section != "distributed"
        for key, value in values.items()
        if f"{section}.{key}" not in OWN_KEYS
    }
    everyone = gather(json.loads(json.dumps({**settings, "the version of jax": jax.__version__})))
    for process_id, theirs in enumerate(everyone):
        for key, value in everyone[0].items():
            if theirs.get(key) != value:
                raise ValueError(
                    f"{_Run.channel.name(process_id)} has {key}={theirs.get(key)}, but {_Run.channel.name(0)} has "
                    f"{key}={value}; start all processes with the same configuration."
                )


def process_id() -> int:
    return _Run.channel.process_id


def num_processes() -> int:
    return len(_Run.channel.hosts)


def is_main() -> bool:
    """Whether this is the process that writes the run folder and talks on the console."""
    return process_id() == 0


def name(process_id: int) -> str:
    """A process and its host, for a message."""
    return _Run.channel.name(process_id)


def gather(mine: Any) -> list[Any]:
    """What every process gives, in the order of their ids; every process must call this, in the same order.

    Takes dicts, lists, strings, numbers, None and NumPy arrays. Raises PeerFailure where another process has stopped
    because of something that its user can correct.
    """
    return _Run.channel.gather(mine)


def agree() -> None:
    """Go on only if all processes have come here."""
    gather(None)


class Agreed(RuntimeError):
    """An end that every process comes to by itself, from numbers that all of them have."""


def stop_others(reason: str) -> None:
    """Tell the other processes that this one stops, and why: they stop too."""
    _Run.channel.fail(reason, is_user_error=True)


def from_main(make: Callable[[], T]) -> T:
    """What process 0 makes, on every process."""
    return gather(make() if is_main() else None)[0]


@contextlib.contextmanager
def stopping_together() -> Iterator[None]:
    """Whatever stops this process inside stops the others too, with its message."""
    try:
        yield
    except (PeerFailure, Agreed):
        raise
    except (ValueError, OSError) as error:
        _Run.channel.fail(str(error), is_user_error=True)
        raise
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            _Run.channel.wait_for_news()
        _Run.channel.fail(f"{type(error).__name__}: {error}", is_user_error=False)
        raise


def leave(status: int) -> int:
    """Leave after a failure: alone through the interpreter, with others at once, as jax would wait for them."""
    if num_processes() == 1:
        return status
    if sys.exc_info()[0] is not None and status == 1:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    _Run.channel.wait_for_others()
    os._exit(status)
