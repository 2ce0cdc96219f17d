"""Runs as configured and prints, as JSON, what the process held at each line of its metrics, for test_long_runs.py."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
from typing import Any

import jax

import rpo_jax
from rpo_jax.config.reading import parse_config
from rpo_jax.runs.tracking import MetricsLog

COMPILED = "/jax/core/compile/backend_compile_duration"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
PARTS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class Mallinfo(ctypes.Structure):
    """As malloc.h has it; in bytes or pieces."""

    _fields_ = [(name, ctypes.c_size_t) for name in PARTS.split()]


def in_use() -> int:
    """Bytes that malloc has given out, of all threads. What it keeps for later is in the resident memory too."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    found = mallinfo()
    return found.uordblks + found.hblkhd


def main(arguments: list[str]) -> None:
    compiled: list[float] = []
    samples: list[dict[str, float]] = []

    def on_event(event: str, seconds: float, **_: Any) -> None:
        if event == COMPILED:
            compiled.append(seconds)

    write = MetricsLog.write

    def sampling(self: MetricsLog, metrics: Any) -> None:
        write(self, metrics)
        with open("/proc/self/statm", encoding="ascii") as file:
            resident = int(file.read().split()[1]) * PAGE_BYTES
        samples.append(
            {
                "step": metrics["step"],
                "resident_mib": resident / 2**20,
                "in_use_mib": in_use() / 2**20,
                "python_blocks": sys.getallocatedblocks(),
                "handles": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count(),
                "compilations": len(compiled),
            }
        )

    jax.monitoring.register_event_duration_secs_listener(on_event)
    MetricsLog.write = sampling
    rpo_jax.run(parse_config(arguments))
    print(json.dumps(samples))


if __name__ == "__main__":
    main(sys.argv[1:])
