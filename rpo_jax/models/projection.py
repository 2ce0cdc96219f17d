"""What the weights of a linear layer may be: an array, one in 8 or 4 bits, or any of these with an adapter beside it.

The parameter tree itself says which: a kernel's place holds an array, a Quantized, an NF4, an Int4 or an Adapted, and
where gradients are to be in float32 a WideGradient. How weights get there is in rpo_jax.models.quantization.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8, UInt8

from rpo_jax.models.grouped import grouped_product


class Quantized(NamedTuple):
    """W ~ values * scale: int8, symmetric, one scale per output channel (of each layer, where layers are stacked)."""

    values: Int8[Array, "..."]  # [*inputs, *outputs]
    scale: Float[Array, "..."]  # [*outputs], float32


class Blockwise(NamedTuple):
    """W ~ level(values) * scale: 4 bits a weight, one scale for each output and BLOCK inputs; 4.127 bits in all.

    The scales are in 8 bits themselves: scale = SCALE_LEVELS[scales] * steps + offset, with a step for each GROUP of
    them, counted as bitsandbytes counts, output by output. Which levels there are, a subclass says.
    """

    values: UInt8[Array, "..."]  # [blocks, BLOCK / 2, *outputs]; the low bits are of a block's first half
    scales: UInt8[Array, "..."]  # [blocks, *outputs]
    steps: Float[Array, "..."]  # [groups], float32
    offset: Float[Array, "..."]  # [], float32

    @staticmethod
    def level(values: Int[Array, "..."]) -> Float[Array, "..."]:
        raise NotImplementedError


class NF4(Blockwise):
    """The quantiles of a normal distribution.  Source: arXiv 2305.14314, Appendix E."""

    @staticmethod
    def level(values: Int[Array, "..."]) -> Float[Array, "..."]:
        # A sum of which all but one are zeros: tables in memory are looked into one number at a time by some machines,
        # and of `where` jax would carry a level as wide as the weights through the loop over layers, for each of them.
        terms = ((values == code).astype(jnp.float32) * float(level) for code, level in enumerate(NF4_LEVELS))
        return reduce(jnp.add, terms)


class Int4(Blockwise):
    """-7 to 7, in steps of a seventh of the scale."""

    @staticmethod
    def level(values: Int[Array, "..."]) -> Float[Array, "..."]:
        return (values.astype(jnp.float32) - 8) / 7


BLOCK = 64  # weights of a scale
GROUP = 256  # scales of a step
NF4_LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
INT4_LEVELS = np.arange(-8, 8, dtype=np.float32) / 7  # the first, beyond -1, is not used


def _scale_levels() -> np.ndarray:
    """bitsandbytes' signed dynamic map: in the e-th of seven decades the middles of 2^e equal parts, 0, and 1.

    Source: arXiv 1511.04561; bitsandbytes.functional.create_dynamic_map, whose float32 this is, bit for bit.
    """
    positive = []
    for decade in range(7):
        count = 2**decade + 1
        step, number = np.float64(np.float32(1 - np.float32(0.1)) / np.float32(count - 1)), np.arange(count)
        # As torch.linspace has it: from either end to the middle.
        bounds = np.where(number < count // 2, np.float32(0.1) + step * number, 1 - step * number[::-1])
        bounds = bounds.astype(np.float32)
        positive.append(np.float32(10.0 ** (decade - 6)) * ((bounds[1:] + bounds[:-1]) / 2))
    return np.sort(np.concatenate([*positive, *(-x for x in positive), [0.0, 1.0]])).astype(np.float32)


SCALE_LEVELS = _scale_levels()


class WideGradient(NamedTuple):
    """W, whose gradient a product gives in float32, whatever dtype it multiplies in: so devices add it in float32 too.

    Of a mixture's experts the gradient is what their products give, in x's dtype; as W itself is cast where it is used,
    devices add that in float32.
    """

    kernel: Float[Array, "..."]


class Adapted(NamedTuple):
    """W + a b, never added up."""

    kernel: Float[Array, "..."] | Quantized | Blockwise
    a: Float[Array, "..."] | WideGradient  # [*inputs, rank]
    b: Float[Array, "..."] | WideGradient  # [rank, *outputs]


class Transposed(NamedTuple):
    """W with its outputs first: for a few rows XLA's CPU compiler multiplies so up to twice as fast."""

    kernel: Float[Array, "..."]  # [*outputs, *inputs]


Kernel: TypeAlias = Array | Quantized | Blockwise | Adapted | Transposed | WideGradient
FEW_ROWS = 128


