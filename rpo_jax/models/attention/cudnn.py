"""Attention by cuDNN's fused kernel, with the packed, branched mask as a bias.

Read in JAX's source and compiled for CUDA in a test, without its library, but never run: no GPU was at hand.
"""

from __future__ import annotations

import jax
from jaxtyping import Array

from rpo_jax.models.attention.kind import OWN, Attend, AttentionKind, Split, Windows
from rpo_jax.models.attention.masking import TokenIds


def _fused(query: Array, key: Array, value: Array, mask: Array) -> Array:
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")


def _make(ids: TokenIds, windows: Windows, split: Split, softcap: float | None) -> Attend:
    assert softcap is None, "check_attention refuses it"
    # One mask for all heads; the scores themselves stay inside the kernel.
    masks = split.by_window(split.share.visible, ids, windows, OWN)[:, :, None]

    def attend(query: Array, key: Array, value: Array, which: Array, sinks: None = None) -> Array:
        mask = masks[which if len(masks) > 1 else 0]
        return split.attend(_fused, (query, key, value), (mask,), (OWN,))

    return attend


KIND = AttentionKind(
    _make,
    "cuDNN's fused kernel with the mask as a bias: NVIDIA GPUs, opt-in, for it has been run on none",
    fused=True,
    backward_products=5,
    platforms=("gpu",),
    needs=(
        ("model.compute_dtype=bfloat16", lambda dtype, head_dim, tokens: dtype in ("float16", "bfloat16")),
        ("head dimensions that 8 divides, at most 128", lambda dtype, head_dim, tokens: head_dim in range(8, 129, 8)),
        ("an even batch.row_tokens", lambda dtype, head_dim, tokens: tokens is None or tokens % 2 == 0),
    ),
    stand_in="blockwise",
    caps=False,
    shares_tokens=True,
)
