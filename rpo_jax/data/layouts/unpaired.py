"""TRL's unpaired preference layout: prompt, completion, label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rpo_jax.core.records import Response
from rpo_jax.data.faults import shown
from rpo_jax.data.layouts.layout import Layout, Parts, Unusable, as_answered, field, per_row, prompt_field, reply_field


def parse(values: Mapping[str, Any]) -> Parts:
    """A chosen response where `label` is true or 1, a rejected one where it is false or 0; text as it is."""
    prompt = prompt_field(values)
    completion = reply_field(values, "completion")
    label = field(values, "label")
    if not isinstance(label, bool | int) or label not in (0, 1):
        raise Unusable(f"column 'label' is neither true nor false: got {shown(label)}")
    return Parts(as_answered(prompt, values["completion"]), (Response("chosen" if label else "rejected", completion),))


LAYOUT = Layout(
    read=per_row(parse),
    columns=("prompt", "completion", "label"),
    truncation_side="keep_end",
    description="TRL unpaired preference data: prompt, completion, label (true or false)",
)
