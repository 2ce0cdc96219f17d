"""Gemma: norms that multiply by 1 + scale, scaled embeddings, GeGLU."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import Variant
from rpo_jax.models.families.family import ATTENTION_BIASES, Family, refuse


def _read(config: Any) -> dict[str, Any]:
    refuse(config, use_bidirectional_attention=False)
    return {"variant": Variant(centred_norms=True, embedding_scale=config.hidden_size**0.5)}


FAMILY = Family(architecture="GemmaForCausalLM", config_class="GemmaConfig", read=_read, same=ATTENTION_BIASES)
