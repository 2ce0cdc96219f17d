"""Sections on the models: the policy, what of it is trained, and the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rpo_jax.config.checks import ConfigError, positive


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy: a Hugging Face folder, or sizes of a new model.

    Args:
        path: Hugging Face folder or hub name to start from, with its tokenizer; family and sizes are then not used.
        tokenizer: tokenizer folder of a new model; `train` learns a byte-level BPE of `vocab_size` from the data.
        family: architecture of a new model, by transformers' model_type; any other name is answered with those there
            are.
        compute_dtype: dtype of matrix products and activations; trained weights, log-softmax and loss stay float32.
        remat: what the backward pass keeps and need not compute again: `none` keeps every activation, `dots` all matrix
            products, `attention` each layer's input and what its attention gives, `full` the input only.
        attention: `auto`, or a module of rpo_jax/models/attention, which says what it is for; any other name is
            answered with those there are.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts beside any objective's; 0 leaves
            it out.
    """

    path: str | None = None
    tokenizer: str = "train"
    family: str = "llama"
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "attention", "full"] = "dots"
    attention: str = "auto"
    router_aux_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.router_aux_loss_coef < float("inf"):
            raise ConfigError(
                f"model.router_aux_loss_coef={self.router_aux_loss_coef} must be a number of at least 0; 0 leaves the "
                "load-balancing loss out."
            )
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        positive("model", **{name: getattr(self, name) for name in (*sizes, "rope_theta")})
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} must be a multiple of model.num_heads={self.num_heads}, "
                f"and that one of model.num_kv_heads={self.num_kv_heads}."
            )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: trained in place of the policy's weights, which stay as they are.

    Args:
        rank: inner dimension of an adapter; 0 trains all weights.
        alpha: the adapters' product is scaled by alpha / rank.
        targets: which linear layers get adapters, by PEFT's names; any other name is answered with those there are.
        base_dtype: how the frozen weights are stored; `int8` rounds the layers' matrices per output channel, `nf4`
            (QLoRA's, as bitsandbytes has it) and `int4` (even steps) per 64 inputs, in 4.127 bits a weight; all three
            keep embedding, head and norms in float32.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    base_dtype: Literal["float32", "bfloat16", "int8", "nf4", "int4"] = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # a list is what YAML and notebooks give
        positive("lora", alpha=self.alpha)
        if self.rank < 0:
            raise ConfigError(f"lora.rank={self.rank} must not be negative; 0 trains all weights.")
        defaults = type(self).__dataclass_fields__
        for name in ("alpha", "targets", "base_dtype"):
            if not self.rank and getattr(self, name) != defaults[name].default:
                raise ConfigError(
                    f"lora.{name}={getattr(self, name)} is given, but lora.rank=0 trains all weights; set lora.rank."
                )


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Where the reference's log-probs come from.

    Args:
        mode: `cached` computes them once before training and stores them; `live` computes them in every step with a
            second model in memory (LoRA's base, where no path is given); `adapter` computes them in every step with
            the policy's own LoRA adapters off; `none` uses zeros (the reference-free form).
        path: Hugging Face folder of the reference; the policy's starting weights where not given.
        others: folders of further references, mixed with the first into a virtual one; their log-probs are cached.
        weights: of the first reference and the others in the mixture; even where not given.
        clip: how far another reference's log-prob may be from the first's, as a share of it.
        adaptive: of two references, weights by how far each tells a pair's responses apart, in place of `weights`, and
            `clip` parted between a pair's responses by how likely they are.
    """

    mode: Literal["cached", "live", "adapter", "none"] = "cached"
    path: str | None = None
    others: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    clip: float = 0.1
    adaptive: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "others", tuple(self.others))  # a list is what YAML and notebooks give
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
        if not 0 <= self.clip < 1:
            raise ConfigError(f"reference.clip={self.clip} must be at least 0 and below 1.")
        if self.weights is not None and not self.others:
            raise ConfigError("reference.weights is given, but reference.others names no reference to mix with.")
        if self.adaptive and (len(self.others) != 1 or self.weights is not None):
            raise ConfigError(
                "reference.adaptive weighs two references by every pair: give it one folder in reference.others, and "
                "no reference.weights."
            )
        if not self.others:
            return
        if self.mode != "cached":
            raise ConfigError(f"reference.others needs reference.mode=cached, got {self.mode}.")
        count = 1 + len(self.others)
        if len(self.mixture) != count or min(self.mixture) <= 0 or abs(sum(self.mixture) - 1) > 1e-6:
            raise ConfigError(
                f"reference.weights={list(self.mixture)} must be {count} positive numbers that sum to 1: of the first "
                "reference and of each of reference.others."
            )

    @property
    def mixture(self) -> tuple[float, ...]:
        """Weights of the first reference and of the others."""
        count = 1 + len(self.others)
        return (1 / count,) * count if self.weights is None else self.weights
