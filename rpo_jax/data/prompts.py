"""Prompts alone, to be answered: lines of text, rows of prompts, messages or questions, or preferences."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rpo_jax.core.records import Message, PreferenceExample, Response, Row
from rpo_jax.data.examples import columns_of, fitting_layouts, make_examples
from rpo_jax.data.faults import BadRow, plain
from rpo_jax.data.layouts.conditions import ASKED, PROMPT, prompt_field
from rpo_jax.data.layouts.fields import Fields, field
from rpo_jax.data.layouts.layout import Layout, per_row
from rpo_jax.data.layouts.messages import messages_field
from rpo_jax.data.layouts.parts import Parts
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


def read_prompts(
    path: str | Path,
    *,
    split: str = "train",
    layout: str = "auto",
    columns: Mapping[str, str] | None = None,
    usual_columns: Mapping[str, str] | None = None,
    ignore_columns: Collection[str] = (),
) -> PromptSet:
    """The prompts of a source, in its order.

    Args:
        path: a .txt file with a prompt a line, or what data.path may be. Rows hold `prompt` (text, or messages),
            `question`, `query`, `instruction` (and `input`), `messages` (whose last turn is left out where it is the
            assistant's), with `system`, `tools` and so on beside them, or preferences in a layout of
            rpo_jax.data.examples.
        split: as for read_rows.
        layout: as for make_examples, for rows of preferences.
        columns: as for make_examples, and so is `ignore_columns`.
        usual_columns: without `columns`, those of these that rows have.

    Raises ValueError for a source that cannot be read or is empty, and for the first row that holds no prompt.
    """
    if Path(path).suffix.lower() == TEXT_SUFFIX:
        return PromptSet(tuple(_lines(Path(path).expanduser())), "keep_end")
    rows: list[Row] = []
    for row in read_rows(path, split=split):
        if isinstance(row, BadRow):
            raise ValueError(f"{row.row_id}: {row.reason}; mend the row, or leave it out.")
        rows.append(row)
    if columns is None:
        held = {column for row in rows for column in row.values}
        columns = {name: column for name, column in (usual_columns or {}).items() if column in held}
    fields = [_PROMPTS.fields(row.values, columns, ignore_columns) for row in rows]
    if _holds_prompt(fields[0]):
        outcomes = _PROMPTS.read(row._replace(values=values) for row, values in zip(rows, fields, strict=True))
        return PromptSet(tuple(map(_prompt_row, outcomes, rows)), _PROMPTS.truncation_side)
    if (
        layout == "auto"
        and PROMPT not in columns
        and not any(fitting_layouts(row, columns, ignore_columns) for row in rows)
    ):
        names = [name for row in rows for name in row.values]
        column = plain(json.dumps(names[0] if names else "question"))
        raise ValueError(
            f"{rows[0].file}: no column is known to hold a prompt (the columns are {columns_of(rows)}); say which one "
            f"does: --columns '{{\"prompt\": {column}}}', in a configuration data.columns: {{prompt: {column}}}."
        )
    pairs = make_examples(rows, layout, "skip", columns=columns, ignore_columns=ignore_columns)
    if pairs.faults:
        raise ValueError(f"{pairs.faults.first.row_id}: {pairs.faults.first.reason}; mend the row, or leave it out.")
    by_id = {row.row_id: row for row in rows}
    examples = (_prompt_row(example, by_id[example.row_id]) for example in pairs.examples)
    return PromptSet(tuple(examples), pairs.truncation_side)


def _lines(path: Path) -> list[PromptRow]:
    try:
        # Not splitlines, which takes form feeds and Unicode's separators for ends of lines too.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}; give a file with a prompt a line.") from None
    rows = [PromptRow(f"{path}:{n}", line, {}) for n, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} is empty: it holds no prompts; give a file with a prompt a line.")
    return rows


def _holds_prompt(values: Fields) -> bool:
    """Whether a row is a prompt and no preference."""
    return not any(name in values for name in ("chosen", "rejected", "completion")) and any(
        name in values for name in _PROMPTS.prompt
    )


def _prompt_row(outcome: PreferenceExample | BadRow, row: Row) -> PromptRow:
    if isinstance(outcome, BadRow):
        raise ValueError(f"{outcome.row_id}: {outcome.reason}; mend the row, or leave it out.")
    return PromptRow(outcome.row_id, outcome.prompt, row.values, outcome.template_arguments)


def _parse(values: Fields) -> Parts:
    prompt = prompt_field(values)
    if prompt is None and "messages" in values:
        prompt = messages_field(values, "messages")
        prompt = prompt[:-1] if prompt[-1:] and prompt[-1].role == "assistant" else prompt
    # A response stands in: what makes a prompt unusable is the same as in any example.
    stand_in = (Response("chosen", "none yet"),)
    return Parts(field(values, PROMPT) if prompt is None else prompt, stand_in, prefilled=True)


_PROMPTS = Layout(
    read=per_row(_parse),
    columns=(),
    description="prompts alone",
    prompt=(PROMPT, *ASKED, "messages"),
    aliases={"messages": ("conversations", "conversation")},
)
