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
}


@functools.cache
def torch_model(name: str) -> Any:
    """A model whose every weight is random and large enough that an error in any of them shows in the logits."""
    prefix, changes = CASES[name]
    config = getattr(transformers, f"{prefix}Config")(**(SIZES | changes), attn_implementation="eager")
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in _name(model, parameter) else 0.15 * noise)
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
