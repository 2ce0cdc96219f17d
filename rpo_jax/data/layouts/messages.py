"""Conversations in the forms that files have them: roles, contents, and what else a chat template reads of a turn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rpo_jax.core.records import Message
from rpo_jax.data.csv_rows import Cell
from rpo_jax.data.faults import shown
from rpo_jax.data.layouts.fields import Unusable, field, is_blank, is_metadata, json_text, parsed, wrong_type

# To the names that chat templates know.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_KEYS = {"role", "content", "from", "value"}
_TEMPLATE_FIELDS = {"name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking"}
_PYTHON = re.compile(r"\s*\[?\s*\{\s*'(role|content|from|value)'")  # how pandas writes lists into CSV files


def messages_field(values: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    """A column's conversation: a list of messages, or a single message, in `role`/`content` or `from`/`value`."""
    value = field(values, name)
    if isinstance(value, Cell):
        value = parsed(value)
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list):
        raise wrong_type(name, "messages", value)
    return tuple(_message(item, name) for item in items)


def text_or_messages(values: Mapping[str, Any], name: str) -> str | tuple[Message, ...]:
    """A column's text, as it is, or its conversation; a cell of a CSV file is one where it holds one as JSON."""
    value = field(values, name)
    if not isinstance(value, str):
        return messages_field(values, name)
    if isinstance(value, Cell):
        content = parsed(value)
        items = content if isinstance(content, list) else [content]
        if items and all(isinstance(item, Mapping) and {"role", "from"} & set(item) for item in items):
            return messages_field(values, name)
        if _PYTHON.match(value):
            raise Unusable(f"column '{name}' has messages as Python prints them: write them with json.dumps")
    return str(value)


def spoken(message: Message) -> str:
    """A turn's content, and what else it has, as one text."""
    return "\n".join(part for part in (message.content, message.more) if part)


def turns_text(turns: Sequence[Message]) -> str:
    """Turns as "role: content" with blank lines between."""
    return "\n\n".join(f"{message.role}: {spoken(message)}" for message in turns)


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise wrong_type(name, "messages", item)
    # A table that holds both kinds of turn gives every turn the other kind's keys, with nulls.
    role_key, content_key = ("from", "value") if item.get("from") is not None else ("role", "content")
    role, content = item.get(role_key), item.get(content_key)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Unusable(f"column '{name}' has an unknown role: {shown(role)}, known are {', '.join(ROLES)}")
    more = {key: value for key, value in item.items() if key not in _KEYS and _is_read(key, value)}
    if media := next((key for key in MEDIA if key in more), None):
        raise Unusable(f"column '{name}' has a message part that is not text: {shown(media)}")
    if role.lower() == "function_call":
        more["tool_calls"], content = _calls(content, name), ""
    elif "function_call" in more:
        more["tool_calls"] = _calls(more.pop("function_call"), name)
    if content is None and "tool_calls" in more:
        content = ""
    if isinstance(content, list):
        content = "".join(_text_part(part, name) for part in content)
    if not isinstance(content, str):
        raise Unusable(f"column '{name}' has a message without text: got {type(content).__name__}")
    return Message(ROLES[role.lower()], content, json_text(dict(sorted(more.items())), name) if more else "")


def _is_read(key: Any, value: Any) -> bool:
    """Whether a template may read this field of a message: not what says something about the text."""
    if not isinstance(key, str) or value is None or value in ([], {}):
        return False
    return key in _TEMPLATE_FIELDS or key in MEDIA or not is_metadata(key, value)


def _calls(content: Any, name: str) -> list[dict[str, Any]]:
    """The calls of functions that a turn is: an object with name and arguments, or a list of them, as JSON or not."""
    content = parsed(content)
    calls = content if isinstance(content, list) else [content]
    if is_blank(calls) or not all(isinstance(call, Mapping) and {"name", "arguments"} <= set(call) for call in calls):
        raise Unusable(f"column '{name}' has a function_call that is no JSON object with name and arguments")
    return [{"type": "function", "function": dict(call)} for call in calls]


def _text_part(part: Any, name: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise Unusable(f"column '{name}' has a message part that is not text: {shown(kind)}")
