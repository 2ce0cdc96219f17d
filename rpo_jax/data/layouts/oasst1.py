"""OpenAssistant/oasst1: one message a row, which form trees; annotators ranked the replies to a message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rpo_jax.core.records import Message, PreferenceExample, Row
from rpo_jax.data.faults import BadRow, shown
from rpo_jax.data.layouts.fields import Unusable, is_blank, number_field, text_field
from rpo_jax.data.layouts.layout import Layout
from rpo_jax.data.layouts.messages import ROLES
from rpo_jax.data.layouts.parts import finish, pair


class _Node(NamedTuple):
    row_id: str
    parent: str | None
    role: str
    text: str
    rank: float | None


def read(rows: Iterable[Row]) -> Iterator[PreferenceExample | BadRow]:
    """Each message's best ranked assistant reply (rank 0) against every other ranked one, worst last.

    The prompt is the path from the tree's root; text as it is. An example carries the row of its rejected reply.
    Unranked and deleted replies make no pair.
    """
    nodes: dict[str, _Node] = {}
    for row in rows:
        try:
            key, node = _node(row)
            if key in nodes:
                raise Unusable("the message_id occurs twice")
            nodes[key] = node
        except Unusable as reason:
            yield BadRow(row.row_id, str(reason))
    replies: dict[str, list[tuple[float, _Node]]] = {}
    for node in nodes.values():
        if node.role == "assistant" and node.parent is not None and node.rank is not None:
            replies.setdefault(node.parent, []).append((node.rank, node))
    for parent, siblings in replies.items():
        (best_rank, best), *others = sorted(siblings, key=lambda reply: reply[0])
        for rank, other in others:
            try:
                if rank == best_rank:
                    raise Unusable("the reply shares the best rank with another")
                yield finish(other.row_id, pair(_path(nodes, parent), best.text, other.text))
            except Unusable as reason:
                yield BadRow(other.row_id, str(reason))


def _node(row: Row) -> tuple[str, _Node]:
    values = row.values
    parent = None if "parent_id" in values and is_blank(values["parent_id"]) else text_field(values, "parent_id")
    role = text_field(values, "role")
    if role not in ROLES:
        raise Unusable(f"column 'role' has an unknown role: {shown(role)}")
    rank = values.get("rank")
    null = is_blank(rank) or rank != rank  # NaN, where pandas wrote the file
    deleted = values.get("deleted") and str(values["deleted"]).lower() not in ("false", "0")  # the text of a CSV file
    ranked = None if null or deleted else number_field(values, "rank")
    return text_field(values, "message_id"), _Node(row.row_id, parent, ROLES[role], text_field(values, "text"), ranked)


def _path(nodes: dict[str, _Node], key: str) -> tuple[Message, ...]:
    path: list[Message] = []
    parent: str | None = key
    while parent is not None:
        if parent not in nodes:
            raise Unusable("no shared prompt: an earlier message of the tree is missing")
        if len(path) > len(nodes):
            raise Unusable("no shared prompt: the messages' parents form a circle")
        node = nodes[parent]
        path.append(Message(node.role, node.text))
        parent = node.parent
    return tuple(reversed(path))


LAYOUT = Layout(
    read=read,
    columns=("message_id", "parent_id", "text", "role", "rank"),
    description="OpenAssistant/oasst1: one message a row; the best ranked reply against every other ranked one",
    prompt=("text",),
    joins_rows=True,
)
