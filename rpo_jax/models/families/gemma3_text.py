"""Gemma 3, text: Gemma 2 with norms of queries and keys instead of capped scores, and a rope for windows alone."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.families.family import NORMS_AFTER, Family, decoder_weights, refuse
from rpo_jax.models.families.gemma2 import read_gemma, write_gemma


def _read(config: Any) -> dict[str, Any]:
    # transformers' class takes it and does not use it.
    refuse(config, attn_logit_softcapping=None)
    return {"qk_norm": True, **read_gemma(config, norm_after=True)}


def _write(model: ModelConfig) -> dict[str, Any]:
    local = model.parts.local_rope or model.rope
    # By its name in transformers 4.
    return {"rope_local_base_freq": local.theta, **write_gemma(model)}


FAMILY = Family(
    architecture="Gemma3ForCausalLM",
    config_class="Gemma3TextConfig",
    read=_read,
    write=_write,
    weights=decoder_weights(norms=NORMS_AFTER),
    activation="hidden_activation",
    ropes_by_layer=True,
    local_theta=10_000.0,
    multimodal={"gemma3": "Gemma3ForConditionalGeneration"},
)
