"""Tiny models of every family, made by transformers with random weights, and their folders."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # short, so that the scaling matters within these sequences
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
LAYERS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 20, "final_logit_softcapping": 4.0, "eos_token_id": 3}
# As LongRoPE's are: a divisor for each pair of rotated dimensions, other ones beyond the first 64 positions.
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 5.0, 7.0, 11.0, 13.0],
    "partial_rotary_factor": 0.75,
}

# name -> transformers' model class prefix and what it changes.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE, "eos_token_id": [2, 3]}),
    "llama linear rope": ("Llama", {"rope_parameters": LINEAR_ROPE, "tie_word_embeddings": True}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 6, "head_dim": 32}),
    "mistral no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 sliding layers": ("Qwen2", SLIDING),
    "qwen2.5 yarn": ("Qwen2", {"num_key_value_heads": 1, "rope_parameters": YARN_ROPE}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3 tied sliding biases": (
        "Qwen3",
        {"head_dim": 24, "tie_word_embeddings": True, "attention_bias": True, **SLIDING},
    ),
    "gemma": ("Gemma", {"head_dim": 24, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", GEMMA | LAYERS | {"attn_logit_softcapping": 3.0}),
    "vaultgemma": ("VaultGemma", GEMMA | LAYERS | {"attn_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3",
        GEMMA
        | LAYERS
        | {
            "rope_parameters": {
                "full_attention": LINEAR_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
    ),
    "gemma3 no caps": ("Gemma3", GEMMA | LAYERS | {"final_logit_softcapping": None, "tie_word_embeddings": False}),
    "phi3": ("Phi3", {"pad_token_id": 0, "sliding_window": 6}),
    "phi4 mini": (
        "Phi3",
        {
            "pad_token_id": 0,
            "rope_parameters": LONG_ROPE,
            "original_max_position_embeddings": 96,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("Olmo2", {"attention_bias": True}),
    "olmo3": (
        "Olmo3",
        LAYERS
        | {
            "rope_parameters": {
                "full_attention": YARN_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "pad_token_id": 0}),
    "smollm3 sliding": (
        "SmolLM3",
        LAYERS | {"no_rope_layers": [0, 1, 1], "use_sliding_window": True, "pad_token_id": 0},
    ),
    "granite": (
        "Granite",
        {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 3.0},
    ),
    "hyperclovax": (
        "HyperCLOVAX",
        {
            "embedding_multiplier": 10.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "logits_scaling": 0.75,
        },
    ),
    "exaone4": ("Exaone4", LAYERS | {"eos_token_id": None}),
    "exaone4 no windows": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "ministral": ("Ministral", LAYERS | {"head_dim": 24, "eos_token_id": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6}),
    "qwen3 moe": (
        "Qwen3Moe",
        {
            "head_dim": 24,
            "moe_intermediate_size": 40,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOss",
        LAYERS
        | {
            "head_dim": 24,
            "intermediate_size": 96,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "swiglu_limit": 0.95,  # so low that it holds many; at 1 one value is just that, where the gradient jumps
            "rope_parameters": {**YARN_ROPE, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        },
    ),
    "seed_oss": ("SeedOss", {"head_dim": 24, "attention_bias": True, "attention_out_bias": False, "pad_token_id": 0}),
}
# One case of each of transformers' classes: the first.
OF_FAMILY = {prefix: name for name, (prefix, _) in reversed(CASES.items())}


@functools.cache
def torch_model(name: str) -> Any:
    """A model whose every weight is random and large enough that an error in any of them shows in the logits."""
    prefix, changes = CASES[name]
    model_class = getattr(transformers, f"{prefix}ForCausalLM")
    config = model_class.config_class(**(SIZES | changes), attn_implementation="eager")
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    centre = 0 if "Gemma" in prefix else 1  # of norms' scales
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(centre + 0.3 * noise if "norm" in _name(model, parameter) else 0.15 * noise)
    return model


def _name(model: Any, parameter: Any) -> str:
    return next(name for name, candidate in model.named_parameters() if candidate is parameter)


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """hf_folder(case) -> its folder, written by transformers."""

    @functools.cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp("hf") / "model"
        torch_model(name).save_pretrained(folder)
        return folder

    return write
