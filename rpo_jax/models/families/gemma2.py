"""Gemma 2: Gemma with norms after attention and MLP too, capped scores and logits, and windows in every other layer."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import ModelConfig, Variant
from rpo_jax.models.families.family import NORMS_AFTER, Family, decoder_weights, read_windows, refuse, write_windows


def read_gemma(config: Any, **parts: Any) -> dict[str, Any]:
    """What Gemma's later versions have in common; `parts` are more fields of Variant."""
    refuse(config, use_bidirectional_attention=False)
    variant = Variant(
        centred_norms=True,
        embedding_scale=config.hidden_size**0.5,
        attention_scale=config.query_pre_attn_scalar**-0.5,
        attention_softcap=config.attn_logit_softcapping,
        logit_softcap=config.final_logit_softcapping,
        **parts,
    )
    return {
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "sliding_windows": read_windows(config),
        "variant": variant,
    }


def write_gemma(model: ModelConfig) -> dict[str, Any]:
    """The arguments that `read_gemma` came from."""
    scale = model.parts.attention_scale
    return {
        "attention_bias": model.qkv_bias,
        "attn_logit_softcapping": model.parts.attention_softcap,
        "final_logit_softcapping": model.parts.logit_softcap,
        # A whole number in every configuration; one over a square root is seldom exact.
        "query_pre_attn_scalar": model.head_dim if scale is None else round(scale**-2),
        **write_windows(model),
    }


FAMILY = Family(
    architecture="Gemma2ForCausalLM",
    config_class="Gemma2Config",
    read=lambda config: read_gemma(config, norm_after=True),
    write=write_gemma,
    weights=decoder_weights(norms=NORMS_AFTER),
    activation="hidden_activation",
)
