"""The architecture of a model that starts from nothing, by the sizes of a configuration."""

from __future__ import annotations

from rpo_jax.config import PolicyConfig
from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.families import new_config

VOCABULARY_MULTIPLE = 64  # so that a tensor axis can split it


def from_scratch(
    sizes: PolicyConfig, vocab_size: int, max_position_embeddings: int, **token_ids: int | None
) -> ModelConfig:
    """Architecture of the configured sizes; the vocabulary is rounded up.

    Args:
        token_ids: bos_token_id, eos_token_id and pad_token_id of the tokenizer, where there is one.
    """
    return new_config(
        family=sizes.family,
        vocab_size=-(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        tie_embeddings=sizes.tie_embeddings,
        rope_theta=sizes.rope_theta,
        max_position_embeddings=max_position_embeddings,
        **token_ids,
    )
