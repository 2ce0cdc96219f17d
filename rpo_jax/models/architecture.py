"""The shape of a model: everything the decoder needs to know, and nothing that a family's files are called."""

from __future__ import annotations

from dataclasses import dataclass

from rpo_jax.models.rope import Rope


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
            raise ValueError(f"sliding_windows={self.sliding_windows} must be positive or None.")
