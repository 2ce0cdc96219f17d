"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import Experts, ModelConfig, Variant
from rpo_jax.models.families.family import Family, expert_weights


def _read(config: Any) -> dict[str, Any]:
    experts = Experts(
        count=config.num_local_experts,
        per_token=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        weights_sum_to_one=True,
    )
    return {
        "sliding_windows": (config.sliding_window,) * config.num_hidden_layers,
        "variant": Variant(experts=experts),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    experts = model.parts.experts
    assert experts is not None
    return {
        "sliding_window": model.sliding_windows[0],
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
    }


FAMILY = Family(
    architecture="MixtralForCausalLM",
    config_class="MixtralConfig",
    read=_read,
    write=_write,
    weights=expert_weights("block_sparse_moe", gate="w1", up="w3", down="w2"),
)
