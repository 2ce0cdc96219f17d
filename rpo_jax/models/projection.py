"""What the weights of a linear layer may be: an array, one quantized to int8, or either with an adapter beside it.

The parameter tree itself says which: a kernel's place holds an array, a Quantized or an Adapted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8


class Quantized(NamedTuple):
    """W ~ values * scale: int8, symmetric, one scale per output channel (of each layer, where layers are stacked)."""

    values: Int8[Array, "..."]  # [*inputs, *outputs]
    scale: Float[Array, "..."]  # [*outputs], float32


class Adapted(NamedTuple):
    """W + a b, never added up."""

    kernel: Float[Array, "..."] | Quantized
    a: Float[Array, "..."]  # [*inputs, rank]
    b: Float[Array, "..."]  # [rank, *outputs]


class Transposed(NamedTuple):
    """W with its outputs first: for a few rows XLA's CPU compiler multiplies so up to twice as fast."""

    kernel: Float[Array, "..."]  # [*outputs, *inputs]


Kernel: TypeAlias = Array | Quantized | Adapted | Transposed
FEW_ROWS = 128


def project(x: Float[Array, "..."], kernel: Kernel, input_rank: int) -> Float[Array, "..."]:
    """x W, contracting the last `input_rank` axes of x with the first ones of W, in x's dtype."""
    if isinstance(kernel, Adapted):
        inner = _product(x, kernel.a.astype(x.dtype), input_rank)
        delta = _product(inner, kernel.b.astype(x.dtype), 1)
        return project(x, kernel.kernel, input_rank) + delta
    if isinstance(kernel, Quantized):
        return _project_quantized(x, kernel, input_rank)
    if isinstance(kernel, Transposed):
        return _transposed_product(x, kernel.kernel.astype(x.dtype), input_rank)
    if kernel.dtype.itemsize < x.dtype.itemsize:
        return _project_widened(x, kernel, input_rank)
    return _product(x, kernel.astype(x.dtype), input_rank)


def project_grouped(x: Float[Array, "N I"], kernel: Kernel, rows_of: Int[Array, "G"]) -> Float[Array, "N ..."]:
    """Each row times the matrix of its group, in x's dtype; groups lie one after another, with rows_of rows each.

    The kernel's arrays have the groups as their first axis. Rows behind the last group give anything.
    """
    if isinstance(kernel, Adapted):
        inner = project_grouped(x, kernel.a, rows_of)
        return project_grouped(x, kernel.kernel, rows_of) + project_grouped(inner, kernel.b, rows_of)
    assert not isinstance(kernel, Quantized | Transposed), "experts are not quantized"
    groups, inputs, *outputs = kernel.shape
    y = jax.lax.ragged_dot(x, kernel.astype(x.dtype).reshape(groups, inputs, -1), rows_of)
    return y.reshape(len(x), *outputs)


def gathered(
    kernel: Kernel,
    axes: tuple[str, ...],
    input_rank: int,
    gather: Callable[[Array, tuple[str | None, ...]], Array],
    groups: int = 0,
) -> Kernel:
    """The kernel with all its arrays gathered.

    Args:
        axes: names of its axes: `groups` that lead all its arrays, inputs, outputs.
        gather: takes an array and the names of its axes.
    """
    assert not isinstance(kernel, Transposed), "made for decoding, where no loop gathers"
    lead, inputs, outputs = axes[:groups], axes[groups : groups + input_rank], axes[groups + input_rank :]
    if isinstance(kernel, Adapted):
        inner = gathered(kernel.kernel, axes, input_rank, gather, groups)
        assert not isinstance(inner, Adapted | Transposed)
        return Adapted(
            inner,
            gather(kernel.a, (*lead, *inputs, None)),
            gather(kernel.b, (*lead, None, *outputs)),
        )
    if isinstance(kernel, Quantized):
        return Quantized(gather(kernel.values, axes), gather(kernel.scale, (*lead, *outputs)))
    return gather(kernel, axes)


def _product(x: Array, kernel: Array, input_rank: int) -> Array:
    """x W as a product of two matrices.

    The gradient of W contracts all of x's leading axes. If these are several, XLA's CPU compiler writes x transposed
    first, which took a quarter of the step; matrices it multiplies as they lie.
    """
    lead, inputs = x.shape[: x.ndim - input_rank], math.prod(kernel.shape[:input_rank])
    y = jnp.matmul(x.reshape(-1, inputs), kernel.reshape(inputs, -1))
    return y.reshape(*lead, *kernel.shape[input_rank:])


def _transposed_product(x: Array, kernel: Array, input_rank: int) -> Array:
    lead, outputs = x.shape[: x.ndim - input_rank], kernel.shape[: kernel.ndim - input_rank]
    rows, flat = x.reshape(math.prod(lead), -1), kernel.reshape(math.prod(outputs), -1)
    return transposed_matmul(rows, flat).reshape(*lead, *outputs)


def transposed_matmul(x: Float[Array, "R K"], transposed: Float[Array, "N K"]) -> Float[Array, "R N"]:
    """x W, float32 sums, for W with its outputs first."""
    if len(x) > FEW_ROWS:
        return jnp.einsum("rk,nk->rn", x, transposed)
    # The barrier keeps XLA from transposing the product back.
    return jax.lax.optimization_barrier(jnp.einsum("nk,rk->nr", transposed, x)).T


# The backward pass widens again: the widened weights of every layer, kept until then, would take the memory that
# narrow ones are there to save.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _project_widened(x: Array, kernel: Array, input_rank: int) -> Array:
    return _product(x, kernel.astype(x.dtype), input_rank)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _project_quantized(x: Array, kernel: Quantized, input_rank: int) -> Array:
    # The scale belongs to the output, so it may follow the product, where it multiplies fewer numbers; -127 to 127 are
    # exact in bfloat16. In x's dtype throughout, or the backward pass would multiply in float32.
    return _product(x, kernel.values.astype(x.dtype), input_rank) * kernel.scale.astype(x.dtype)
