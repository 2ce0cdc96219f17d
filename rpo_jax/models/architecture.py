"""The shape of a model: everything the decoder needs to know, and nothing that a family's files are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rpo_jax.models.rope import Rope, longest_sequence


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the MLP: every token is worth the few MLPs that its router scores highest.

    Args:
        count: MLPs of a layer.
        per_token: how many of them a token uses.
        intermediate_size: width of each.
        weights_sum_to_one: whether the router's probabilities of those used are divided by their sum.
        biases: of the router and of every expert's projections.
        joined: one matrix for gate and up projection, of which neighbouring columns are one of each.
        clamp: gate and up projection are held below it, the latter above its negative too; None for as they are. What
            is multiplied is then gate sigmoid(gate_slope gate) and 1 + up, whatever the activation.
        gate_slope: of that sigmoid.
    """

    count: int
    per_token: int
    intermediate_size: int
    weights_sum_to_one: bool
    biases: bool = False
    joined: bool = False
    clamp: float | None = None
    gate_slope: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.count or self.intermediate_size < 1:
            raise ValueError(f"a token cannot use {self.per_token} of {self.count} experts, each at least 1 wide.")
        for name in ("clamp", "gate_slope"):
            _check_positive(name, getattr(self, name))


def _check_positive(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, int | float) and 0 < value < float("inf")):
        raise ValueError(f"{name} must be a number greater than 0, got {str(value)[:100]}.")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What of a decoder differs from Llama's; with every default it is Llama's.

    Args:
        activation: of the MLP's gate, a key of rpo_jax.models.decoder.ACTIVATIONS.
        centred_norms: norms multiply by 1 + scale.
        norm_before: attention and MLP read the normed residual stream.
        norm_after: what attention and MLP give is normed before it is added.
        joint_qk_norm: the norm of queries, and that of keys, is over all heads together.
        fused_projections: one matrix for queries, keys and values, and one for the MLP's gate and up projection.
        rotated_dim: how many dimensions of a head are rotated, the first ones; None for all.
        local_rope: rotary embedding of the layers with a sliding window, where they have their own.
        unrotated_layers: numbers of the layers without rotary embedding.
        embedding_scale: embeddings are multiplied by it.
        residual_scale: what attention and MLP give is multiplied by it before it is added.
        attention_scale: scores are query times key times this; None for 1 / sqrt(head_dim).
        attention_softcap: c of c tanh(scores / c); None for the scores as they are.
        logit_divisor: logits are divided by it.
        logit_softcap: c of c tanh(logits / c); None for the logits as they are.
        experts: what every layer has in place of an MLP.
        sinks: every head has a score of its own that takes part in the softmax and has no value.
    """

    activation: str = "silu"
    centred_norms: bool = False
    norm_before: bool = True
    norm_after: bool = False
    joint_qk_norm: bool = False
    fused_projections: bool = False
    rotated_dim: int | None = None
    local_rope: Rope | None = None
    unrotated_layers: tuple[int, ...] = ()
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_divisor: float = 1.0
    logit_softcap: float | None = None
    experts: Experts | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        scales = ("embedding_scale", "residual_scale", "attention_scale", "logit_divisor")
        for name in (*scales, "attention_softcap", "logit_softcap"):
            _check_positive(name, getattr(self, name))
        if self.rotated_dim is not None and (self.rotated_dim < 2 or self.rotated_dim % 2):
            raise ValueError(f"rotated_dim={self.rotated_dim} must be even and at least 2: pairs of dimensions turn.")


LLAMA = Variant()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder architecture; hashable, so that it can be a static argument of a jitted function.

    Args:
        family: key of rpo_jax.models.families.FAMILIES, which names the files' keys.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; each serves num_heads / num_kv_heads query heads.
        head_dim: dimension of a head.
        rms_norm_eps: added to the mean square.
        rope: rotary position embedding.
        tie_embeddings: the output head is the transposed embedding.
        qkv_bias: biases of the query, key and value projections.
        output_bias: bias of the attention's output projection.
        mlp_bias: biases of the MLP's projections.
        qk_norm: RMSNorm over each query's and key's head_dim, before the rotation.
        sliding_windows: per layer, how many positions a query sees, itself included; None sees all.
        max_position_embeddings: longest sequence that the model was made for; not enforced.
        initializer_range: standard deviation of new weights.
        bos_token_id: beginning of sequence.
        eos_token_id: end of sequence; some models have several.
        pad_token_id: padding.
        dtype: dtype of the tensors in the folder that the model came from, and of those it is saved to.
        variant: what differs from Llama's decoder, where anything does: records of older runs know no such field.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    tie_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...]
    max_position_embeddings: int
    initializer_range: float
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None
    pad_token_id: int | None
    dtype: str
    variant: Variant | None = None

    @property
    def parts(self) -> Variant:
        """What the decoder is made of."""
        return self.variant or LLAMA

    @property
    def rotated_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.parts.rotated_dim or self.head_dim

    @property
    def mlp_width(self) -> int:
        """How many of a layer's MLP columns a token uses."""
        experts = self.parts.experts
        return self.intermediate_size if experts is None else experts.per_token * experts.intermediate_size

    @property
    def mlp_stored_width(self) -> int:
        """How many MLP columns a layer has, in all its experts."""
        experts = self.parts.experts
        return self.intermediate_size if experts is None else experts.count * experts.intermediate_size

    @property
    def layer_ropes(self) -> tuple[Rope | None, ...]:
        """Each layer's rotary embedding, None for none."""
        local, unrotated = self.parts.local_rope or self.rope, frozenset(self.parts.unrotated_layers)
        return tuple(
            None if layer in unrotated else self.rope if window is None else local
            for layer, window in enumerate(self.sliding_windows)
        )

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The distinct ones of layer_ropes."""
        return tuple(dict.fromkeys(self.layer_ropes))

    @property
    def rope_of_layer(self) -> tuple[int, ...]:
        """For each layer the number of its rope among `ropes`."""
        return tuple(map(self.ropes.index, self.layer_ropes))

    @property
    def positions(self) -> int:
        """Longest sequence that the model can be given; LongRoPE's other frequencies beyond its own are not used."""
        return min(self.max_position_embeddings, longest_sequence(self.rope) or self.max_position_embeddings)

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} of a {self.family} model must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} of a {self.family} model must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}: every key-value head serves the same number of query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs of dimensions.")
        if len(self.sliding_windows) != self.num_layers:
            raise ValueError(
                f"sliding_windows has {len(self.sliding_windows)} entries for num_layers={self.num_layers}; "
                "give one per layer, None where a layer sees everything."
            )
        if any(window is not None and window < 1 for window in self.sliding_windows):
            raise ValueError(f"sliding_windows={self.sliding_windows} (sliding_window) must be positive or None.")
        if self.variant == LLAMA:
            object.__setattr__(self, "variant", None)  # one architecture is one value
        if self.rotated_dim > self.head_dim:
            raise ValueError(f"rotated_dim={self.rotated_dim} must be at most head_dim={self.head_dim}.")
        if any(layer not in range(self.num_layers) for layer in self.parts.unrotated_layers):
            raise ValueError(
                f"unrotated_layers={self.parts.unrotated_layers} must be numbers of the {self.num_layers} layers."
            )
