"""Responses from files, paired by their prompts; the subset that is judged, and the order in which a judge sees it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rpo_jax.core.records import Message
from rpo_jax.core.text import printable, well_formed
from rpo_jax.data.examples import make_examples
from rpo_jax.data.sources import BadRow, read_rows
from rpo_jax.tools.judging.comparisons import Comparison, Pair, Prompt, turns

CHOSEN = "chosen"


class PairedResponse(NamedTuple):
    row_id: str  # where the row says that its prompt came from; its own file and line where it does not
    prompt: Prompt
    text: str
    place: str  # file and line, for messages


def read_responses(path: str) -> list[PairedResponse]:
    """Rows with `prompt` (a string or messages) and `response`, as `rpo_jax.generate` writes them.

    Raises ValueError, naming file and row, for what cannot be read, and for a file without rows.
    """
    return [_response(row) for row in read_rows(path)]


def _response(row: Any) -> PairedResponse:
    if isinstance(row, BadRow):
        raise ValueError(f"{row.row_id}: {row.reason}; write the file again.")
    values, place = row.values, row.row_id
    text = values.get("response")
    if not isinstance(text, str):
        raise ValueError(
            f"{place}: 'response' is {_told(values, 'response')}, not a string; give a file of `rpo_jax.generate`, or "
            "one whose rows have 'prompt' and 'response'."
        )
    row_id = values.get("row_id")
    named = isinstance(row_id, str | int)
    return PairedResponse(str(row_id) if named else place, prompt_of(values, place), well_formed(text), place)


def _told(values: Mapping[str, Any], name: str) -> str:
    return f"{type(values[name]).__name__}" if name in values else "missing"


def prompt_of(values: Mapping[str, Any], place: str) -> Prompt:
    """The prompt of a row that `rpo_jax.generate` wrote. Raises ValueError for one that holds none."""
    prompt = values.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return well_formed(prompt)
    if isinstance(prompt, list) and prompt:
        messages = [
            Message(well_formed(message["role"]), well_formed(message["content"]))
            for message in prompt
            if isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ]
        if len(messages) == len(prompt):
            return tuple(messages)
    problem = "empty" if prompt in ("", []) or isinstance(prompt, str) else _told(values, "prompt")
    raise ValueError(
        f"{place}: 'prompt' is {problem}; give a string that is not empty, or messages with role and content."
    )


def read_chosen(
    path: str, *, split: str, layout: str, columns: Mapping[str, str] | None = None
) -> list[PairedResponse]:
    """The chosen responses of a data set, in file order; arguments as rpo_jax.data.examples.make_examples has them."""
    read = make_examples(read_rows(path, split=split), layout=layout, on_bad_row="skip", columns=columns)
    if read.faults:
        raise ValueError(f"{read.faults.first.row_id}: {read.faults.first.reason}; mend the row, or leave it out.")
    return [
        PairedResponse(example.row_id, example.prompt, chosen.text, example.row_id)
        for example in read.examples
        if (chosen := example.first("chosen")) is not None
    ]


def make_pairs(
    a: Sequence[PairedResponse], b: Sequence[PairedResponse], *, b_may_have_more: bool = False
) -> list[Pair]:
    """Both sides' responses to the same prompts, in a's order.

    Prompts are the same where they say the same: a lone user message and a string of its text are, and space around
    a prompt does not count. Of equal prompts the first belongs to the first, the second to the second.

    Raises ValueError with the first prompt of one side that the other does not have. `b_may_have_more` allows those
    of b.
    """
    of_b = dict(zip(_keys(b), b, strict=True))
    keys = _keys(a)
    for position, (key, response) in enumerate(zip(keys, a, strict=True)):
        if key not in of_b:
            other = "" if position >= len(b) or b_may_have_more else f", where there is {_shown(b[position])}"
            raise ValueError(
                f"the prompts do not line up: the first without a partner is {_shown(response)}{other}; judge files "
                "that were generated from the same prompts."
            )
    if len(keys) < len(of_b) and not b_may_have_more:
        known = set(keys)
        extra = next(response for key, response in of_b.items() if key not in known)
        raise ValueError(
            f"the prompts do not line up: {len(a)} responses on one side, {len(b)} on the other; the first without a "
            f"partner is {_shown(extra)}; judge files that were generated from the same prompts."
        )
    return [
        Pair(key, response.row_id, response.prompt, response.text, of_b[key].text)
        for key, response in zip(keys, a, strict=True)
    ]


def _keys(responses: Sequence[PairedResponse]) -> list[str]:
    """One key per response: the prompt as JSON, and its number among equal prompts."""
    seen: dict[str, int] = {}
    keys = []
    for response in responses:
        text = json.dumps([(turn.role, turn.content.strip()) for turn in turns(response.prompt)])
        seen[text] = seen.get(text, -1) + 1
        keys.append(f"{text}#{seen[text]}")
    return keys


def _shown(response: PairedResponse) -> str:
    text = " ".join(turns(response.prompt)[-1].content.split())
    return printable(f"{response.place} ({text[:60] + '...' if len(text) > 60 else text!r})")


def sample(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """At most `count` pairs drawn by seed, in their old order; a smaller sample is part of every larger one."""
    drawn = set(sorted(range(len(pairs)), key=lambda index: _hash(seed, "sample", pairs[index].key))[:count])
    return [pair for index, pair in enumerate(pairs) if index in drawn]


def comparisons(pairs: Sequence[Pair], seed: int, *, both_orders: bool) -> list[Comparison]:
    """Each pair in an order drawn by seed and prompt alone, so that other pairs do not change it; or in both."""
    made = []
    for pair in pairs:
        a_first = _hash(seed, "order", pair.key)[0] % 2 == 0
        made.append(Comparison(pair, a_first))
        if both_orders:
            made.append(Comparison(pair, not a_first))
    return made


def _hash(seed: int, use: str, key: str) -> bytes:
    return hashlib.sha256(f"{seed}:{use}:{key}".encode()).digest()
