"""What the two PyTorch systems share: the model and the optimizer's constants."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.spec import MAX_POSITIONS, CellSpec
from benchmarks.workloads import BOS, EOS, PAD, Pair

LEARNING_RATE = 5e-7
MAX_GRAD_NORM = 10.0
BETA = 0.1
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def torch_device(spec: CellSpec) -> torch.device:
    return torch.device("cuda" if spec.device == "gpu" else "cpu")


def torch_dtype(spec: CellSpec) -> torch.dtype:
    return getattr(torch, spec.dtype)


def make_policy(spec: CellSpec) -> LlamaForCausalLM:
    """A Llama of random weights with SDPA attention, in the cell's dtype; all cores are PyTorch's from now on."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(spec.seed)
    sizes = spec.sizes
    settings: dict[str, Any] = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "tie_word_embeddings": sizes.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta},
        "max_position_embeddings": MAX_POSITIONS,
        "attn_implementation": "sdpa",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    policy: Any = LlamaForCausalLM(LlamaConfig(**settings))
    return policy.to(device=torch_device(spec), dtype=torch_dtype(spec))


def make_lora(spec: CellSpec) -> LoraConfig:
    """Adapters as rpo_jax has them by default: on every linear layer, alpha 16."""
    return LoraConfig(r=spec.lora_rank, lora_alpha=16, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM")


def whole_gradient(model: Any) -> None:
    """Let the padding token's row have its gradient: torch leaves it out, also of a token that ends every turn."""
    model.get_input_embeddings().padding_idx = None


def make_reference(policy: LlamaForCausalLM) -> LlamaForCausalLM:
    """A frozen copy."""
    return copy.deepcopy(policy).eval().requires_grad_(False)


def warm_up(model: LlamaForCausalLM, pairs: list[Pair]) -> None:
    """A forward and backward pass of the size of these pairs' padded rows.

    Threads are started, kernels chosen and memory is taken before any step is timed.
    """
    device = next(model.parameters()).device
    longest = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs)
    tokens = torch.randint(0, model.config.vocab_size, (2 * len(pairs), longest), device=device)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
