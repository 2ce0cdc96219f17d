"""OLMo 2: norms after attention and MLP only, and norms of all heads of queries and of keys together."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import Variant
from rpo_jax.models.families.family import ATTENTION_BIASES, NORMS_AFTER, Family, decoder_weights


def read_olmo(config: Any) -> dict[str, Any]:
    """What OLMo 2 and 3 have in common."""
    return {"qk_norm": True, "variant": Variant(norm_before=False, norm_after=True, joint_qk_norm=True)}


FAMILY = Family(
    architecture="Olmo2ForCausalLM",
    config_class="Olmo2Config",
    read=read_olmo,
    same=ATTENTION_BIASES,
    weights=decoder_weights(norms=NORMS_AFTER),
)
