"""Rotary position embeddings: frequencies of every supported scaling, and the rotation.

Letters: B rows, T tokens, N heads, K head dimension, P pairs of dimensions that are rotated: K / 2 or fewer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Number = float | int  # JSON writes 8.0 as 8
Frequencies = tuple[Float[np.ndarray, "P"], float]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding of one model: base, kind of scaling (a key of ROPE_KINDS) and that scaling's parameters."""

    theta: float
    kind: str = "default"
    scaling: tuple[tuple[str, Any], ...] = ()  # sorted pairs: hashable, as the whole config must be

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope type {self.kind!r} is not supported; known types: {', '.join(ROPE_KINDS)}.")
        try:
            inspect.signature(ROPE_KINDS[self.kind]).bind(self.theta, 2, **dict(self.scaling))
        except TypeError as error:
            raise ValueError(
                f"rope type {self.kind!r} does not go with the parameters {dict(self.scaling)}: {error}."
            ) from None


def frequencies(rope: Rope, head_dim: int) -> Frequencies:
    """Angle per position of each pair of dimensions (radians), and the factor on cos and sin."""
    return ROPE_KINDS[rope.kind](rope.theta, head_dim, **dict(rope.scaling))


def longest_sequence(rope: Rope) -> int | None:
    """Positions beyond which the model would take other frequencies than `frequencies` gives; None for no such end."""
    return dict(rope.scaling)["original_max_position_embeddings"] if rope.kind == "longrope" else None


def rotation(
    rope: Rope | None, rotated_dim: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T P"], Float[Array, "B T P"]]:
    """cos and sin of every position's angles, float32; without a rope all angles are 0."""
    if rope is None:
        angle = jnp.zeros((*positions.shape, rotated_dim // 2), jnp.float32)
        return jnp.cos(angle), jnp.sin(angle)
    frequency, attention_factor = frequencies(rope, rotated_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle) * attention_factor, jnp.sin(angle) * attention_factor


def rotate(
    x: Float[Array, "B T N K"], cos: Float[Array, "B T P"], sin: Float[Array, "B T P"], scale: float = 1.0
) -> Float[Array, "B T N K"]:
    """Rotate pairs (k, k + P) of every head's first 2P dimensions by their position's angle, and scale all, in float32.

    Source: arXiv 2104.09864.
    """
    pairs = cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :pairs], wide[..., pairs : 2 * pairs], wide[..., 2 * pairs :]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return (turned if scale == 1.0 else turned * scale).astype(x.dtype)


def _default(theta: float, head_dim: int) -> Frequencies:
    # float32 throughout, as transformers: at long positions a float64 table would give other angles.
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (1.0 / theta**exponent).astype(np.float32), 1.0


def _linear(theta: float, head_dim: int, *, factor: Number) -> Frequencies:
    """Every position divided by `factor`."""
    return _default(theta, head_dim)[0] / np.float32(factor), 1.0


def _llama3(
    theta: float,
    head_dim: int,
    *,
    factor: Number,
    low_freq_factor: Number,
    high_freq_factor: Number,
    original_max_position_embeddings: int,
) -> Frequencies:
    """Long wavelengths divided by `factor`, short ones kept, a linear blend between.  Source: Llama 3.1."""
    base = _default(theta, head_dim)[0]
    wavelength = 2 * math.pi / base
    turns = original_max_position_embeddings / wavelength
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return ((1 - kept) * base / factor + kept * base).astype(np.float32), 1.0


def _yarn(
    theta: float,
    head_dim: int,
    *,
    factor: Number,
    original_max_position_embeddings: int,
    attention_factor: Number | None = None,
    beta_fast: Number = 32,
    beta_slow: Number = 1,
    mscale: Number | None = None,
    mscale_all_dim: Number | None = None,
    truncate: bool = True,
) -> Frequencies:
    """NTK-by-parts interpolation with an attention temperature.  Source: arXiv 2309.00071, Sections 3.2 and 3.4."""

    def dimension_of(turns: Number) -> float:
        return head_dim * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def temperature(scale: Number) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    low, high = dimension_of(beta_fast), dimension_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    interpolated = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)
    base = _default(theta, head_dim)[0]
    frequency = base / factor * interpolated + base * (1 - interpolated)
    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = temperature(mscale) / temperature(mscale_all_dim)
        else:
            attention_factor = temperature(1.0)
    return frequency.astype(np.float32), attention_factor


def _longrope(
    theta: float,
    head_dim: int,
    *,
    factor: Number,
    original_max_position_embeddings: int,
    short_factor: tuple[Number, ...],
    long_factor: tuple[Number, ...],
    attention_factor: Number | None = None,
) -> Frequencies:
    """A divisor for each pair, for sequences of at most original_max_position_embeddings.  Source: arXiv 2402.13753.

    For a longer sequence the model divides by long_factor at all of its positions: the same prompt then has other
    keys, so that neither packed rows nor a cache could hold both; such sequences are not given to it.
    """
    for name, divisors in (("short_factor", short_factor), ("long_factor", long_factor)):
        if len(divisors) != head_dim // 2:
            raise ValueError(f"{name} has {len(divisors)} numbers for {head_dim // 2} pairs of rotated dimensions.")
    if attention_factor is None:
        stretch = math.log(factor) / math.log(original_max_position_embeddings) if factor > 1 else 0.0
        attention_factor = math.sqrt(1 + stretch)
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (1.0 / (np.array(short_factor, np.float32) * theta**exponent)).astype(np.float32), attention_factor


ROPE_KINDS: dict[str, Callable[..., Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
