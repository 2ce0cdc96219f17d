"""Qwen 3: Qwen 2's windows, and a norm over each query's and key's head."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.families.family import Family, read_windows
from rpo_jax.models.families.qwen2 import write_qwen_windows


def _read(config: Any) -> dict[str, Any]:
    bias = config.attention_bias
    return {"qkv_bias": bias, "output_bias": bias, "qk_norm": True, "sliding_windows": read_windows(config)}


def _write(model: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": model.qkv_bias, **write_qwen_windows(model)}


FAMILY = Family(architecture="Qwen3ForCausalLM", config_class="Qwen3Config", read=_read, write=_write)
