"""Granite: Llama with multipliers of embeddings, residuals, attention scores and logits."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import ModelConfig, Variant
from rpo_jax.models.families.family import BIASES, Family


def read_granite(config: Any, logit_divisor: float, **parts: Any) -> dict[str, Any]:
    """What Granite's relatives have in common; `parts` are more fields of Variant."""
    return {
        "variant": Variant(
            embedding_scale=config.embedding_multiplier,
            residual_scale=config.residual_multiplier,
            attention_scale=config.attention_multiplier,
            logit_divisor=logit_divisor,
            **parts,
        ),
    }


def write_granite(model: ModelConfig) -> dict[str, Any]:
    """The arguments that `read_granite` came from."""
    parts = model.parts
    return {
        "embedding_multiplier": parts.embedding_scale,
        "residual_multiplier": parts.residual_scale,
        "attention_multiplier": model.head_dim**-0.5 if parts.attention_scale is None else parts.attention_scale,
        "logits_scaling": parts.logit_divisor,
    }


FAMILY = Family(
    architecture="GraniteForCausalLM",
    config_class="GraniteConfig",
    read=lambda config: read_granite(config, config.logits_scaling),
    write=write_granite,
    same=BIASES,
)
