"""Qwen 2 and 2.5: biases of queries, keys and values, and layers with a sliding window beside others without."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.families.family import Family, read_windows, write_windows


def write_qwen_windows(model: ModelConfig) -> dict[str, Any]:
    """The arguments that `read_windows` came from, under all of Qwen's names."""
    sliding = [index for index, window in enumerate(model.sliding_windows) if window is not None]
    return {
        "use_sliding_window": bool(sliding),
        "max_window_layers": sliding[0] if sliding else model.num_layers,
        **write_windows(model),
    }


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    config_class="Qwen2Config",
    read=lambda config: {"qkv_bias": True, "sliding_windows": read_windows(config)},
    write=write_qwen_windows,
)
