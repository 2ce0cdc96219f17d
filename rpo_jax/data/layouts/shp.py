"""stanfordnlp/SHP: a Reddit post and two of its comments."""

from __future__ import annotations

from rpo_jax.core.records import Message
from rpo_jax.data.layouts.fields import Fields, label_field, text_field
from rpo_jax.data.layouts.layout import Layout, per_row
from rpo_jax.data.layouts.parts import Parts, pair


def parse(values: Fields) -> Parts:
    """The post is a user turn; `labels` is 1 where comment A is preferred, 0 where B is. Text as it is."""
    first, second = text_field(values, "human_ref_A"), text_field(values, "human_ref_B")
    preferred = label_field(values, "labels", "1 (A preferred) nor 0 (B preferred)")
    chosen, rejected = (first, second) if preferred else (second, first)
    return pair((Message("user", text_field(values, "history")),), chosen, rejected)


LAYOUT = Layout(
    read=per_row(parse),
    columns=("history", "human_ref_A", "human_ref_B", "labels"),
    prompt=("history",),
    truncation_side="keep_start",  # one long post, whose title and question come first
    description="stanfordnlp/SHP: history, human_ref_A, human_ref_B, labels (1: A preferred)",
)
