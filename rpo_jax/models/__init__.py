"""The decoder, its families, and Hugging Face folders in and out."""

from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.attend import ATTENTIONS, Split, attention_kind, check_attention
from rpo_jax.models.decoder import (
    abstract_params,
    apply,
    count_params,
    hidden_states,
    init_params,
    output_head,
    param_axes,
)
from rpo_jax.models.families import FAMILIES, new_config, read_config, to_transformers
from rpo_jax.models.folders import resolve_folder
from rpo_jax.models.from_scratch import from_scratch
from rpo_jax.models.loading import check_pretrained, load_pretrained, load_sharded
from rpo_jax.models.rope import Rope
from rpo_jax.models.weights import save_pretrained

__all__ = [
    "ATTENTIONS",
    "FAMILIES",
    "ModelConfig",
    "Rope",
    "Split",
    "abstract_params",
    "apply",
    "attention_kind",
    "check_attention",
    "check_pretrained",
    "count_params",
    "from_scratch",
    "hidden_states",
    "init_params",
    "load_pretrained",
    "load_sharded",
    "new_config",
    "output_head",
    "param_axes",
    "read_config",
    "resolve_folder",
    "save_pretrained",
    "to_transformers",
]
