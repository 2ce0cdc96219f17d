"""Mistral: one sliding window for all layers, or none."""

from __future__ import annotations

from rpo_jax.models.families.family import Family

FAMILY = Family(
    architecture="MistralForCausalLM",
    config_class="MistralConfig",
    read=lambda config: {"sliding_windows": (config.sliding_window,) * config.num_hidden_layers},
    write=lambda model: {"sliding_window": model.sliding_windows[0]},
    multimodal={"mistral3": "Mistral3ForConditionalGeneration"},
)
