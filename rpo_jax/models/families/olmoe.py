"""OLMoE: a mixture of experts in every layer, and norms of all heads of queries and of keys together."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import Experts, ModelConfig, Variant
from rpo_jax.models.families.family import ATTENTION_BIASES, Family, expert_weights, refuse


def _read(config: Any) -> dict[str, Any]:
    refuse(config, clip_qkv=None)
    experts = Experts(
        count=config.num_experts,
        per_token=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        weights_sum_to_one=bool(config.norm_topk_prob),
    )
    return {"qk_norm": True, "variant": Variant(experts=experts, joint_qk_norm=True)}


def _write(model: ModelConfig) -> dict[str, Any]:
    experts = model.parts.experts
    assert experts is not None
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "norm_topk_prob": experts.weights_sum_to_one,
    }


FAMILY = Family(
    architecture="OlmoeForCausalLM",
    config_class="OlmoeConfig",
    read=_read,
    write=_write,
    same=ATTENTION_BIASES,
    weights=expert_weights("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
)
