"""What a model family declares of itself, and what decoders of this kind have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rpo_jax.models.architecture import ModelConfig


class WeightRule(NamedTuple):
    """One tensor of a folder and the parameter that it fills.

    `{layer}` in the key indexes the parameter's first axis, `{expert}` the one after it. A tensor of the layout
    `experts` holds those of a layer together, and has no module of its own.

    layout is a key of rpo_jax.models.huggingface.tensors.LAYOUTS: how the file's array relates to the parameter's.
    """

    key: str
    path: tuple[str, ...]
    layout: str

    @property
    def module(self) -> str:
        """The layer's name in a Hugging Face model, with `{layer}` and `{expert}`."""
        return self.key if self.layout == "experts" else self.key.rpartition(".")[0]

    @property
    def of_experts(self) -> bool:
        """Whether it is a projection of every expert."""
        return self.layout == "experts" or "{expert}" in self.key


Path = tuple[str, ...]


# From the name in a decoder layer of transformers to the path in ours; of linear layers with the layout of the kernel.
ATTENTION: dict[str, tuple[Path, str]] = {
    "self_attn.q_proj": (("attention", "query"), "linear"),
    "self_attn.k_proj": (("attention", "key"), "linear"),
    "self_attn.v_proj": (("attention", "value"), "linear"),
    "self_attn.o_proj": (("attention", "output"), "joined_linear"),
}
LINEARS: dict[str, tuple[Path, str]] = {
    **ATTENTION,
    "mlp.gate_proj": (("mlp", "gate"), "linear"),
    "mlp.up_proj": (("mlp", "up"), "linear"),
    "mlp.down_proj": (("mlp", "down"), "linear"),
}
_QK_NORMS: dict[str, Path] = {
    "self_attn.q_norm": ("attention", "query_norm"),
    "self_attn.k_norm": ("attention", "key_norm"),
}
NORMS: dict[str, Path] = {
    "input_layernorm": ("attention_norm",),
    "post_attention_layernorm": ("mlp_norm",),
    **_QK_NORMS,
}
# Where a norm follows attention and MLP, the second name means that after attention.
NORMS_AFTER: dict[str, Path] = {
    "input_layernorm": ("attention_norm",),
    "post_attention_layernorm": ("attention_output_norm",),
    "pre_feedforward_layernorm": ("mlp_norm",),
    "post_feedforward_layernorm": ("mlp_output_norm",),
    **_QK_NORMS,
}


def decoder_weights(
    linears: Mapping[str, tuple[Path, str]] = LINEARS, norms: Mapping[str, Path] = NORMS
) -> tuple[WeightRule, ...]:
    """All tensors of a decoder; a rule whose parameter a model does not have is not used."""
    layer = "model.layers.{layer}."
    kernels = (
        WeightRule(f"{layer}{name}.weight", ("layers", *path, "kernel"), kind) for name, (path, kind) in linears.items()
    )
    biases = (
        WeightRule(f"{layer}{name}.bias", ("layers", *path, "bias"), "vector") for name, (path, _) in linears.items()
    )
    scales = (WeightRule(f"{layer}{name}.weight", ("layers", *path, "scale"), "vector") for name, path in norms.items())
    return (
        WeightRule("model.embed_tokens.weight", ("embed",), "table"),
        *kernels,
        *biases,
        *scales,
        WeightRule("model.norm.weight", ("final_norm", "scale"), "vector"),
        WeightRule("lm_head.weight", ("head",), "linear"),
    )


def expert_weights(block: str, gate: str, up: str, down: str) -> tuple[WeightRule, ...]:
    """All tensors of a decoder whose MLPs are mixtures of experts.

    Args:
        block: the mixture's name in a decoder layer of transformers.
        gate: the names of an expert's projections; also `up` and `down`.
    """
    prefix = f"model.layers.{{layer}}.{block}"
    experts = (("gate", gate), ("up", up), ("down", down))
    return (
        *decoder_weights(ATTENTION),
        WeightRule(f"{prefix}.gate.weight", ("layers", "mlp", "router"), "linear"),
        *(
            WeightRule(f"{prefix}.experts.{{expert}}.{theirs}.weight", ("layers", "mlp", ours), "linear")
            for ours, theirs in experts
        ),
    )


# As Family.same.
ATTENTION_BIASES = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
BIASES = {**ATTENTION_BIASES, "mlp_bias": "mlp_bias"}


def read_windows(config: Any) -> tuple[int | None, ...]:
    """Each layer's sliding window by layer_types; ValueError for a kind of layer that is not known."""
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    unknown = sorted(set(config.layer_types) - set(windows))
    if unknown:
        raise ValueError(f"layer_types {unknown} are not supported; known types: {', '.join(windows)}.")
    return tuple(windows[layer_type] for layer_type in config.layer_types)


def write_windows(model: ModelConfig) -> dict[str, Any]:
    """The arguments that `read_windows` came from."""
    windows = model.sliding_windows
    return {
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def refuse(config: Any, **usual: Any) -> None:
    """ValueError for a setting of a configuration that is not as usual, and that nothing here describes."""
    for name, value in usual.items():
        actual = getattr(config, name, value)
        if actual != value and (actual or value):  # null, false and 0 are all ways not to ask for it
            raise ValueError(f"{name}={actual!r} is not supported; models of this family have {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture; its key in FAMILIES is transformers' model_type.

    Args:
        architecture: transformers' model class.
        config_class: transformers' configuration class.
        read: the fields of ModelConfig that this family alone decides, from a transformers configuration; the
            variant's activation, rotated_dim and local_rope are found without it, and layers without it have no window.
        write: the arguments of the configuration class that `read` came from.
        same: further fields of ModelConfig, and what the configuration calls the same value.
        weights: the tensors of a folder.
        activation: the configuration's name for the MLP's activation.
        rotates_part: whether the configuration may say that a part of every head is rotated (partial_rotary_factor).
        ropes_by_layer: whether layers with a sliding window may have a rope of their own.
        local_theta: base of that rope in a new model; the other layers' base where not given.
        multimodal: from the model_type of folders of which such a model is the text part to their model class.
        reads_mxfp4: whether folders may hold their experts in MXFP4, which are read as what they stand for.
    """

    architecture: str
    config_class: str
    read: Callable[[Any], dict[str, Any]] = lambda config: {}
    write: Callable[[ModelConfig], dict[str, Any]] = lambda model: {}
    same: Mapping[str, str] = field(default_factory=dict)
    weights: tuple[WeightRule, ...] = decoder_weights()
    activation: str = "hidden_act"
    rotates_part: bool = False
    ropes_by_layer: bool = False
    local_theta: float | None = None
    multimodal: Mapping[str, str] = field(default_factory=dict)
    reads_mxfp4: bool = False

    @property
    def lora_targets(self) -> Mapping[str, WeightRule]:
        """The linear layers that LoRA can adapt, by PEFT's names for them."""
        linear = (rule for rule in self.weights if rule.path[-1] == "kernel" or rule.of_experts)
        return {rule.module.rpartition(".")[2]: rule for rule in linear}
