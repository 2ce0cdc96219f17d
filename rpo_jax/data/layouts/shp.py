"""stanfordnlp/SHP: a Reddit post and two of its comments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rpo_jax.core.records import Message
from rpo_jax.data.faults import shown
from rpo_jax.data.layouts.layout import Layout, Parts, Unusable, field, pair, per_row, text_field


def parse(values: Mapping[str, Any]) -> Parts:
    """The post is a user turn; `labels` is 1 where comment A is preferred, 0 where B is. Text as it is."""
    first, second = text_field(values, "human_ref_A"), text_field(values, "human_ref_B")
    label = field(values, "labels")
    if not isinstance(label, int) or label not in (0, 1):
        raise Unusable(f"column 'labels' is neither 1 (A preferred) nor 0 (B preferred): got {shown(label)}")
    chosen, rejected = (first, second) if label else (second, first)
    return pair((Message("user", text_field(values, "history")),), chosen, rejected)


LAYOUT = Layout(
    read=per_row(parse),
    columns=("history", "human_ref_A", "human_ref_B", "labels"),
    truncation_side="keep_start",  # one long post, whose title and question come first
    description="stanfordnlp/SHP: history, human_ref_A, human_ref_B, labels (1: A preferred)",
)
