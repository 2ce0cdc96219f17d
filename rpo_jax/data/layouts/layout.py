"""What a dataset layout is, and the readers of fields that layouts share.

A layout turns rows into examples. Its readers raise `Unusable` with a reason whose words before the first colon
name the kind of fault; `finish` applies the checks that hold whatever the layout.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rpo_jax.core.records import Message, PreferenceExample, Response, Row
from rpo_jax.data.faults import BadRow, shown

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class Unusable(Exception):
    """Why a row cannot become an example."""


class Parts(NamedTuple):
    """What a layout finds in a row."""

    prompt: str | tuple[Message, ...]
    responses: tuple[Response, ...]
    template_arguments: str = ""


def pair(prompt: str | tuple[Message, ...], chosen: str, rejected: str) -> Parts:
    """A prompt with one response of each kind."""
    return Parts(prompt, (Response("chosen", chosen), Response("rejected", rejected)))


Reader = Callable[[Iterable[Row]], Iterable[PreferenceExample | BadRow]]


@dataclass(frozen=True)
class Layout:
    """One way of storing preferences.

    Args:
        read: every row of the source to examples, or to the reasons why not.
        columns: columns that a row must have.
        truncation_side: which end of a long prompt survives unless the configuration says otherwise.
        description: the data sets that use it, in one line.
        recognise: tells it, by a row's values, from another layout with the same columns.
        joins_rows: an example is made of several rows, so whoever makes one reads all.
    """

    read: Reader
    columns: tuple[str, ...]
    truncation_side: Literal["keep_start", "keep_end"]
    description: str
    recognise: Callable[[Mapping[str, Any]], bool] | None = None
    joins_rows: bool = False


def per_row(parse: Callable[[Mapping[str, Any]], Parts]) -> Reader:
    """A layout's reader from a function of one row's values."""

    def read(rows: Iterable[Row]) -> Iterator[PreferenceExample | BadRow]:
        for row in rows:
            try:
                yield finish(row.row_id, parse(row.values))
            except Unusable as reason:
                yield BadRow(row.row_id, str(reason))

    return read


def finish(row_id: str, parts: Parts) -> PreferenceExample:
    """The example made of `parts`; Unusable for what no training can use."""
    prompt = parts.prompt
    if isinstance(prompt, tuple) and (not prompt or prompt[-1].role != "user"):
        last = prompt[-1].role if prompt else "nothing"
        raise Unusable(f"prompt does not end with a user turn: it ends with {last}")
    if not (prompt if isinstance(prompt, str) else prompt[-1].content).strip():
        raise Unusable("empty prompt")
    texts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    for response in parts.responses:
        if not response.text.strip():
            raise Unusable(f"empty {response.kind} response")
        texts.append(response.text)
    chosen, rejected = ({one.text for one in parts.responses if one.kind == kind} for kind in ("chosen", "rejected"))
    if chosen & rejected:
        raise Unusable("chosen equals rejected")
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise Unusable(f"not valid unicode text: lone surrogate U+{code:04X}") from None
        if "\0" in text:  # other control characters may be meant; this one ends the text for half of all programs
            raise Unusable("null character: a text holds U+0000")
    return PreferenceExample(row_id, prompt, parts.responses, parts.template_arguments)


def field(values: Mapping[str, Any], name: str) -> Any:
    """A column's value; Unusable where it is missing or null."""
    if name not in values:
        found = ", ".join(map(str, values)) or "none"
        raise Unusable(f"column '{name}' is missing: the row has {found}")
    if values[name] is None:
        raise Unusable(f"column '{name}' is null")
    return values[name]


def number_field(values: Mapping[str, Any], name: str) -> float:
    """A column's finite number."""
    value = field(values, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(name, "a number", value)
    if not math.isfinite(value):
        raise Unusable(f"column '{name}' does not hold a finite number: got {value}")
    return float(value)


def _wrong_type(name: str, expected: str, value: Any) -> Unusable:
    return Unusable(f"column '{name}' does not hold {expected}: got {type(value).__name__}")


def text_field(values: Mapping[str, Any], name: str) -> str:
    """A column's text, as it is."""
    value = field(values, name)
    if not isinstance(value, str):
        raise _wrong_type(name, "text", value)
    return value


def object_field(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A column that holds an object."""
    value = field(values, name)
    if not isinstance(value, Mapping):
        raise _wrong_type(name, "an object", value)
    return value


def list_field(values: Mapping[str, Any], name: str) -> list[Any]:
    """A column that holds a list."""
    value = field(values, name)
    if not isinstance(value, list):
        raise _wrong_type(name, "a list", value)
    return value


def messages_field(values: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    """A column's conversation: a list of messages, or a single message, in `role`/`content` or `from`/`value`."""
    value = field(values, name)
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list):
        raise _wrong_type(name, "messages", value)
    return tuple(_message(item, name) for item in items)


def prompt_field(values: Mapping[str, Any]) -> str | tuple[Message, ...]:
    """The column `prompt`: text as it is, or messages."""
    prompt = field(values, "prompt")
    return prompt if isinstance(prompt, str) else messages_field(values, "prompt")


def as_answered(prompt: str | tuple[Message, ...], response: Any) -> str | tuple[Message, ...]:
    """The prompt of a response column: an assistant's message answers a user's, so a text before it is one."""
    return prompt if isinstance(response, str) or not isinstance(prompt, str) else (Message("user", prompt),)


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise _wrong_type(name, "messages", item)
    # A table that holds both kinds of turn gives every turn the other kind's keys, with nulls.
    role_key, content_key = ("from", "value") if item.get("from") is not None else ("role", "content")
    role, content = item.get(role_key), item.get(content_key)
    if not isinstance(role, str) or role not in ROLES:
        raise Unusable(f"column '{name}' has an unknown role: {shown(role)}, known are {', '.join(ROLES)}")
    if isinstance(content, list):
        content = "".join(_text_part(part, name) for part in content)
    if not isinstance(content, str):
        raise Unusable(f"column '{name}' has a message without text: got {type(content).__name__}")
    return Message(ROLES[role], content)


def _text_part(part: Any, name: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise Unusable(f"column '{name}' has a message part that is not text: {shown(kind)}")


def reply_field(values: Mapping[str, Any], name: str) -> str:
    """A column's response: text as it is, or the content of exactly one assistant message."""
    value = field(values, name)
    if isinstance(value, str):
        return value
    turns = messages_field(values, name)
    if len(turns) != 1 or turns[0].role != "assistant":
        found = ", ".join(turn.role for turn in turns) or "none"
        raise Unusable(f"column '{name}' is not one assistant turn: its roles are {found}")
    return turns[0].content


def common_prefix(first: str, second: str) -> str:
    """The characters that both texts begin with."""
    shorter = range(min(len(first), len(second)))
    # Long transcripts: comparing character by character takes three times as long.
    return first[: bisect.bisect_left(shorter, True, key=lambda n: first[: n + 1] != second[: n + 1])]


def shared_conversation(values: Mapping[str, Any]) -> Parts:
    """Prompt and responses of two conversations that differ in their last turn only."""
    chosen, rejected = messages_field(values, "chosen"), messages_field(values, "rejected")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[-1].role != "assistant":
            raise Unusable(f"column '{name}' does not end with an assistant turn")
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        raise Unusable("no shared prompt: the conversations differ before their last turn, or have no other")
    return pair(chosen[:-1], chosen[-1].content, rejected[-1].content)
