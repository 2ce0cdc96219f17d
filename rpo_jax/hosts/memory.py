"""Memory of the host process: what a compiler has given up goes back to the system before a step needs as much."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_WORTH_SECONDS = 0.5  # a compilation shorter than this leaves little behind


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
