"""The decoder, its families, and Hugging Face folders in and out."""

from rpo_jax.models.architecture import Experts, ModelConfig, Variant
from rpo_jax.models.attention.kind import Split
from rpo_jax.models.attention.registry import Asked, attention_kind, attention_name
from rpo_jax.models.decoder import (
    Execution,
    abstract_params,
    apply,
    count_params,
    hidden_states,
    init_params,
    output_head,
    param_axes,
)
from rpo_jax.models.families import FAMILIES
from rpo_jax.models.huggingface.configuration import (
    check_ids,
    check_tokenizer,
    configured,
    is_text_part,
    new_config,
    read_config,
    rows_needed,
    to_transformers,
)
from rpo_jax.models.huggingface.folders import resolve_folder
from rpo_jax.models.huggingface.loading import check_pretrained, load_pretrained
from rpo_jax.models.huggingface.saving import RENDERING, RewardHead, classifier_name, save_pretrained
from rpo_jax.models.lora import load_sharded
from rpo_jax.models.policy import ROW_IDS, Outputs, Parameters, Policy, check_choices
from rpo_jax.models.rope import Rope

__all__ = [
    "FAMILIES",
    "RENDERING",
    "ROW_IDS",
    "Asked",
    "Execution",
    "Experts",
    "ModelConfig",
    "Outputs",
    "Parameters",
    "Policy",
    "RewardHead",
    "Rope",
    "Split",
    "Variant",
    "abstract_params",
    "apply",
    "attention_kind",
    "attention_name",
    "check_choices",
    "check_ids",
    "check_pretrained",
    "check_tokenizer",
    "classifier_name",
    "configured",
    "count_params",
    "hidden_states",
    "init_params",
    "is_text_part",
    "load_pretrained",
    "load_sharded",
    "new_config",
    "output_head",
    "param_axes",
    "read_config",
    "resolve_folder",
    "rows_needed",
    "save_pretrained",
    "to_transformers",
]
