"""Which processes a run has, how they find each other, and what they tell each other besides the devices' programs.

A run's processes are those of the configuration, else of the cluster that jax recognises, else there is one. All that
is here holds for one process too: it gathers what it gives.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import clusters, xla_bridge  # jax has no public name for "what would initialize() choose?"

from rpo_jax.config import Config, DistributedConfig
from rpo_jax.hosts.channel import Channel, PeerFailure
from rpo_jax.hosts.roll_call import roll_call, split_address

T = TypeVar("T")

CLUSTERS = {
    "slurm": "SLURM",
    "ompi": "Open MPI",
    "gketpu": "GKE TPU",
    "gcetpu": "Cloud TPU",
    "k8s": "Kubernetes",
}
OWN_KEYS = ("run.cache_dir",)  # settings that may differ from host to host
NEWS_SECONDS = 5  # how long the news of a death may take, where a device's program fails of it first
SHUTDOWN_SECONDS = 60


@dataclass(frozen=True)
class Cluster:
    """Where a run's processes meet, and which of them this is.

    Attributes:
        reason: why it is this, for the user.
        local_device_ids: the devices of this host that this process has; all where None.
    """

    coordinator: str
    num_processes: int
    process_id: int
    reason: str
    local_device_ids: Sequence[int] | None = None


class _Run:
    """This process's place among the others; a process is in one run of processes from its first to its last."""

    channel = Channel(0, [socket.gethostname()], {})
    cluster: Cluster | None = None


def find_cluster(config: DistributedConfig) -> Cluster | None:
    """The processes that the configuration names, else those of the cluster around; None where this one is alone."""
    if config.num_processes is not None:
        assert config.coordinator is not None, "checked with the configuration"
        assert config.process_id is not None, "checked with the configuration"
        if config.num_processes == 1:
            return None
        return Cluster(config.coordinator, config.num_processes, config.process_id, "as configured")
    found = _detected()
    if found is None:
        return None
    coordinator, num_processes, process_id, local = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, config.timeout_seconds
    )
    if num_processes == 1 or None in (coordinator, num_processes, process_id):
        return None
    assert coordinator is not None
    assert num_processes is not None
    assert process_id is not None
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:  # jax reads it where it is told nothing
        local = None
    return Cluster(coordinator, num_processes, process_id, f"found {CLUSTERS.get(found, found)}", local)


def _detected() -> str | None:
    """The first cluster that jax recognises, in the order in which jax asks."""
    for kind in clusters.ClusterEnv._cluster_types:
        if not kind.opt_in_only_method and kind.is_env_present():
            return kind.name
    return None


def initialize(config: Config) -> str:
    """Meet the run's other processes and start jax among them; returns one line that says what was chosen and why.

    Again in the same process, it only compares the new configuration.

    Raises ValueError where the processes do not meet in time, two have one id, or their configurations differ.
    """
    if _Run.cluster is None:
        _join(config)
    elif config.distributed.num_processes is not None:
        asked, joined = find_cluster(config.distributed), dataclasses.replace(_Run.cluster, reason="as configured")
        if asked != joined:
            raise ValueError(
                f"this process is {joined.process_id} of {joined.num_processes} at {joined.coordinator} already, and "
                "cannot join other ones; use the same distributed section, or another process."
            )
    if _Run.cluster is None:
        return "1 process: distributed.* names no others, and no cluster was found"
    _compare(config)
    found = _Run.cluster
    return (
        f"{found.num_processes} processes, {found.reason}: coordinator {found.coordinator}, this is process "
        f"{found.process_id} on {_Run.channel.hosts[found.process_id]}"
    )


def _join(config: Config) -> None:
    if jax.distributed.is_initialized():
        raise ValueError("jax.distributed.initialize() was called before; leave it to rpo_jax (distributed.*).")
    cluster = find_cluster(config.distributed)
    if cluster is None:
        return
    if xla_bridge.backends_are_initialized():
        raise ValueError("jax is in use already, so this process can join no others; start the run in a new process.")
    seconds = config.distributed.timeout_seconds
    _Run.channel = roll_call(cluster.coordinator, cluster.num_processes, cluster.process_id, seconds)
    _Run.cluster = cluster
    with stopping_together():
        # Before jax starts: from then on all must stay together.
        _compare(config)
        host, port = split_address(cluster.coordinator)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            cluster.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=seconds,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            coordinator_bind_address=f"{host}:{port}" if host in ("127.0.0.1", "localhost") else None,
        )
    atexit.register(_Run.channel.close)  # before jax's own way out, which was registered earlier


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

    Takes dicts, lists, strings, numbers, None and NumPy arrays. Raises ValueError where another process has stopped
    because of something that its user can mend.
    """
    return _Run.channel.gather(mine)


def agree() -> None:
    """Go on only if all processes have come here."""
    gather(None)


class Agreed(RuntimeError):
    """An end that every process comes to by itself, from numbers that all of them have."""


def stop_others(reason: str) -> None:
    """Tell the other processes that this one stops, and why: they stop too."""
    _Run.channel.fail(reason, mendable=True)


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
        _Run.channel.fail(str(error), mendable=True)
        raise
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and num_processes() > 1:
            time.sleep(NEWS_SECONDS)  # if it is because another one died, its name comes now, and ends this process
        _Run.channel.fail(f"{type(error).__name__}: {error}", mendable=False)
        raise


def leave(status: int) -> int:
    """Leave after a failure: alone through the interpreter, with others at once, as jax would wait for them."""
    if num_processes() > 1:
        _leave_now(status)
    return status


def _leave_now(status: int) -> NoReturn:
    if sys.exc_info()[0] is not None and status == 1:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    _Run.channel.wait_for_others()
    os._exit(status)
