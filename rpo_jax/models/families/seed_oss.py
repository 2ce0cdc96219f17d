"""Seed-OSS: Llama whose biases of queries, keys and values do not decide on the output projection's."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.families.family import Family


def _read(config: Any) -> dict[str, Any]:
    return {
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_out_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_windows": (None,) * config.num_hidden_layers,
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    return {
        "attention_bias": model.qkv_bias,
        "attention_out_bias": model.output_bias,
        "mlp_bias": model.mlp_bias,
    }


FAMILY = Family(architecture="SeedOssForCausalLM", config_class="SeedOssConfig", read=_read, write=_write)
