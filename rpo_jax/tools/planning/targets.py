"""Devices that are not here, to compile for: TPU slices by libtpu, NVIDIA GPUs by JAX's CUDA plugin."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
import shlex
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from rpo_jax.core.templates import render
from rpo_jax.tools.planning.chips import CHIPS, GPUS, TPUS, Chip

# Who the machine is, where there is none to ask; more than one compiler at a time is no harm where no chip is held.
_NOWHERE = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
_KNOWN = {
    "v4": "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8 ...",
    "v5e": "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
    "v5p": "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8 ...",
    "v6e": "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
}
_SHORT = {"a100": "a100-80gb"}
_GPUS_PER_HOST = 8  # of servers with NVLink between all their GPUs
# What CUDA, NCCL and fragmentation leave of the memory that a driver shows: about what the makers' round figures are.
_USABLE = 0.95
_CUDA_PLUGIN = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
# With ptxas and libdevice; neither cuBLAS, cuDNN, NCCL nor a driver is needed to compile.
_TOOLKIT = ("nvidia-cuda-nvcc==13.5.37", "nvidia-nvvm==13.5.37")


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
        name: as the user gave it.
        chip: their rates.
        devices: JAX's, which are not here.
        memory: bytes that a program may take on each.
        platform: tpu, gpu: what the step is written for.
        hosts: among which the devices are split evenly, in their order; 1 where all reach each other by their links.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    memory: float
    platform: str
    hosts: int = 1

    def link_rate(self, group: tuple[int, ...]) -> float:
        """Bytes a second that each device of a group can send round it, one way; all devices where it is empty.

        A ring that enters a host once by each of its members' network cards is as fast as these together, but no faster
        than the links within.
        """
        each = len(self.devices) // self.hosts
        hosts = {member // each for member in group or range(len(self.devices))}
        if len(hosts) == 1 or self.chip.network_rate is None:
            return self.chip.link_rate
        members = (len(group) or len(self.devices)) / len(hosts)
        return min(self.chip.link_rate, self.chip.network_rate * members)


def target_of(topology: str, memory: float | None = None) -> Target:
    """The devices of v5p:4x4x4, h100:8 or h100:4x8.

    Args:
        memory: bytes of each GPU, in place of what its kind has.

    Raises:
        ValueError: no such devices, or what compiles for them is not installed.
    """
    name = topology.partition(":")[0]
    if name in TPUS:
        if memory is not None:
            raise ValueError(f"--device-memory goes with GPUs; --topology {topology} says what a TPU has.")
        return tpu_target(topology)
    if name in (*GPUS, *_SHORT):
        return gpu_target(topology, memory)
    names = (*TPUS, *GPUS, *_SHORT)
    nearest = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"--topology {topology} is not known, the nearest is {nearest}; give a TPU's generation and its layout, as "
        f"v5p:4x4x4, or a GPU and how many, as h100:8. {_known_tpus()}; GPUs: {', '.join(names[len(TPUS) :])}"
    )


def _known_tpus() -> str:
    return "; ".join(f"{name}: {_KNOWN[name]}" for name in TPUS)


def libtpu_requirement() -> str:
    """The libtpu that belongs to the JAX that is installed: another one's programs may not be readable."""
    asked = (line.partition(";") for line in metadata.requires("jax") or ())
    return next((name.strip() for name, _, extra in asked if name.startswith("libtpu") and "tpu" in extra), "libtpu")


def tpu_target(topology: str) -> Target:
    """The chips of a slice such as v5p:4x4x4, by libtpu; raises ValueError where libtpu is missing or knows none."""
    generation, _, layout = topology.partition(":")
    if not re.fullmatch(r"\d+(x\d+){1,2}", layout):
        raise ValueError(
            f"--topology {topology} is not known; give a generation and its layout, as v5p:4x4x4. {_known_tpus()}"
        )
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError(
            f"--topology needs libtpu, which compiles for TPUs without one: pip install '{libtpu_requirement()}'."
        )
    for name, value in _NOWHERE.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    # One device a chip: of the generations with two cores, v4 has to be asked for that.
    options = {"chip_config_name": "megacore"} if generation == "v4" else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # jaxlib raises several kinds
        raise ValueError(f"--topology {topology}: {one_line(error)}. {generation} has {_KNOWN[generation]}") from None
    expected = math.prod(int(part) for part in layout.split("x"))
    assert len(devices) == expected, f"{topology} has {len(devices)} devices"
    chip = CHIPS[generation]
    return Target(topology, chip, tuple(devices), chip.memory, "tpu")


