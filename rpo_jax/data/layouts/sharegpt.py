"""ShareGPT preference data: a conversation in `from`/`value` turns and two answers to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rpo_jax.core.records import Message
from rpo_jax.data.layouts.layout import Layout, Parts, Unusable, messages_field, pair, per_row, reply_field, text_field


def parse(values: Mapping[str, Any]) -> Parts:
    """The conversation, after the text of an optional `system` column; text as it is."""
    prompt = messages_field(values, "conversations")
    if values.get("system") is not None and (system := text_field(values, "system")).strip():
        if any(message.role == "system" for message in prompt):
            raise Unusable("two system prompts: one in the column 'system', one in 'conversations'")
        prompt = (Message("system", system), *prompt)
    return pair(prompt, reply_field(values, "chosen"), reply_field(values, "rejected"))


LAYOUT = Layout(
    read=per_row(parse),
    columns=("conversations", "chosen", "rejected"),
    truncation_side="keep_end",
    description="ShareGPT preference data (LLaMA-Factory): conversations, chosen and rejected as from/value turns",
)
