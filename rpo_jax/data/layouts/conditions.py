"""Columns beside the prompt on which the answers depend: used, or refused by name, whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any

from rpo_jax.core.records import Message
from rpo_jax.data.layouts.fields import (
    Fields,
    Unusable,
    is_blank,
    is_metadata,
    json_text,
    list_field,
    object_field,
    stand_in,
    text_field,
    texts_in,
)
from rpo_jax.data.layouts.messages import MEDIA, messages_field, spoken, text_or_messages
from rpo_jax.data.layouts.parts import Parts, Prompt

PROMPT = "prompt"
ASKED = ("question", "instruction", "query", "input")  # other names of a prompt, which is then what a user says
ALIASES = {
    "system": ("system_prompt", "system_message", "system_instruction", "system_instructions", "sys_prompt", "System"),
    "history": ("chat_history", "conversation_history"),
}
USED = ("system", "history", "tools", "documents", "chat_template_kwargs")
_REFUSED = (*MEDIA, "functions", "context", "contexts", "passage", "passages", "document")
_INSTRUCTING = ("system", "developer")
_CONDITIONS = (*_REFUSED, *USED, PROMPT, *ASKED)
_KNOWN = {*_CONDITIONS, *chain(*ALIASES.values())}
_RENDERING = (
    "messages",
    "conversation",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
)


def prompt_field(values: Fields) -> Prompt | None:
    """The prompt that a column states; None where there is no such column.

    Of `prompt` a text is used as it is. Under another name of ASKED it is a user's turn; an `instruction` goes before
    its `input`. Unusable where two columns hold different prompts.
    """
    # Which column it is, is settled where the configuration names one.
    names = [PROMPT] if values.is_named(PROMPT) else [name for name in (PROMPT, *ASKED) if name in values]
    first, *others = [name for name in names if not is_blank(values[name])] or names[:1] or [""]
    if not first:
        return None
    prompt = text_or_messages(values, first)
    if isinstance(prompt, str) and first in ASKED:
        if first == "instruction" and others == ["input"]:
            prompt, others = f"{prompt}\n\n{text_field(values, 'input')}", []
        prompt = (Message("user", prompt),)
    for other in others:
        _check_repeats(prompt, f"'{first}'", other, values[other])
    return prompt


def _check_repeats(prompt: Prompt, source: str, other: str, value: Any) -> None:
    """Unusable where another column of a prompt says what the prompt from `source` does not."""
    texts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    if not stand_in(texts_in(value), texts):
        raise Unusable(
            f"column '{other}' may belong to the prompt: that is taken from {source}; say which it is with "
            f"data.columns.prompt, or leave '{other}' out with data.ignore_columns"
        )


def states(prompt: Prompt | None, parts: Parts, values: Fields) -> Parts:
    """Whole conversations beside a prompt, which must be what they begin with, or a turn of it."""
    if not prompt:
        return parts
    shared, asked = parts.prompt, prompt if isinstance(prompt, str) else prompt[-1].content
    contents = [message.content for message in shared if isinstance(message, Message)]
    is_turn = isinstance(prompt, str) or len(prompt) == 1
    if is_turn and not asked.strip():
        return parts
    repeats = prompt == shared[: len(prompt)] or (is_turn and asked in contents)
    if not repeats:
        column = next(name for name in (PROMPT, *ASKED) if not is_blank(values.get(name)))
        raise Unusable(f"no shared prompt: the column '{column}' is not what both conversations begin with")
    return parts._replace(implicit=False)


def conditioned(parts: Parts, values: Fields) -> Parts:
    """What a layout found, with what its columns beside say of the conversation.

    `system` and `history` become turns, `tools`, `documents` and `chat_template_kwargs` what the template is given; a
    text in front of which there are any of them is a user's turn. Unusable for other columns that condition the
    answers, and, where whole conversations hold the prompt, for any that may be of it.
    """
    unread = values.unread()
    names = [name for name in _CONDITIONS if name in unread] if not unread.isdisjoint(_CONDITIONS) else []
    for name in names:
        if name in _REFUSED and not is_blank(values[name]):
            raise Unusable(
                f"column '{name}' conditions the answers and cannot be used: put it into the prompt where it is text, "
                "or leave it out with data.ignore_columns"
            )
    prompt = parts.prompt
    system = text_field(values, "system") if "system" in names else None
    earlier = _history(values) if "history" in names and not is_blank(values["history"]) else ()
    arguments = _template_arguments(values, names) if names else ""
    if isinstance(prompt, str) and (system is not None or earlier or arguments):
        if parts.implicit:
            column = next((name for name in USED if not is_blank(values.get(name))), "system")
            raise Unusable(
                f"column '{column}' stands beside answers without a prompt: name its column with data.columns.prompt"
            )
        prompt = (Message("user", prompt),)
    if earlier and isinstance(prompt, tuple):
        prompt = _after(earlier, prompt)
    if system is not None and system.strip() and isinstance(prompt, tuple):
        prompt = _under(system, prompt)
    for name in names:
        if name in (PROMPT, *ASKED) and not values.is_named(PROMPT):
            _check_repeats(prompt, "the conversation", name, values[name])
    if parts.implicit and not isinstance(parts.prompt, str):
        check_rest(values, [*map(spoken, parts.prompt), *(one.text for one in parts.responses)], is_text=False)
    if not names:
        return parts
    return parts._replace(prompt=prompt, template_arguments=arguments)


def _under(system: str, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    if prompt[:1] and prompt[0].role in _INSTRUCTING:
        if prompt[0].content.strip() != system.strip():
            raise Unusable("two system prompts: one in the column 'system', one in the conversation")
        return prompt
    return (Message("system", system), *prompt)


def _history(values: Fields) -> tuple[Message, ...]:
    """Earlier turns: messages, or pairs of what was asked and answered."""
    pairs = list_field(values, "history")
    if not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair) for pair in pairs):
        return messages_field(values, "history")
    return tuple(Message(*turn) for pair in pairs for turn in zip(("user", "assistant"), pair, strict=True))


def _after(earlier: tuple[Message, ...], prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    start = sum(message.role in _INSTRUCTING for message in prompt[:1])
    if prompt[start : start + len(earlier)] == earlier:
        return prompt
    if len(prompt) != start + 1:
        raise Unusable("column 'history' stands beside a conversation that has earlier turns of its own")
    return (*prompt[:start], *earlier, *prompt[start:])


def _template_arguments(values: Fields, names: Collection[str]) -> str:
    lists: dict[str, Any] = {}
    for name in ("tools", "documents"):
        if name not in names or is_blank(values[name]):
            continue
        items = list_field(values, name)
        if not all(isinstance(item, dict) for item in items):
            raise Unusable(f"column '{name}' does not hold a list of objects")
        if items:
            json_text(lists.setdefault(name, items), name)
    own: dict[str, Any] = {}
    if "chat_template_kwargs" in names and not is_blank(values["chat_template_kwargs"]):
        own = {key: value for key, value in object_field(values, "chat_template_kwargs").items() if value is not None}
        if twice := next((key for key in own if key in lists or key in _RENDERING), None):
            raise Unusable(f"column 'chat_template_kwargs' cannot set '{twice}'")
    return json_text(lists | own, "chat_template_kwargs") if lists or own else ""


def check_rest(values: Fields, texts: Sequence[str], is_text: bool) -> None:
    """Unusable where a column that no one has read may be the prompt that the answers are thought to begin with.

    Args:
        texts: what the answers say, prompt included.
        is_text: whether they have no roles, so that any text may be it.
    """
    for column, value in values.rest().items():
        known = column in _KNOWN or is_metadata(column, value, 1 if is_text else math.inf)
        if not known and not stand_in(texts_in(value), texts):
            raise Unusable(
                f"column '{column}' may belong to the prompt: that is taken from what the answers begin with; name its "
                f"column with data.columns.prompt, or leave '{column}' out with data.ignore_columns"
            )
