"""Llama 2 and 3, and models with their architecture."""

from __future__ import annotations

from rpo_jax.models.families.family import BIASES, Family

FAMILY = Family(architecture="LlamaForCausalLM", config_class="LlamaConfig", same=BIASES)