def project(x: Float[Array, "..."], kernel: Kernel, input_rank: int) -> Float[Array, "..."]:
    """x W, contracting the last `input_rank` axes of x with the first ones of W, in x's dtype."""
    if isinstance(kernel, Adapted):
        delta = project(project(x, kernel.a, input_rank), kernel.b, 1)
        return project(x, kernel.kernel, input_rank) + delta
    if isinstance(kernel, WideGradient):
        return _product_of_wide_gradient(x, kernel.kernel, input_rank)
    if isinstance(kernel, Quantized):
        return _project_quantized(x, kernel, input_rank)
    if isinstance(kernel, Transposed):
        return _transposed_product(x, kernel.kernel.astype(x.dtype), input_rank)
    if isinstance(kernel, Blockwise) or _is_narrow(kernel, x):
        return _project_widened(x, kernel, input_rank)
    return _product(x, kernel.astype(x.dtype), input_rank)


def project_grouped(x: Float[Array, "N I"], kernel: Kernel, rows_of: Int[Array, "G"]) -> Float[Array, "N ..."]:
    """Each row times the matrix of its group, in x's dtype; groups lie one after another, with rows_of rows each.

    The kernel's arrays have the groups as their first axis. Rows behind the last group give anything.
    """
    if isinstance(kernel, Adapted):
        inner = project_grouped(x, kernel.a, rows_of)
        return project_grouped(x, kernel.kernel, rows_of) + project_grouped(inner, kernel.b, rows_of)
    assert not isinstance(kernel, Transposed)
    if isinstance(kernel, WideGradient):
        kernel = kernel.kernel
    if isinstance(kernel, Quantized | Blockwise) or _is_narrow(kernel, x):
        return _project_grouped_widened(x, kernel, rows_of)
    return _grouped_product(x, kernel.astype(x.dtype), rows_of)


def with_wide_gradient(kernel: Kernel) -> Kernel:
    """The kernel with the gradients of what is trained of it in float32: of adapters if there are any."""
    if isinstance(kernel, Adapted):
        return kernel._replace(a=WideGradient(cast(Array, kernel.a)), b=WideGradient(cast(Array, kernel.b)))
    return WideGradient(kernel) if isinstance(kernel, jax.Array) else kernel


def _is_narrow(kernel: Array, x: Array) -> bool:
    return kernel.dtype.itemsize < x.dtype.itemsize


def _widened(kernel: Array | Quantized | Blockwise, dtype: DTypeLike, inputs: tuple[int, ...]) -> Array:
    """W as an array [*inputs, *outputs]."""
    if isinstance(kernel, Quantized):
        return (kernel.values * jnp.expand_dims(kernel.scale, range(len(inputs)))).astype(dtype)
    if not isinstance(kernel, Blockwise):
        return kernel.astype(dtype)
    blocks, _, *outputs = kernel.values.shape
    steps = jnp.repeat(kernel.steps, GROUP)[: kernel.scales.size].reshape(*outputs, blocks)
    level = jnp.asarray(SCALE_LEVELS).at[kernel.scales].get(mode="promise_in_bounds")
    # Computed once, not for every weight: XLA would make it part of what reads it.
    scale = jax.lax.optimization_barrier(level * jnp.moveaxis(steps, -1, 0) + kernel.offset)
    shift = jnp.expand_dims(jnp.array([0, 4], jnp.uint8), range(1, 2 + len(outputs)))
    wide = kernel.level((kernel.values[:, None] >> shift) & 15) * jnp.expand_dims(scale, (1, 2))
    return wide.astype(dtype).reshape(*inputs, *outputs)


def narrowed(kernel: Kernel, dtype: DTypeLike) -> Kernel:
    """Its float arrays in this dtype, where that is no wider than theirs; but a WideGradient as it is."""
    if isinstance(kernel, Adapted):
        return Adapted(*cast(Any, (narrowed(part, dtype) for part in kernel)))
    if not isinstance(kernel, jax.Array):
        return kernel
    narrower = jnp.issubdtype(kernel.dtype, jnp.floating) and jnp.dtype(dtype).itemsize < kernel.dtype.itemsize
    return kernel.astype(dtype) if narrower else kernel


