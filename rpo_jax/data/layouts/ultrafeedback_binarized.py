"""HuggingFaceH4/ultrafeedback_binarized: whole conversations, with the prompt repeated in a column."""

from __future__ import annotations

from rpo_jax.data.layouts.fields import Fields
from rpo_jax.data.layouts.layout import Layout, per_row
from rpo_jax.data.layouts.messages import messages_field
from rpo_jax.data.layouts.parts import Parts, shared_conversation

_KINDS = ("chosen", "rejected")


def parse(values: Fields) -> Parts:
    """The conversations hold the prompt; the column repeats its text without the roles."""
    return shared_conversation({name: messages_field(values, name) for name in _KINDS}, _KINDS)


def _has_conversations(values: Fields) -> bool:
    """Texts and single turns beside a prompt with an id are ordinary pairs."""
    return all(isinstance(values[name], list) and len(values[name]) > 1 for name in _KINDS)


LAYOUT = Layout(
    read=per_row(parse),
    columns=("prompt", "prompt_id", "chosen", "rejected"),
    description="HuggingFaceH4/ultrafeedback_binarized: chosen and rejected conversations that share their prompt",
    recognise=_has_conversations,
)
