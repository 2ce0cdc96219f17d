"""Memory of the host process and of devices: what was needed at most, and what a compiler has given up goes back."""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_WORTH_SECONDS = 0.5  # a compilation shorter than this leaves little behind


def peak_memory() -> dict[str, float]:
    """What this process and the fullest of its devices have held at most since it began, in GiB, as metrics.

    Devices that do not tell, as CPUs, are left out.
    """
    peaks = {"memory/host_gib": _peak_bytes() / 2**30}
    all_stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if of_devices := [stats["peak_bytes_in_use"] for stats in all_stats if "peak_bytes_in_use" in stats]:
        peaks["memory/device_gib"] = max(of_devices) / 2**30
    return peaks


def _peak_bytes() -> int:
    """Of this process; where only getrusage tells, of what started it too, if that held more."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@functools.cache
def trim_after_compiling() -> None:
    """From now on, give freed memory back to the system after every long compilation; without glibc, do nothing.

    XLA frees hundreds of megabytes in small pieces when it has compiled a training step. The C library keeps them for
    small allocations to come, but a step's buffers are large, and come on top.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return

    def on_event(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED and duration_secs > _WORTH_SECONDS:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(on_event)
