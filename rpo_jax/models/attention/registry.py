"""The table of attentions, and the choice among them for a platform."""

from __future__ import annotations

from rpo_jax.models.attention.kind import Attend, AttentionKind, Split, Windows
from rpo_jax.models.attention.masking import TokenIds
from rpo_jax.models.discovery import discovered

ATTENTIONS: dict[str, AttentionKind] = discovered("rpo_jax.models.attention", "KIND")
SHORT = 128  # tokens; rows up to this are one or two blocks: nothing to skip


def attention_name(name: str, platform: str, sinks: bool = False) -> str:
    """The kind of that name, or with `auto` the one that is best on the platform: cpu, gpu or tpu.

    Args:
        sinks: whether it must take some.

    Raises ValueError for an unknown name, or one that is not for the platform.
    """
    check_attention_name(name)
    if name == "auto":
        able = {found: kind for found, kind in ATTENTIONS.items() if kind.takes_sinks or not sinks}
        return next((found for found, kind in able.items() if platform in kind.auto), "dense")
    platforms = ATTENTIONS[name].platforms
    if platforms and platform not in platforms:
        raise ValueError(f"model.attention={name} is for {', '.join(platforms)}, but this is {platform}; use auto.")
    return name


def attention_kind(name: str, platform: str, sinks: bool = False) -> AttentionKind:
    """The entry of what `attention_name` names."""
    return ATTENTIONS[attention_name(name, platform, sinks)]


def check_attention_name(name: str) -> None:
    """Raise ValueError for a name that no kind has."""
    if name != "auto" and name not in ATTENTIONS:
        raise ValueError(f"model.attention={name} is not known; use auto or one of {', '.join(ATTENTIONS)}.")


def check_attention(
    name: str,
    platform: str,
    compute_dtype: str,
    head_dim: int,
    row_tokens: int | None,
    softcap: float | None = None,
    sinks: bool = False,
) -> None:
    """Raise ValueError where the kind of that name cannot do what is asked of it.

    Args:
        row_tokens: None for multiples of 64.
        softcap: of the model's scores.
        sinks: whether the model has some.
    """
    kind = attention_kind(name, platform, sinks)
    if sinks and not kind.takes_sinks:
        raise ValueError(
            f"model.attention={name} has no attention sinks, and this model does; use model.attention=auto, or one of "
            f"{', '.join(other for other, kind in ATTENTIONS.items() if kind.takes_sinks)}."
        )
    if softcap is not None and not kind.caps:
        raise ValueError(
            f"model.attention={name} cannot cap attention scores, and this model's are capped at {softcap}; use "
            "model.attention=auto."
        )
    for need, fulfilled in kind.needs:
        if not fulfilled(compute_dtype, head_dim, row_tokens):
            raise ValueError(
                f"model.attention={name} needs {need}; here model.compute_dtype={compute_dtype}, the head dimension is "
                f"{head_dim} and batch.row_tokens={row_tokens}. Change that, or use model.attention=auto."
            )


def make_attention(
    name: str,
    platform: str,
    ids: TokenIds,
    windows: Windows,
    split: Split,
    softcap: float | None = None,
    sinks: bool = False,
) -> Attend:
    """The attention of a batch, of the kind that attention_name names.

    Args:
        windows: the distinct sliding windows of the layers, None for all positions.
        softcap: c of c tanh(scores / c); None for the scores as they are.
        sinks: whether it is going to be given some.
    """
    if name == "auto" and ids.segment_ids.shape[1] <= SHORT:
        name = "dense"
    return attention_kind(name, platform, sinks).make(ids, windows, split, softcap)
