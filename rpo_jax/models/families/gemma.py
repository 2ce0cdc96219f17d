"""Gemma: norms that multiply by 1 + scale, scaled embeddings, GeGLU."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import ModelConfig, Variant
from rpo_jax.models.families.family import Family, refuse


def _read(config: Any) -> dict[str, Any]:
    refuse(config, use_bidirectional_attention=False)
    return {
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "sliding_windows": (None,) * config.num_hidden_layers,
        "variant": Variant(centred_norms=True, embedding_scale=config.hidden_size**0.5),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": model.qkv_bias}


FAMILY = Family(architecture="GemmaForCausalLM", config_class="GemmaConfig", read=_read, write=_write)