def gathered(
    kernel: Kernel,
    axes: tuple[str | None, ...],
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
        a = gathered(kernel.a, (*lead, *inputs, None), input_rank, gather, groups)
        b = gathered(kernel.b, (*lead, None, *outputs), 1, gather, groups)
        return Adapted(*cast(Any, (inner, a, b)))
    if isinstance(kernel, WideGradient):
        return WideGradient(gather(kernel.kernel, axes))
    if isinstance(kernel, Quantized):
        return Quantized(gather(kernel.values, axes), gather(kernel.scale, (*lead, *outputs)))
    if isinstance(kernel, Blockwise):  # steps and offset are whole everywhere
        values = gather(kernel.values, (*lead, inputs[0], None, *outputs))
        return kernel._replace(values=values, scales=gather(kernel.scales, (*lead, inputs[0], *outputs)))
    return gather(kernel, axes)


def whole(
    kernel: Kernel,
    axes: tuple[str | None, ...],
    input_rank: int,
    gather: Callable[..., Array],
    dtype: DTypeLike,
    groups: int = 0,
) -> Kernel:
    """The kernel gathered in the dtype in which it is used, which takes fewer bytes, and then in its own again.

    So a loop that uses it adds its gradients in its own, and devices add these sums in that dtype; of a
    WideGradient they are added in float32 throughout.
    """
    if isinstance(kernel, WideGradient):
        return WideGradient(gather(kernel.kernel, axes, dtype))
    full = gathered(narrowed(kernel, dtype), axes, input_rank, gather, groups)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), full, kernel)


def _product(x: Array, kernel: Array, input_rank: int) -> Array:
    """x W as a product of two matrices.

    The gradient of W contracts all of x's leading axes. If these are several, XLA's CPU compiler writes x transposed
    first, which took a quarter of the step; matrices it multiplies as they lie.
    """
    lead, inputs = x.shape[: x.ndim - input_rank], math.prod(kernel.shape[:input_rank])
    y = jnp.matmul(x.reshape(-1, inputs), kernel.reshape(inputs, -1))
    return y.reshape(*lead, *kernel.shape[input_rank:])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product_of_wide_gradient(x: Array, kernel: Array, input_rank: int) -> Array:
    return _product(x, kernel.astype(x.dtype), input_rank)


def _wide_forward(x: Array, kernel: Array, input_rank: int) -> tuple[Array, tuple[Array, Array]]:
    narrow = kernel.astype(x.dtype)  # what devices gather for the backward pass too
    return _product(x, narrow, input_rank), (x, narrow)


def _wide_backward(input_rank: int, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = saved
    inputs = math.prod(kernel.shape[:input_rank])
    rows, outputs = x.reshape(-1, inputs), cotangent.reshape(-1, kernel.size // inputs)
    of_x = jnp.matmul(outputs, kernel.reshape(inputs, -1).T)
    of_kernel = jnp.matmul(rows.T, outputs, preferred_element_type=jnp.float32)
    return of_x.reshape(x.shape), of_kernel.reshape(kernel.shape)


_product_of_wide_gradient.defvjp(_wide_forward, _wide_backward)


def _grouped_product(x: Array, kernel: Array, rows_of: Array) -> Array:
    groups, inputs, *outputs = kernel.shape
    y = grouped_product(x, kernel.reshape(groups, inputs, -1), rows_of)
    return y.reshape(len(x), *outputs)


def _transposed_product(x: Array, kernel: Array, input_rank: int) -> Array:
    lead, outputs = x.shape[: x.ndim - input_rank], kernel.shape[: kernel.ndim - input_rank]
    rows, flat = x.reshape(math.prod(lead), -1), kernel.reshape(math.prod(outputs), -1)
    if len(rows) > FEW_ROWS:
        y = jnp.einsum("rk,nk->rn", rows, flat)
    else:
        # The barrier keeps XLA from transposing the product back.
        y = jax.lax.optimization_barrier(jnp.einsum("nk,rk->nr", flat, rows)).T
    return y.reshape(*lead, *outputs)


# The backward pass widens again: the widened weights of every layer, kept until then, would take the memory that
# narrow ones are there to save.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _project_widened(x: Array, kernel: Array | Blockwise, input_rank: int) -> Array:
    return _product(x, _widened(kernel, x.dtype, x.shape[x.ndim - input_rank :]), input_rank)


@partial(jax.checkpoint, prevent_cse=False)
def _project_grouped_widened(x: Array, kernel: Array | Quantized | Blockwise, rows_of: Array) -> Array:
    wide = jax.vmap(lambda kernel: _widened(kernel, x.dtype, x.shape[1:]))(kernel)
    return _grouped_product(x, wide, rows_of)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _project_quantized(x: Array, kernel: Quantized, input_rank: int) -> Array:
    # The scale belongs to the output, so it may follow the product, where it multiplies fewer numbers; -127 to 127 are
    # exact in bfloat16. In x's dtype throughout, or the backward pass would multiply in float32.
    return _product(x, kernel.values.astype(x.dtype), input_rank) * kernel.scale.astype(x.dtype)
