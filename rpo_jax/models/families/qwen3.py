"""Qwen 3: Qwen 2's windows, and a norm over each query's and key's head."""

from __future__ import annotations

from rpo_jax.models.families.family import ATTENTION_BIASES, Family, read_windows
from rpo_jax.models.families.qwen2 import write_qwen_windows

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    config_class="Qwen3Config",
    read=lambda config: {"qk_norm": True, "sliding_windows": read_windows(config)},
    write=write_qwen_windows,
    same=ATTENTION_BIASES,
)
