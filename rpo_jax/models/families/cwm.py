"""CWM: Llama 3 with a sliding window in three layers of four."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.families.family import Family, read_windows, write_windows


def _write(model: ModelConfig) -> dict[str, Any]:
    return {"mlp_bias": model.mlp_bias, **write_windows(model)}


FAMILY = Family(
    architecture="CwmForCausalLM",
    config_class="CwmConfig",
    read=lambda config: {"mlp_bias": config.mlp_bias, "sliding_windows": read_windows(config)},
    write=_write,
)
