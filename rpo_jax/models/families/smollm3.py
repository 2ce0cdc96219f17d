"""SmolLM3: Llama with layers that have no rotary embedding."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import ModelConfig, Variant
from rpo_jax.models.families.family import BIASES, Family, read_windows, write_windows


def _read(config: Any) -> dict[str, Any]:
    layers = range(config.num_hidden_layers)
    if len(config.no_rope_layers) < len(layers):
        raise ValueError(f"no_rope_layers has {len(config.no_rope_layers)} entries for {len(layers)} layers.")
    windows = read_windows(config) if config.use_sliding_window else (None,) * len(layers)
    return {
        "sliding_windows": windows,
        "variant": Variant(unrotated_layers=tuple(n for n in layers if not config.no_rope_layers[n])),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    return {
        # 1 where there is a rope, whatever the name says.
        "no_rope_layers": [int(rope is not None) for rope in model.layer_ropes],
        "use_sliding_window": any(window is not None for window in model.sliding_windows),
        **write_windows(model),
    }


FAMILY = Family(architecture="SmolLM3ForCausalLM", config_class="SmolLM3Config", read=_read, write=_write, same=BIASES)
