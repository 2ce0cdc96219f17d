"""TRL's unpaired preference layout: prompt, completion, label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rpo_jax.core.records import Message, Response
from rpo_jax.data.faults import shown
from rpo_jax.data.layouts.layout import Layout, Parts, Unusable, field, messages_field, per_row, reply_field


def parse(values: Mapping[str, Any]) -> Parts:
    """A chosen response where `label` is true or 1, a rejected one where it is false or 0; text as it is."""
    prompt = field(values, "prompt")
    completion = reply_field(values, "completion")
    label = field(values, "label")
    if not isinstance(label, bool | int) or label not in (0, 1):
        raise Unusable(f"column 'label' is neither true nor false: got {shown(label)}")
    if not isinstance(prompt, str):
        prompt = messages_field(values, "prompt")
    elif not isinstance(values["completion"], str):  # an assistant's message answers a user's
        prompt = (Message("user", prompt),)
    return Parts(prompt, (Response("chosen" if label else "rejected", completion),))


LAYOUT = Layout(
    read=per_row(parse),
    columns=("prompt", "completion", "label"),
    truncation_side="keep_end",
    description="TRL unpaired preference data: prompt, completion, label (true or false)",
)
