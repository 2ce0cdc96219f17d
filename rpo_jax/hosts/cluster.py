"""Which processes a run has: those of the configuration, else of the cluster that jax recognises, else one.

The one file that uses private names of jax: it has no public one for "what would jax.distributed.initialize choose?".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from jax._src import clusters, xla_bridge

from rpo_jax.config import DistributedConfig

NAMES = {
    "slurm": "SLURM",
    "ompi": "Open MPI",
    "gketpu": "GKE TPU",
    "gcetpu": "Cloud TPU",
    "k8s": "Kubernetes",
}


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


def find_cluster(config: DistributedConfig) -> Cluster | None:
    """The processes that the configuration names, else those of the cluster around; None where this one is alone."""
    if config.num_processes is not None:
        assert config.coordinator is not None, "checked with the configuration"
        assert config.process_id is not None, "checked with the configuration"
        if config.num_processes == 1:
            return None
        return Cluster(config.coordinator, config.num_processes, config.process_id, "as configured")
    # The first that is there, in the order in which jax asks.
    present = (kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method)
    kind = next((kind for kind in present if kind.is_env_present()), None)
    if kind is None:
        return None
    coordinator, num_processes, process_id, local = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, config.timeout_seconds
    )
    if num_processes == 1 or coordinator is None or num_processes is None or process_id is None:
        return None
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:  # jax reads it where it is given nothing
        local = None
    return Cluster(coordinator, num_processes, process_id, f"found {NAMES.get(kind.name, kind.name)}", local)


def has_backends() -> bool:
    """Whether jax has looked for its devices already: it can join no other processes then."""
    return xla_bridge.backends_are_initialized()
