"""A frozen base's matrices in 8 or 4 bits: how weights are rounded, and how a folder's become shards of such.

int8 is symmetric, with one scale per output channel: values = round(W / scale), scale = max over inputs |W| / 127.
nf4 and int4 are as QLoRA has it (arXiv 2305.14314, Section 3), number for number as bitsandbytes has nf4: one
scale, the largest |W|, for each output and 64 inputs, and of 256 scales, less their mean, 8 bits and one step. That is
4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight.

Tried in place of our own: qwix 0.1.8. Its providers leave scanned layers as they are (see rpo_jax.models.lora); its
arrays (`qwix.quantize(w, "nf4", tiled_axes={0: 64})`) hold the same levels with float32 scales, which is 4.5 bits, and
have no double quantisation. bitsandbytes itself needs torch on the training device: its arithmetic is here, and its
results are in tests/models/test_quantization.py. Its CPU kernel alone rounds 0.3 % of the scales to a neighbour of
their nearest level.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from rpo_jax.models.huggingface.loading import Weights, place
from rpo_jax.models.huggingface.tensors import Index
from rpo_jax.models.projection import (
    BLOCK,
    GROUP,
    INT4_LEVELS,
    NF4,
    NF4_LEVELS,
    SCALE_LEVELS,
    Blockwise,
    Int4,
    Quantized,
)

INT8_MAX = 127  # symmetric: -128 is not used
BY_BLOCKS: dict[str, tuple[type[Blockwise], np.ndarray]] = {"nf4": (NF4, NF4_LEVELS), "int4": (Int4, INT4_LEVELS)}
ROUNDED = ("int8", *BY_BLOCKS)
_SMALLEST = np.float32(1e-38)  # in place of a scale of nothing but zeros


class Matrix(NamedTuple):
    """The matrix of one linear layer, of every decoder layer, and of every expert where it has several.

    Attributes:
        path: in the tree of parameters.
        module: its name in a Hugging Face model, with `{layer}`, and `{expert}` unless experts share one tensor.
        layers: how many are stacked, by the names of the axes: layers, and experts.
        inputs: sizes of its input axes, by name.
        outputs: sizes of its output axes, by name.
    """

    path: tuple[str, ...]
    module: str
    layers: dict[str, int]
    inputs: dict[str, int]
    outputs: dict[str, int]

    @property
    def of_experts(self) -> bool:
        return "experts" in self.layers

    @property
    def place(self) -> tuple[str, ...]:
        """Where its adapters are: beside the kernel, or, where that has no place of its own, in its place."""
        return self.path[:-1] if self.path[-1] == "kernel" else self.path

    @property
    def axes(self) -> tuple[str, ...]:
        return (*self.layers, *self.inputs, *self.outputs)

    @property
    def blocks(self) -> int:
        return prod(self.inputs.values()) // BLOCK

    def name(self, where: tuple[int, ...]) -> str:
        return self.module.format(**dict(zip(("layer", "expert"), where, strict=False)))


def bytes_per_weight(dtype: str) -> float:
    """Of a matrix that is stored so, scales included where they grow with it in both directions."""
    return 0.5 + (1 + 4 / GROUP) / BLOCK if dtype in BY_BLOCKS else jnp.dtype(dtype).itemsize


def described(matrix: Matrix, dtype: str) -> tuple[Quantized | Blockwise, Quantized | Blockwise]:
    """Shapes of a rounded matrix, as jax.ShapeDtypeStruct, and the names of its axes.

    `steps` and `offset` are whole on every device: a group of scales goes over all of a matrix, and they are a
    16,384th of its weights.
    """
    layers, outputs = matrix.layers, matrix.outputs
    first = next(iter(matrix.inputs))
    if dtype == "int8":
        arrays = ((layers | matrix.inputs | outputs, jnp.int8), (layers | outputs, jnp.float32))
        kind: Any = Quantized
    else:
        groups = -(-matrix.blocks * prod(outputs.values()) // GROUP)
        of_blocks = layers | {first: matrix.blocks}
        arrays = (
            (of_blocks | {None: BLOCK // 2} | outputs, jnp.uint8),
            (of_blocks | outputs, jnp.uint8),
            (layers | {None: groups}, jnp.float32),
            (layers, jnp.float32),
        )
        kind = BY_BLOCKS[dtype][0]
    shapes = kind(*(jax.ShapeDtypeStruct(tuple(sizes.values()), kept) for sizes, kept in arrays))
    return shapes, kind(*(tuple(sizes) for sizes, _ in arrays))


def load_rounded(weights: Weights, matrix: Matrix, shapes: Quantized | Blockwise, places: Any) -> Any:
    """A matrix of a folder, rounded, without the whole of it in memory: a layer's at a time, and what devices hold.

    Every process reads all inputs of the outputs that its devices hold, for nf4 and int4 all of each layer, and so
    finds the same scales as every other without asking.
    """
    if isinstance(shapes, Quantized):
        return _load_int8(weights, matrix, shapes, places)
    return _load_blocks(weights, matrix, shapes, places)


def _read(weights: Weights, matrix: Matrix, where: tuple[int, ...], index: Index) -> np.ndarray:
    """A part of one layer's, and expert's, matrix; ValueError for weights that are not finite."""
    one = tuple(slice(number, number + 1) for number in where)
    wide = weights.read(matrix.path, (*one, *index), "float32")
    if not np.isfinite(wide).all():
        raise ValueError(f"{matrix.name(where)} of the base has weights that are not finite; they cannot be rounded.")
    return wide.reshape(wide.shape[len(where) :])


def _stacked(matrix: Matrix, index: Index, read: Callable[[tuple[int, ...]], np.ndarray]) -> np.ndarray:
    """What is read of each layer, and expert, of a part, as one array."""
    numbers = [range(size)[part] for size, part in zip(matrix.layers.values(), index, strict=False)]
    parts = [read(where) for where in itertools.product(*numbers)]
    return np.stack(parts).reshape(*map(len, numbers), *parts[0].shape)


def _load_int8(weights: Weights, matrix: Matrix, shapes: Quantized, places: Any) -> Quantized:
    lead, rank = len(matrix.layers), len(matrix.inputs)
    everything = (slice(None),) * rank
    known: dict[Any, np.ndarray] = {}

    def scale_of(where: tuple[int, ...], outputs: Index) -> np.ndarray:
        key = (where, tuple(part.indices(size) for part, size in zip(outputs, matrix.outputs.values(), strict=True)))
        if key not in known:
            largest = np.max(np.abs(_read(weights, matrix, where, (*everything, *outputs))), axis=tuple(range(rank)))
            known[key] = np.where(largest > 0, largest / INT8_MAX, 1.0).astype(np.float32)
        return known[key]

    def read_scale(index: Index) -> np.ndarray:
        return _stacked(matrix, index, lambda where: scale_of(where, index[lead:]))

    def read_values(index: Index) -> np.ndarray:
        def rounded(where: tuple[int, ...]) -> np.ndarray:
            scale = scale_of(where, index[lead + rank :])
            return np.rint(_read(weights, matrix, where, index[lead:]) / scale).astype(np.int8)

        return _stacked(matrix, index, rounded)

    scale = place(shapes.scale.shape, places.scale, read_scale)
    return Quantized(place(shapes.values.shape, places.values, read_values), scale)


def _load_blocks(weights: Weights, matrix: Matrix, shapes: Blockwise, places: Any) -> Blockwise:
    lead, levels = len(matrix.layers), INT4_LEVELS if isinstance(shapes, Int4) else NF4_LEVELS
    everything = (slice(None),) * (len(matrix.inputs) + len(matrix.outputs))
    inner = prod(list(matrix.inputs.values())[1:])  # inputs in one of the first axis

    @functools.cache
    def scales_of(where: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        wide = _read(weights, matrix, where, everything)
        return rounded_scales(_largest(in_blocks(wide, len(matrix.inputs))))

    def read_scales(field: int, index: Index) -> np.ndarray:
        return _stacked(matrix, index, lambda where: scales_of(where)[field][index[lead:]])

    def read_values(index: Index) -> np.ndarray:
        start, stop, _ = index[lead].indices(matrix.blocks)
        first, last = start * BLOCK // inner, -(-stop * BLOCK // inner)  # what holds these blocks
        part = (slice(first, last), *everything[1 : len(matrix.inputs)], *index[lead + 2 :])

        def rounded(where: tuple[int, ...]) -> np.ndarray:
            wide = _read(weights, matrix, where, part)
            flat = wide.reshape(-1, *wide.shape[len(matrix.inputs) :])[start * BLOCK - first * inner :]
            return packed(in_blocks(flat[: (stop - start) * BLOCK], 1), levels)[:, index[lead + 1]]

        return _stacked(matrix, index, rounded)

    arrays = [place(shapes.values.shape, places.values, read_values)]
    for field, (shape, where) in enumerate(zip(shapes[1:], places[1:], strict=True)):
        arrays.append(place(shape.shape, where, functools.partial(read_scales, field)))
    return type(shapes)(*cast(Any, arrays))


def in_blocks(wide: np.ndarray, input_rank: int) -> np.ndarray:
    """[*inputs, *outputs] as [blocks, BLOCK, *outputs]."""
    return wide.reshape(-1, BLOCK, *wide.shape[input_rank:])


def _largest(blocks: np.ndarray) -> np.ndarray:
    return np.max(np.abs(blocks), axis=1)


def packed(blocks: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The nearest level to each weight over its block's largest, two to a byte: [blocks, BLOCK / 2, *outputs]."""
    scaled = blocks * (1 / np.maximum(_largest(blocks), _SMALLEST))[:, None]
    codes = np.zeros(scaled.shape, np.uint8)
    for bound in (levels[1:] + levels[:-1]) / 2:
        codes += scaled > bound
    half = BLOCK // 2
    return codes[:, :half] | codes[:, half:] << 4


def rounded_scales(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales [blocks, *outputs] as such 8 bits, a step for each GROUP of them, and their mean."""
    by_output = np.moveaxis(scales, 0, -1)
    offset = np.float32(np.mean(by_output, dtype=np.float64))
    centred = by_output.reshape(-1) - offset
    groups = np.pad(centred, (0, -len(centred) % GROUP)).reshape(-1, GROUP)
    steps = np.max(np.abs(groups), axis=1)
    scaled = groups * (1 / np.maximum(steps, _SMALLEST))[:, None]
    codes = np.searchsorted((SCALE_LEVELS[1:] + SCALE_LEVELS[:-1]) / 2, scaled).astype(np.uint8)
    codes = codes.reshape(-1)[: centred.size].reshape(by_output.shape)
    return np.moveaxis(codes, -1, 0), steps, np.asarray(offset)
