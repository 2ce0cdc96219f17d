"""What a sum of gradients over devices loses in bfloat16: python -m benchmarks.gradient_sums

Each of n shards holds the gradient of its own rows. Its matrix product gives it in bfloat16 in any case; what is told
apart is how the n are added: in bfloat16 one after the other, as a ring does, in bfloat16 by halves, as a tree does, or
in float32. The gradient of a shard is what all have in common plus noise of its own, `noise` times as large. Simulated
in NumPy; no device adds here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

SHARDS = (8, 64, 1024)
NOISE = (0.0, 1.0, 10.0, 100.0)
ENTRIES = 2_000
HEADER = ("shards", "noise of a shard", "sampling error", "ring, bf16", "tree, bf16", "float32", "ring's length")

Add = Callable[[Float[np.ndarray, "n e"]], Float[np.ndarray, "e"]]


@dataclass(frozen=True)
class Errors:
    """Relative to the exact sum of the shards' float32 gradients.

    Attributes:
        sampling: distance of that sum from the common gradient, relative to the latter: what no arithmetic removes.
        ring: error of the ring in bfloat16.
        tree: error of the tree in bfloat16.
        wide: error of the sum in float32 of what each shard rounded to bfloat16.
        length: of the ring's sum along the exact one, over the exact one's: below 1 where small addends are lost.
    """

    sampling: float
    ring: float
    tree: float
    wide: float
    length: float


def ring(parts: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "e"]:
    """Added one after the other, each sum rounded to bfloat16."""
    total = parts[0].astype(ml_dtypes.bfloat16)
    for part in parts[1:]:
        total = total + part.astype(ml_dtypes.bfloat16)
    return total.astype(np.float64)


def tree(parts: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "e"]:
    """Added in pairs, each sum rounded to bfloat16; n is a power of two."""
    sums: Any = parts.astype(ml_dtypes.bfloat16)
    while len(sums) > 1:
        sums = sums[::2] + sums[1::2]
    return sums[0].astype(np.float64)


def wide(parts: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "e"]:
    """Rounded to bfloat16 once, by the product that gave it, and added in float32."""
    return np.sum(parts.astype(ml_dtypes.bfloat16).astype(np.float32), axis=0).astype(np.float64)


def measure(shards: int, noise: float, entries: int = ENTRIES, seed: int = 0) -> Errors:
    rng = np.random.default_rng(seed)
    common = rng.normal(size=entries)
    parts = (common + noise * rng.normal(size=(shards, entries))).astype(np.float32)
    exact: Any = np.sum(parts, axis=0, dtype=np.float64)

    def error(add: Add) -> float:
        return float(np.linalg.norm(add(parts) - exact) / np.linalg.norm(exact))

    sampling = float(np.linalg.norm(exact - shards * common) / np.linalg.norm(shards * common))
    length = float(np.vdot(ring(parts), exact) / np.vdot(exact, exact))
    return Errors(sampling, error(ring), error(tree), error(wide), length)


def table() -> list[str]:
    lines = [" | ".join(HEADER), " | ".join("---" for _ in HEADER)]
    for shards in SHARDS:
        for noise in NOISE:
            found = measure(shards, noise)
            errors = (f"{value:.2%}" for value in (found.sampling, found.ring, found.tree, found.wide))
            lines.append(" | ".join((str(shards), f"{noise:g} x", *errors, f"{found.length:.4f}")))
    return [f"| {line} |" for line in lines]


if __name__ == "__main__":
    print(*table(), sep="\n")
