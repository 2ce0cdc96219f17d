"""The table of attentions, and the choice among them for a platform."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from rpo_jax.core.discovery import discovered
from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.attention.kind import Attend, AttentionKind, Split, Windows
from rpo_jax.models.attention.masking import TokenIds

ATTENTIONS: dict[str, AttentionKind] = discovered("rpo_jax.models.attention", "KIND")
USUAL = 1024  # tokens of rows whose length is not known: those of the paper's pairs are no longer


class Asked(NamedTuple):
    """What an attention is asked to do; None where that is not known.

    Attributes:
        compute_dtype: of queries, keys and values.
        row_tokens: multiples of 64 where not known.
        softcap: c of c tanh(scores / c); None for the scores as they are.
        sinks: whether every head has a score that has no value.
        context: devices among which a row's tokens are split.
    """

    compute_dtype: str | None = None
    head_dim: int | None = None
    row_tokens: int | None = None
    softcap: float | None = None
    sinks: bool = False
    context: int = 1

    @classmethod
    def of(cls, model: ModelConfig, compute_dtype: DTypeLike, row_tokens: int | None = None, context: int = 1) -> Asked:
        """For this model."""
        parts, dtype = model.parts, str(jnp.dtype(compute_dtype))
        return cls(dtype, model.head_dim, row_tokens, parts.attention_softcap, parts.sinks, context)

    def lacks(self, kind: AttentionKind) -> str | None:
        """What a kind of attention needs and does not get here, in words."""
        if self.sinks and not kind.takes_sinks:
            return "a model without attention sinks"
        if self.context > 1 and not kind.shares_tokens:
            return "mesh.context=1"
        if self.compute_dtype is None or self.head_dim is None:
            return None
        of = self.compute_dtype, self.head_dim, self.row_tokens
        return next((need for need, fulfilled in kind.needs if not fulfilled(*of)), None)


UNKNOWN = Asked()


def attention_name(name: str, platform: str, asked: Asked = UNKNOWN) -> str:
    """The kind of that name, or with `auto` the one that is best on the platform: cpu, gpu or tpu.

    Raises ValueError for an unknown name, or one that is not for the platform.
    """
    check_attention_name(name)
    if name == "auto":
        tokens = asked.row_tokens or USUAL
        kinds = (kind for kind in ATTENTIONS if platform in ATTENTIONS[kind].auto)
        fit = (kind for kind in kinds if tokens > ATTENTIONS[kind].beyond and asked.lacks(ATTENTIONS[kind]) is None)
        return next(fit, "dense")
    platforms = ATTENTIONS[name].platforms
    if platforms and platform not in platforms:
        raise ValueError(f"model.attention={name} is for {', '.join(platforms)}, but this is {platform}; use auto.")
    return name


def attention_kind(name: str, platform: str, asked: Asked = UNKNOWN) -> AttentionKind:
    """The entry of what `attention_name` names."""
    return ATTENTIONS[attention_name(name, platform, asked)]


def check_attention_name(name: str) -> None:
    """Raise ValueError for a name that no kind has."""
    if name != "auto" and name not in ATTENTIONS:
        raise ValueError(f"model.attention={name} is not known; use auto or one of {', '.join(ATTENTIONS)}.")


def check_attention(name: str, platform: str, asked: Asked) -> None:
    """Raise ValueError where the kind of that name cannot do what is asked of it."""
    kind = attention_kind(name, platform, asked)
    if asked.softcap is not None and not kind.caps:
        raise ValueError(
            f"model.attention={name} cannot cap attention scores, and this model's are capped at {asked.softcap}; use "
            "model.attention=auto."
        )
    if (need := asked.lacks(kind)) is not None:
        raise ValueError(
            f"model.attention={name} needs {need}; here model.compute_dtype={asked.compute_dtype}, the head dimension "
            f"is {asked.head_dim} and batch.row_tokens={asked.row_tokens}. Change that, or use model.attention=auto."
        )


def make_attention(
    name: str, platform: str, ids: TokenIds, windows: Windows, split: Split, asked: Asked = UNKNOWN
) -> Attend:
    """The attention of a batch, of the kind that attention_name names.

    Args:
        ids: striped where devices share a row's tokens.
        windows: the distinct sliding windows of the layers, None for all positions.
        asked: the row's tokens are those of the ids.
    """
    asked = asked._replace(row_tokens=ids.segment_ids.shape[1], context=split.share.context)
    ids = TokenIds(*map(split.share.shards.in_order, ids))
    return attention_kind(name, platform, asked).make(ids, windows, split, asked.softcap)
