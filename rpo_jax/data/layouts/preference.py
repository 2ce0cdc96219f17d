"""TRL's preference layout: prompt, chosen, rejected, each text or messages; the prompt may be implicit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rpo_jax.core.records import Message
from rpo_jax.data.layouts.layout import (
    Layout,
    Parts,
    Unusable,
    as_answered,
    common_prefix,
    field,
    pair,
    per_row,
    prompt_field,
    reply_field,
    shared_conversation,
    text_field,
)

_LAST_WORD = re.compile(r"\s+\S*\Z")


def parse(values: Mapping[str, Any]) -> Parts:
    """Prompt, chosen and rejected of one row; all text is kept as it is.

    Without a `prompt` column, the prompt is what both responses begin with: all turns but the last, or whole
    words, the space before the responses staying with them.
    """
    if "prompt" not in values:
        if isinstance(field(values, "chosen"), str):
            return _shared_words(text_field(values, "chosen"), text_field(values, "rejected"))
        return shared_conversation(values)
    prompt = prompt_field(values)
    if _is_longer_conversation(values):
        parts = shared_conversation(values)
        if not _repeats(prompt, parts.prompt):
            raise Unusable("no shared prompt: the column 'prompt' is not what both conversations begin with")
        return parts
    chosen, rejected = reply_field(values, "chosen"), reply_field(values, "rejected")
    return pair(as_answered(prompt, values["chosen"]), chosen, rejected)


def _is_longer_conversation(values: Mapping[str, Any]) -> bool:
    chosen = values.get("chosen")
    return isinstance(chosen, list) and len(chosen) > 1


def _repeats(prompt: str | tuple[Message, ...], shared: str | tuple[Message, ...]) -> bool:
    if isinstance(prompt, str):
        return any(prompt == message.content for message in shared if isinstance(message, Message))
    return prompt == shared[: len(prompt)]


def _shared_words(chosen: str, rejected: str) -> Parts:
    cut = len(common_prefix(chosen, rejected))
    at_word_end = chosen[cut : cut + 1].isspace() and rejected[cut : cut + 1].isspace()
    if not at_word_end:
        last_word = _LAST_WORD.search(chosen[:cut])
        cut = last_word.start() if last_word else 0
    if not chosen[:cut].strip():
        raise Unusable("no shared prompt: chosen and rejected do not begin with the same words")
    return pair(chosen[:cut], chosen[cut:], rejected[cut:])


LAYOUT = Layout(
    read=per_row(parse),
    columns=("chosen", "rejected"),
    truncation_side="keep_end",
    description="TRL preference data: prompt, chosen, rejected as text or messages; the prompt may be implicit",
)
