"""The devices that jax finds: said in one line where it finds none, or leaves a card unused."""

from __future__ import annotations

import glob
import os
from typing import Any

import jax

# One of these is there with NVIDIA's driver; the last is Windows' Linux.
NVIDIA = ("/dev/nvidia[0-9]*", "/proc/driver/nvidia/gpus/*", "/usr/lib/wsl/lib/nvidia-smi")

_CUDA = 'pip install "jax[cuda13]", or "jax[cuda12]" where the driver is older than 580'


def _asked() -> str | None:
    settings: Any = jax.config  # its values are attributes that it makes
    return settings.jax_platforms


def devices() -> list[Any]:
    """All devices; ValueError where jax can start none, or not those that JAX_PLATFORMS asks for."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = _asked()
        reason = str(error).partition(" (")[0].strip().split("\n")[0] or "it finds no such device"
        if not asked:
            raise ValueError(f"jax starts no device: {reason}; JAX_PLATFORMS=cpu does without the others.") from None
        raise ValueError(
            f"JAX_PLATFORMS={asked} asks jax for what it cannot start: {reason}; set JAX_PLATFORMS=cpu, or install "
            f"what that device needs (for NVIDIA: its driver, and {_CUDA})."
        ) from None


def unused_card() -> str | None:
    """That there is an NVIDIA card and jax computes on the CPU, where nobody asked for that; None otherwise."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if _asked() or hidden or jax.default_backend() != "cpu":
        return None
    if not any(glob.glob(place) for place in NVIDIA):
        return None
    return f"there is an NVIDIA card, but jax computes on the CPU: {_CUDA}, or set JAX_PLATFORMS=cpu"
