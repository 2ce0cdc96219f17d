"""What our kernels for GPUs share, and all that they use of Pallas' language for Triton, which JAX may yet change."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool


def padded(size: int) -> int:
    """Triton's blocks are powers of two, and a tensor core's products at least 16 deep; the rest is read as zeros."""
    return max(16, pl.next_power_of_2(size))


def load(block: Any, mask: Bool[Array, "..."] | None) -> Array:
    """What a reference points at, zeros where the mask says so."""
    return triton.load(block, mask=mask, other=None if mask is None else 0.0)


def store(block: Any, values: Array, mask: Bool[Array, "..."] | None) -> None:
    """Write values, in the dtype that is written to, but where the mask is false."""
    triton.store(block, values.astype(block.dtype), mask=mask)


def dot(left: Array, right: Array, contract: tuple[int, int], *, interpret: bool) -> Array:
    """Product summed in float32, over these axes of the two."""
    precision: Any = lax.Precision.DEFAULT
    if left.dtype == jnp.float32:
        # Three products of tensor cores come as near to float32 as it takes; a CPU has the real one.
        precision = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def options(warps: int, stages: int) -> Any:
    """For pallas_call.

    Args:
        warps: of a program, 32 threads each.
        stages: blocks in flight between memory and chip.
    """
    return triton.CompilerParams(num_warps=warps, num_stages=stages)
