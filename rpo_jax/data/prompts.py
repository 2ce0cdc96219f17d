"""Prompts alone, to be answered: lines of text, rows of prompts, messages or instructions, or preferences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rpo_jax.core.records import Message, Response, Row
from rpo_jax.data.examples import make_examples
from rpo_jax.data.faults import BadRow
from rpo_jax.data.layouts.layout import Parts, Unusable, finish, messages_field, prompt_field, text_field
from rpo_jax.data.sources import read_rows

TEXT_SUFFIX = ".txt"


@dataclass(frozen=True)
class PromptRow:
    """A prompt, as PreferenceExample has it, the place it came from, and all that stood there."""

    row_id: str
    prompt: str | tuple[Message, ...]
    values: Mapping[str, Any]
    template_arguments: str = ""


@dataclass(frozen=True)
class PromptSet:
    rows: tuple[PromptRow, ...]
    truncation_side: Literal["keep_start", "keep_end"]


def read_prompts(path: str | Path, *, split: str = "train", layout: str = "auto") -> PromptSet:
    """The prompts of a source, in its order.

    Args:
        path: a .txt file with a prompt a line, or what data.path may be. Rows hold `prompt` (text, or messages),
            `messages` (whose last turn is left out where it is the assistant's), `instruction` (and `input`), or
            preferences in a layout of rpo_jax.data.examples.
        split: as for read_rows.
        layout: as for make_examples, for rows of preferences.

    Raises ValueError for a source that cannot be read or is empty, and for the first row that holds no prompt.
    """
    if Path(path).suffix.lower() == TEXT_SUFFIX:
        return PromptSet(tuple(_lines(Path(path).expanduser())), "keep_end")
    rows: list[Row] = []
    for row in read_rows(path, split=split):
        if isinstance(row, BadRow):
            raise ValueError(f"{row.row_id}: {row.reason}; mend the row, or leave it out.")
        rows.append(row)
    if not _holds_prompts(rows[0].values):
        found = make_examples(rows, layout)
        by_id = {row.row_id: row.values for row in rows}
        examples = (PromptRow(one.row_id, one.prompt, by_id.get(one.row_id, {})) for one in found.examples)
        return PromptSet(tuple(examples), found.truncation_side)
    return PromptSet(tuple(map(_prompt_row, rows)), "keep_end")


def _lines(path: Path) -> list[PromptRow]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}; give a file with a prompt a line.") from None
    found = [PromptRow(f"{path}:{n}", line, {}) for n, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise ValueError(f"{path} is empty: it holds no prompts; give a file with a prompt a line.")
    return found


def _holds_prompts(values: Mapping[str, Any]) -> bool:
    """Whether a row is a prompt and no preference."""
    return not {"chosen", "rejected", "completion"} & set(values) and any(name in values for name in _READERS)


def _prompt_row(row: Row) -> PromptRow:
    try:
        name = next((name for name in _READERS if name in row.values), "prompt")
        prompt = _READERS[name](row.values)
        # A response stands in: what makes a prompt unusable is the same as in any example.
        finish(row.row_id, Parts(prompt, (Response("chosen", "none yet"),)))
    except Unusable as reason:
        raise ValueError(f"{row.row_id}: {reason}; mend the row, or leave it out.") from None
    return PromptRow(row.row_id, prompt, row.values)


def _read_messages(values: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = messages_field(values, "messages")
    return messages[:-1] if messages and messages[-1].role == "assistant" else messages


def _read_instruction(values: Mapping[str, Any]) -> tuple[Message, ...]:
    parts = [text_field(values, "instruction"), text_field(values, "input") if values.get("input") else ""]
    return (Message("user", "\n\n".join(part for part in parts if part)),)


_READERS = {"prompt": prompt_field, "messages": _read_messages, "instruction": _read_instruction}
