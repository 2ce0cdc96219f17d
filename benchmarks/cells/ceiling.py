"""The machine's rate of matrix products, by the library of the environment that this runs in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from benchmarks.spec import CellSpec, command_line

SHAPES = ((2048, 2048, 2048), (4096, 512, 1408))  # rows, inner, columns
GPU_SHAPES = ((8192, 8192, 8192), (16384, 2048, 8192))
SECONDS_PER_SHAPE = 2.0


def _torch_product(spec: CellSpec, rows: int, inner: int, columns: int) -> Callable[[], Any]:
    import torch

    device = torch.device("cuda" if spec.device == "gpu" else "cpu")
    dtype = getattr(torch, spec.dtype)
    a, b = torch.randn(rows, inner, device=device, dtype=dtype), torch.randn(inner, columns, device=device, dtype=dtype)

    def run() -> None:
        torch.mm(a, b)
        if spec.device == "gpu":
            torch.cuda.synchronize()

    return run


def _jax_product(spec: CellSpec, rows: int, inner: int, columns: int) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0))
    a, b = (
        jax.random.normal(key, shape, jnp.dtype(spec.dtype))
        for key, shape in zip(keys, ((rows, inner), (inner, columns)), strict=True)
    )
    precision = "float32" if spec.dtype == "float32" else None
    product = jax.jit(lambda x, y: jnp.dot(x, y, precision=precision))
    return lambda: product(a, b).block_until_ready()


PRODUCTS = {"ceiling-torch": _torch_product, "ceiling-jax": _jax_product}


def best_rate(run: Callable[[], Any], operations: float) -> float:
    """Highest rate of single products over the time allowed, operations per second."""
    run()
    best, until = float("inf"), time.perf_counter() + SECONDS_PER_SHAPE
    while time.perf_counter() < until:
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return operations / best


def main() -> None:
    spec, path = command_line()
    make = PRODUCTS[spec.system]
    shapes = GPU_SHAPES if spec.device == "gpu" else SHAPES
    found = {
        f"{rows}x{inner}x{columns}": best_rate(make(spec, rows, inner, columns), 2.0 * rows * inner * columns)
        for rows, inner, columns in shapes
    }
    path.write_text(json.dumps({"flops_per_second": found}), encoding="utf-8")


if __name__ == "__main__":
    main()
