"""Versions of the packages at hand, without importing any: one may be broken."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "rpo-jax"
SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """Versions of what decides the bits of a step, for a checkpoint's record."""
    return {name: version for name in SHOWN if (version := installed(name)) is not None}