def cuda_requirements() -> list[str]:
    """What compiles for NVIDIA GPUs with the JAX that is installed; for pip's --no-deps."""
    return [f"{name}=={metadata.version('jaxlib')}" for name in _CUDA_PLUGIN] + list(_TOOLKIT)


def check_cuda_compiler(topology: str) -> None:
    """Raise ValueError where JAX's CUDA plugin is missing, or belongs to another JAX."""
    hint = (
        f"pip install --no-deps --target .venv-cuda {' '.join(map(shlex.quote, cuda_requirements()))}, "
        "and set PYTHONPATH=.venv-cuda for this command alone"
    )
    wanted, versions = metadata.version("jaxlib"), {}
    for name in _CUDA_PLUGIN:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise ValueError(
                f"--topology {topology} needs JAX's CUDA plugin, which compiles for GPUs without one: {hint}."
            ) from None
    if wrong := [f"{name} {version}" for name, version in versions.items() if version != wanted]:
        raise ValueError(f"--topology {topology}: {' and '.join(wrong)} cannot be used by jaxlib {wanted}: {hint}.")


def gpu_layout(topology: str) -> tuple[int, int]:
    """Hosts, and GPUs of each, of h100:4x8, or of h100:32, which stands for hosts of 8.

    Raises ValueError for what is neither.
    """
    layout = topology.partition(":")[2]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", layout):
        raise ValueError(
            f"--topology {topology} is not known; give a GPU and how many, as h100:8, or hosts x GPUs of each, as "
            "h100:4x8."
        )
    hosts, _, each = layout.rpartition("x")
    if hosts:
        return int(hosts), int(each)
    if int(each) > _GPUS_PER_HOST and int(each) % _GPUS_PER_HOST:
        raise ValueError(
            f"--topology {topology}: {each} GPUs are no hosts of {_GPUS_PER_HOST}; give hosts x GPUs of each, as "
            "h100:4x8."
        )
    return max(1, int(each) // _GPUS_PER_HOST), min(int(each), _GPUS_PER_HOST)


def gpu_target(topology: str, memory: float | None = None) -> Target:
    """The GPUs of h100:8 or h100:4x8, by JAX's CUDA plugin; raises ValueError where that is missing.

    Args:
        memory: bytes of each, in place of what its kind has.
    """
    name = topology.partition(":")[0]
    chip = CHIPS[_SHORT.get(name, name)]
    hosts, each = gpu_layout(topology)
    check_cuda_compiler(topology)
    # XLA's own lines on memory and on what it does without a GPU: fits or not is told by the plan.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(
            platform="cuda",
            topology_name=topology,
            target_config=_target_config(chip, memory),
            topology=f"1x{hosts}x{each}",  # partitions (which NVLink joins), hosts, GPUs of a host
        ).devices
    except Exception as error:  # jaxlib raises several kinds
        raise ValueError(f"--topology {topology}: {one_line(error)}.") from None
    assert len(devices) == hosts * each, f"{topology} has {len(devices)} devices"
    usable = min(chip.memory, _USABLE * chip.gpu["memory_bytes"])
    return Target(topology, chip, tuple(devices), memory or usable, "gpu", hosts)


def _target_config(chip: Chip, memory: float | None) -> str:
    """XLA's GpuTargetConfigProto as text."""
    major, _, minor = chip.gpu["capability"].partition(".")
    return render(
        "gpu_target.txtpb",
        gpu=chip.gpu,
        major=major,
        minor=minor.rstrip("a"),
        accelerated=minor.endswith("a"),
        memory=int(memory or chip.gpu["memory_bytes"]),
        memory_rate=int(chip.memory_rate),
    )


def one_line(error: BaseException) -> str:
    """The first line of a compiler's message, without its codes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = re.sub(r"^([A-Z_]+: )?(E\d+: )?([A-Za-z]+Oom: )?", "", lines[0])
    return line.partition(" HLO module:")[0].rstrip(".")
