"""What a model family declares of itself, and what decoders of this kind have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rpo_jax.models.architecture import ModelConfig


class WeightRule(NamedTuple):
    """One tensor of a folder and the parameter that it fills; `{layer}` in the key indexes the first axis.

    layout is a key of rpo_jax.models.huggingface.tensors.LAYOUTS: how the file's array relates to the parameter's.
    """

    key: str
    path: tuple[str, ...]
    layout: str

    @property
    def module(self) -> str:
        """The layer's name in a Hugging Face model, with `{layer}`."""
        return self.key.rpartition(".")[0]


Path = tuple[str, ...]


def layer_weights(linears: Mapping[str, tuple[Path, str]], norms: Mapping[str, Path]) -> tuple[WeightRule, ...]:
    """Kernels and biases of the linear layers of every decoder layer, and scales of its norms.

    Args:
        linears: from the name in a decoder layer of transformers to the path in ours, and the kernel's layout.
        norms: from the name there to the path here.
    """
    prefix = "model.layers.{layer}."
    kernels = (
        WeightRule(f"{prefix}{name}.weight", ("layers", *path, "kernel"), kind)
        for name, (path, kind) in linears.items()
    )
    biases = (
        WeightRule(f"{prefix}{name}.bias", ("layers", *path, "bias"), "vector") for name, (path, _) in linears.items()
    )
    scales = (
        WeightRule(f"{prefix}{name}.weight", ("layers", *path, "scale"), "vector") for name, path in norms.items()
    )
    return (*kernels, *biases, *scales)


# Names that Llama's relatives share; a rule whose parameter a model does not have is not used.
DECODER_WEIGHTS = (
    WeightRule("model.embed_tokens.weight", ("embed",), "table"),
    *layer_weights(
        linears={
            "self_attn.q_proj": (("attention", "query"), "linear"),
            "self_attn.k_proj": (("attention", "key"), "linear"),
            "self_attn.v_proj": (("attention", "value"), "linear"),
            "self_attn.o_proj": (("attention", "output"), "joined_linear"),
            "mlp.gate_proj": (("mlp", "gate"), "linear"),
            "mlp.up_proj": (("mlp", "up"), "linear"),
            "mlp.down_proj": (("mlp", "down"), "linear"),
        },
        norms={
            "input_layernorm": ("attention_norm",),
            "post_attention_layernorm": ("mlp_norm",),
            "self_attn.q_norm": ("attention", "query_norm"),
            "self_attn.k_norm": ("attention", "key_norm"),
        },
    ),
    WeightRule("model.norm.weight", ("final_norm", "scale"), "vector"),
    WeightRule("lm_head.weight", ("head",), "linear"),
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture; its key in FAMILIES is transformers' model_type.

    Args:
        architecture: transformers' model class.
        config_class: transformers' configuration class.
        read: the fields of ModelConfig that this family alone decides, from a transformers configuration.
        write: the arguments of the configuration class that `read` came from.
        weights: the tensors of a folder.
    """

    architecture: str
    config_class: str
    read: Callable[[Any], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    weights: tuple[WeightRule, ...] = DECODER_WEIGHTS

    @property
    def lora_targets(self) -> Mapping[str, WeightRule]:
        """The linear layers that LoRA can adapt and int8 can store, by the names that PEFT's target_modules has."""
        return {rule.module.rpartition(".")[2]: rule for rule in self.weights if rule.path[-1] == "kernel"}
