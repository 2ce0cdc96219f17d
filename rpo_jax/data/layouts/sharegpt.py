"""ShareGPT preference data: a conversation in `from`/`value` turns and two answers to it."""

from __future__ import annotations

from rpo_jax.data.layouts.conditions import ASKED, PROMPT
from rpo_jax.data.layouts.fields import Fields, Unusable
from rpo_jax.data.layouts.layout import Layout, per_row
from rpo_jax.data.layouts.messages import messages_field, text_or_messages
from rpo_jax.data.layouts.parts import Parts, answered

_KINDS = ("chosen", "rejected")


def parse(values: Fields) -> Parts:
    """The conversation and its two answers; text as it is."""
    prompt = messages_field(values, "conversations")
    answers = {name: text_or_messages(values, name) for name in _KINDS}
    return answered(prompt, answers, _KINDS)._replace(prefilled=False)


def _waits(values: Fields) -> bool:
    """Whether the conversation is under its own name, or is there for its answers and no copy of one of them."""
    if not values.is_named("conversations"):
        return True
    try:
        turns = messages_field(values, "conversations")
    except Unusable:
        return False
    return not any(name in values for name in (PROMPT, *ASKED)) and turns[-1:] != () and turns[-1].role != "assistant"


LAYOUT = Layout(
    read=per_row(parse),
    columns=("conversations", "chosen", "rejected"),
    description="ShareGPT preference data (LLaMA-Factory): conversations, chosen and rejected as from/value turns",
    prompt=("conversations",),
    aliases={"conversations": ("messages", "conversation")},
    recognise=_waits,
)
