"""gpt-oss: mixtures of clamped experts with biases, attention sinks, and a window in every other layer."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import Experts, ModelConfig, Variant
from rpo_jax.models.families.family import (
    ATTENTION,
    ATTENTION_BIASES,
    Family,
    WeightRule,
    decoder_weights,
    read_windows,
    refuse,
    write_windows,
)

_LAYER, _MLP = "model.layers.{layer}.", ("layers", "mlp")


def _read(config: Any) -> dict[str, Any]:
    refuse(config, hidden_act="silu")
    experts = Experts(
        count=config.num_local_experts,
        per_token=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        weights_sum_to_one=True,
        biases=True,
        joined=True,
        clamp=config.swiglu_limit,
        gate_slope=config.swiglu_alpha,
    )
    return {"sliding_windows": read_windows(config), "variant": Variant(experts=experts, sinks=True)}


def _write(model: ModelConfig) -> dict[str, Any]:
    experts = model.parts.experts
    assert experts is not None
    return {
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "swiglu_limit": experts.clamp,
        "swiglu_alpha": experts.gate_slope,
        **write_windows(model),
    }


FAMILY = Family(
    architecture="GptOssForCausalLM",
    config_class="GptOssConfig",
    read=_read,
    write=_write,
    same=ATTENTION_BIASES,
    weights=(
        *decoder_weights(ATTENTION),
        WeightRule(f"{_LAYER}self_attn.sinks", ("layers", "attention", "sinks"), "vector"),
        WeightRule(f"{_LAYER}mlp.router.weight", (*_MLP, "router"), "linear"),
        WeightRule(f"{_LAYER}mlp.router.bias", (*_MLP, "router_bias"), "vector"),
        WeightRule(f"{_LAYER}mlp.experts.gate_up_proj", (*_MLP, "gate_up"), "experts"),
        WeightRule(f"{_LAYER}mlp.experts.gate_up_proj_bias", (*_MLP, "gate_up_bias"), "vectors"),
        WeightRule(f"{_LAYER}mlp.experts.down_proj", (*_MLP, "down"), "experts"),
        WeightRule(f"{_LAYER}mlp.experts.down_proj_bias", (*_MLP, "down_bias"), "vectors"),
    ),
    reads_mxfp4=True,
)
