"""Rows times the matrix of their group, on GPUs in two kernels of our own.

`jax.lax.ragged_dot` is an instruction of its own on TPUs. For GPUs XLA (jax 0.10.2) writes every row once a group,
zeros for all but its own, and multiplies that: so many times the operations and the memory. Later ones choose cuDNN's
products by groups, but for the gradient of the matrices, which stays as it is (pull request 40189 of openxla/xla).

Pallas kernels, lowered by Triton as `attention/fused.py` is. tokamax has such kernels (read in 0.0.12) and brings ten
packages; as we read it, a group without rows gets no gradient of zeros there.

Source: arXiv 2211.15841 (rows sorted by group, in tiles that have rows of one group alone).

Letters: N rows, G groups, I inputs, O outputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from rpo_jax.models import kernels

WARPS, STAGES = 8, 3  # of a program, 32 threads each; tiles in flight between memory and chip
LEAST_ROWS = 16  # of a tile


class Tiles(NamedTuple):
    """Which rows each program has: `first` to before `end`, all of `group`; none where these are alike."""

    group: Int[Array, "P"]
    first: Int[Array, "P"]
    end: Int[Array, "P"]


@jax.custom_vjp
def grouped_product(
    x: Float[Array, "N I"], kernel: Float[Array, "G I O"], rows_of: Int[Array, "G"]
) -> Float[Array, "N O"]:
    """Each row times the matrix of its group, in x's dtype, which both have.

    Groups lie one after another, with rows_of rows each. Rows behind the last group give anything, NaN too, and so does
    their gradient, but nobody else's.
    """
    return lax.platform_dependent(x, kernel, rows_of, cuda=product, default=lax.ragged_dot)


def _forward(x: Array, kernel: Array, rows_of: Array) -> tuple[Array, tuple[Array, ...]]:
    return grouped_product(x, kernel, rows_of), (x, kernel, rows_of)


def _backward(saved: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, None]:
    of_x, of_kernel = lax.platform_dependent(*saved, cotangent, cuda=gradient, default=_usual_gradient)
    return of_x, of_kernel, None


grouped_product.defvjp(_forward, _backward)


def _usual_gradient(x: Array, kernel: Array, rows_of: Array, cotangent: Array) -> tuple[Array, Array]:
    (of_x,) = jax.linear_transpose(lambda x: lax.ragged_dot(x, kernel, rows_of), x)(cotangent)
    (of_kernel,) = jax.linear_transpose(lambda kernel: lax.ragged_dot(x, kernel, rows_of), kernel)(cotangent)
    return of_x, of_kernel


def product(x: Array, kernel: Array, rows_of: Array, *, transposed: bool = False, interpret: bool = False) -> Array:
    """grouped_product by a kernel; with `transposed` by [G, O, I] as matrices."""
    rows = rows_of_tile(len(x), len(rows_of), x.dtype)
    tiles = _tiles(len(x), rows, rows_of)
    outputs = kernel.shape[1 if transposed else 2]
    return pl.pallas_call(
        partial(_product_kernel, rows=rows, transposed=transposed, interpret=interpret),
        name="grouped_product_transposed" if transposed else "grouped_product",
        grid=(len(tiles.first), pl.cdiv(outputs, _least(outputs, sizes(x.dtype)[0]))),
        out_shape=jax.ShapeDtypeStruct((len(x), outputs), x.dtype),
        compiler_params=kernels.options(WARPS, STAGES),
        interpret=interpret,
    )(x, kernel, *tiles)


def gradient(
    x: Array, kernel: Array, rows_of: Array, cotangent: Array, *, interpret: bool = False
) -> tuple[Array, Array]:
    """The gradients of `product` by x and kernel; a matrix of a group without rows has zeros."""
    (groups, inputs, outputs), (most, _) = kernel.shape, sizes(x.dtype)
    end = jnp.cumsum(rows_of)
    of_kernel = pl.pallas_call(
        partial(_gradient_kernel, interpret=interpret),
        name="grouped_gradient",
        grid=(pl.cdiv(inputs, _least(inputs, most)), pl.cdiv(outputs, _least(outputs, most)), groups),
        out_shape=jax.ShapeDtypeStruct(kernel.shape, kernel.dtype),
        compiler_params=kernels.options(WARPS, STAGES),
        interpret=interpret,
    )(x, cotangent, end - rows_of, end)
    return product(cotangent, kernel, rows_of, transposed=True, interpret=interpret), of_kernel


def sizes(dtype: Any) -> tuple[int, int]:
    """The most rows and columns of a tile of the result, and of what is summed at a time.

    What a consumer's card has room for; numbers of 4 bytes are held more than once.
    """
    return (64, 32) if jnp.dtype(dtype).itemsize > 2 else (128, 64)


def rows_of_tile(total: int, groups: int, dtype: Any) -> int:
    """A half of what a group has on the average, or fewer: its last tile is as long as the others."""
    return min(sizes(dtype)[0], max(LEAST_ROWS, pl.next_power_of_2(total // (2 * groups) + 1) // 2))


def _tiles(total: int, rows: int, rows_of: Array) -> Tiles:
    """As many as there can be."""
    groups = len(rows_of)
    end = jnp.cumsum(rows_of)
    before = jnp.cumsum(-(-rows_of // rows))  # tiles up to the end of each group
    number = jnp.arange(total // rows + groups)
    group = jnp.minimum(jnp.searchsorted(before, number, side="right"), groups - 1)
    first = end[group] - rows_of[group] + (number - before[group] + -(-rows_of[group] // rows)) * rows
    return Tiles(*(x.astype(jnp.int32) for x in (group, first, end[group])))


def _least(size: int, most: int) -> int:
    return min(most, kernels.padded(size))


class _Span(NamedTuple):
    """A part of an axis: `size` indices from `first` on, of which those from `end` on do not count; None: all do."""

    first: Any
    size: int
    end: Any

    @classmethod
    def of(cls, number: Any, size: int, axis: int) -> _Span:
        """The number-th span of so many indices, of an axis that long."""
        return cls(number * size, size, axis if axis % size else None)

    @property
    def slice(self) -> Any:
        return pl.ds(self.first, self.size)


def _counts(rows: _Span, columns: _Span) -> Array | None:
    counted = None
    for span, index in ((rows, (slice(None), None)), (columns, (None, slice(None)))):
        if span.end is not None:
            mask = (span.first + jnp.arange(span.size) < span.end)[index]
            counted = mask if counted is None else counted & mask
    return counted


def _read(matrix: Any, rows: _Span, columns: _Span, group: tuple[Any, ...] = ()) -> Array:
    """Zeros where nothing counts."""
    return kernels.load(matrix.at[*group, rows.slice, columns.slice], _counts(rows, columns))


def _write(matrix: Any, values: Array, rows: _Span, columns: _Span, group: tuple[Any, ...] = ()) -> None:
    kernels.store(matrix.at[*group, rows.slice, columns.slice], values, _counts(rows, columns))


def _product_kernel(
    x, kernel, group_of, first_of, end_of, out, *, rows: int, transposed: bool, interpret: bool
) -> None:
    """A tile of rows of one group, times some columns of its matrix."""
    number, inputs, outputs = pl.program_id(0), x.shape[1], out.shape[1]
    group, first, end = group_of[number], first_of[number], end_of[number]
    most, inner = (_least(size, most) for size, most in zip((outputs, inputs), sizes(x.dtype), strict=True))
    columns = _Span.of(pl.program_id(1), most, outputs)

    @pl.when(first < end)
    def _() -> None:
        mine = _Span(first, rows, end)

        def turn(step: Array, total: Array) -> Array:
            depth = _Span.of(step, inner, inputs)
            left = _read(x, mine, depth)
            if transposed:
                return total + kernels.dot(left, _read(kernel, columns, depth, (group,)), (1, 1), interpret=interpret)
            return total + kernels.dot(left, _read(kernel, depth, columns, (group,)), (1, 0), interpret=interpret)

        total = lax.fori_loop(0, pl.cdiv(inputs, inner), turn, jnp.zeros((rows, columns.size), jnp.float32))
        _write(out, total, mine, columns)


def _gradient_kernel(x, cotangent, first_of, end_of, out, *, interpret: bool) -> None:
    """A tile of a group's x^T dy, over all of its rows."""
    group = pl.program_id(2)
    first, end = first_of[group], end_of[group]
    (inputs, outputs), (most, inner) = out.shape[1:], sizes(x.dtype)
    above = _Span.of(pl.program_id(0), _least(inputs, most), inputs)
    columns = _Span.of(pl.program_id(1), _least(outputs, most), outputs)

    def turn(step: Array, total: Array) -> Array:
        rows = _Span(first + step * inner, inner, end)
        return total + kernels.dot(_read(x, rows, above), _read(cotangent, rows, columns), (0, 0), interpret=interpret)

    steps = lax.div(end - first + inner - 1, inner)
    total = lax.fori_loop(0, steps, turn, jnp.zeros((above.size, columns.size), jnp.float32))
    _write(out, total, above, columns, (group,))
