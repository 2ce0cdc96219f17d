"""Qwen 3 with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import Experts, ModelConfig, Variant
from rpo_jax.models.families.family import ATTENTION_BIASES, Family, expert_weights, refuse


def _read(config: Any) -> dict[str, Any]:
    refuse(config, mlp_only_layers=[], decoder_sparse_step=1)
    experts = Experts(
        count=config.num_experts,
        per_token=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        weights_sum_to_one=bool(config.norm_topk_prob),
    )
    window = config.sliding_window if config.use_sliding_window else None
    return {
        "qk_norm": True,
        "sliding_windows": (window,) * config.num_hidden_layers,
        "variant": Variant(experts=experts),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    experts, window = model.parts.experts, model.sliding_windows[0]
    assert experts is not None
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.weights_sum_to_one,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }


FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    config_class="Qwen3MoeConfig",
    read=_read,
    write=_write,
    same=ATTENTION_BIASES,
    weights=expert_weights("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
)
