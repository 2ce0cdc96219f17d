"""Qwen 2 and 2.5: biases of queries, keys and values, and layers with a sliding window beside others without."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.families.family import Family


def read_windows(config: Any) -> tuple[int | None, ...]:
    """Each layer's sliding window; ValueError for a kind of layer that is not known."""
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    unknown = sorted(set(config.layer_types) - set(windows))
    if unknown:
        raise ValueError(f"layer_types {unknown} are not supported; known types: {', '.join(windows)}.")
    return tuple(windows[layer_type] for layer_type in config.layer_types)


def write_windows(model: ModelConfig) -> dict[str, Any]:
    """The arguments that `read_windows` came from."""
    windows = model.sliding_windows
    sliding = [index for index, window in enumerate(windows) if window is not None]
    return {
        "use_sliding_window": bool(sliding),
        "sliding_window": windows[sliding[0]] if sliding else None,
        "max_window_layers": sliding[0] if sliding else model.num_layers,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    config_class="Qwen2Config",
    read=lambda config: {"qkv_bias": True, "sliding_windows": read_windows(config)},
    write=write_windows,
)
