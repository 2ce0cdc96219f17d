"""OLMo 3: OLMo 2 with a window in three layers of four, whose rope is not scaled where the others' is."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.families.family import NORMS_AFTER, Family, decoder_weights, read_windows, write_windows
from rpo_jax.models.families.olmo2 import read_olmo


def _read(config: Any) -> dict[str, Any]:
    return {**read_olmo(config), "sliding_windows": read_windows(config)}


def _write(model: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": model.qkv_bias, **write_windows(model)}


FAMILY = Family(
    architecture="Olmo3ForCausalLM",
    config_class="Olmo3Config",
    read=_read,
    write=_write,
    weights=decoder_weights(norms=NORMS_AFTER),
    ropes_by_layer=True,
)
