"""Seed-OSS: Llama whose biases of queries, keys and values do not decide on the output projection's."""

from __future__ import annotations

from rpo_jax.models.families.family import Family

FAMILY = Family(
    architecture="SeedOssForCausalLM",
    config_class="SeedOssConfig",
    same={"qkv_bias": "attention_bias", "output_bias": "attention_out_bias", "mlp_bias": "mlp_bias"},
)
