"""Tensors in MXFP4, read as what they stand for: four bits a number, and a power of two for every 32 of them.

Source: OCP Microscaling Formats (MX) 1.0, Sections 5.2 and 5.3; laid out as gpt-oss's files have them.
Letters: X experts, I inputs, O outputs, G = I / 32 groups of a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from rpo_jax.models.huggingface.folders import Stored

GROUP = 32  # numbers of a scale
SUFFIXES = ("_blocks", "_scales")  # of the two tensors that stand for one
# E2M1, by its four bits: sign, exponent, mantissa.
_LEVELS = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
LEVELS = np.concatenate([_LEVELS, -_LEVELS])
_EXPONENT_BIAS = 127  # E8M0


def dequantized(
    blocks: UInt8[np.ndarray, "X O G 16"], scales: UInt8[np.ndarray, "X O G"]
) -> Float[np.ndarray, "X O I"]:
    """float32: level times 2^(scale - 127); of a byte the low bits come first."""
    levels = np.stack([LEVELS[blocks & 15], LEVELS[blocks >> 4]], axis=-1)
    exponents = scales.astype(np.int32) - _EXPONENT_BIAS
    return np.ldexp(levels.reshape(*scales.shape, GROUP), exponents[..., None]).reshape(*scales.shape[:2], -1)


class Packed(NamedTuple):
    """Where the two tensors are that stand for one of [X, I, O], under its name."""

    name: str
    blocks: Stored
    scales: Stored

    @property
    def file(self) -> Path:
        return self.blocks.file

    def described(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of the tensor, as Stored's; ValueError for two that do not belong together."""
        (blocks, kinds), (scales, others) = self.blocks.described(), self.scales.described()
        whole = len(blocks) == 4 and blocks[3] == GROUP // 2 and scales == blocks[:3]
        if not whole or {kinds, others} != {"U8"}:
            raise ValueError(
                f"{self.blocks.name} in {self.file} has shape {blocks} ({kinds}) and its scales {scales} ({others}); "
                "in MXFP4 these are [experts, outputs, groups, 16] and [experts, outputs, groups] of bytes."
            )
        return (blocks[0], GROUP * blocks[2], blocks[1]), "BF16"  # in which each of their numbers can be written

    def read(self, index: tuple[slice, ...]) -> Float[np.ndarray, "X I O"]:
        """A part of the tensor, float32; only the groups that hold it are read."""
        experts, inputs, outputs = index
        shape, _ = self.described()
        start, stop, _ = inputs.indices(shape[1])
        first = start // GROUP
        groups = slice(first, -(-stop // GROUP))
        values = dequantized(*(part.read((experts, outputs, groups)) for part in (self.blocks, self.scales)))
        return values[..., start - first * GROUP : stop - first * GROUP].swapaxes(1, 2)
