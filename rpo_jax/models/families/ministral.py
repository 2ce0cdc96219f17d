"""Ministral: Mistral with layers that have a sliding window beside others without."""

from __future__ import annotations

from rpo_jax.models.families.family import Family, read_windows, write_windows

FAMILY = Family(
    architecture="MinistralForCausalLM",
    config_class="MinistralConfig",
    read=lambda config: {"sliding_windows": read_windows(config)},
    write=write_windows,
)
