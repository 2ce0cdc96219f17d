"""Phi-3, 3.5 and 4: one matrix for queries, keys and values, one for gate and up; part of a head rotated; LongRoPE."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import ModelConfig, Variant
from rpo_jax.models.families.family import LINEARS, Family, decoder_weights

_FUSED = {
    "self_attn.qkv_proj": (("attention", "query_key_value"), "linear"),
    "self_attn.o_proj": LINEARS["self_attn.o_proj"],
    "mlp.gate_up_proj": (("mlp", "gate_up"), "linear"),
    "mlp.down_proj": LINEARS["mlp.down_proj"],
}


def _read(config: Any) -> dict[str, Any]:
    return {
        "sliding_windows": (config.sliding_window,) * config.num_hidden_layers,
        "variant": Variant(fused_projections=True),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    end = dict(model.rope.scaling).get("original_max_position_embeddings", model.max_position_embeddings)
    return {"sliding_window": model.sliding_windows[0], "original_max_position_embeddings": end}


FAMILY = Family(
    architecture="Phi3ForCausalLM",
    config_class="Phi3Config",
    read=_read,
    write=_write,
    weights=decoder_weights(linears=_FUSED),
    rotates_part=True,
)
