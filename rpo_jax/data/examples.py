"""Preference examples from rows: layouts by name or by their columns, faults counted or raised, texts to embed."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rpo_jax.data.layouts import LAYOUTS
from rpo_jax.data.sources import BadRow
from rpo_jax.types import PreferenceExample, Row

_DETECTION_ROWS = 100  # the layout is a vote, so that a broken first row does not hide it


@dataclass(frozen=True)
class ExampleSet:
    """Usable examples in the order of their rows, and the rows that gave none."""

    examples: tuple[PreferenceExample, ...]
    layout: str
    truncation_side: Literal["keep_start", "keep_end"]
    bad: tuple[BadRow, ...]

    @property
    def bad_counts(self) -> dict[str, int]:
        """How many rows could not be used, by kind of fault, the most frequent first."""
        return _count(self.bad)


def make_examples(
    rows: Iterable[Row | BadRow],
    layout: str = "auto",
    on_bad_row: Literal["error", "skip"] = "error",
) -> ExampleSet:
    """Examples of every usable row.

    Args:
        rows: what `sources.read_rows` gave.
        layout: a name in LAYOUTS, or `auto` to go by the columns.
        on_bad_row: `error` raises if any row is unusable, naming the first by file and line; `skip` returns them
            as `bad`.

    Raises ValueError also for an unknown layout, columns that fit none, or where no row is usable.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"data.on_bad_row is '{on_bad_row}'; use 'error' or 'skip'.")
    every = list(rows)
    good = [row for row in every if isinstance(row, Row)]
    bad = [row for row in every if isinstance(row, BadRow)]
    if bad and (on_bad_row == "error" or not good):
        _refuse(bad, len(every), on_bad_row)
    name = detect_layout(good) if layout == "auto" else layout
    if name not in LAYOUTS:
        nearest = difflib.get_close_matches(name, LAYOUTS, n=1, cutoff=0.0)[0]
        raise ValueError(f"data.layout '{name}' is unknown; did you mean '{nearest}'? Known are {', '.join(LAYOUTS)}.")
    examples: list[PreferenceExample] = []
    for outcome in LAYOUTS[name].read(good):
        if isinstance(outcome, BadRow):
            bad.append(outcome)
        else:
            examples.append(outcome)
    place = {row.row_id: position for position, row in enumerate(every)}
    bad.sort(key=lambda row: place[row.row_id])
    if bad and (on_bad_row == "error" or not examples):
        _refuse(bad, len(every), on_bad_row)
    if not examples:
        raise ValueError(
            f"no preference found: none of the {len(every)} rows gave an example in the layout '{name}' "
            f"({LAYOUTS[name].description}); check the data or data.layout."
        )
    return ExampleSet(tuple(examples), name, LAYOUTS[name].truncation_side, tuple(bad))


def _count(bad: Iterable[BadRow]) -> dict[str, int]:
    return dict(Counter(row.reason.partition(":")[0] for row in bad).most_common())


def _refuse(bad: Sequence[BadRow], rows: int, on_bad_row: str) -> None:
    counts = ", ".join(f"{reason}: {count}" for reason, count in _count(bad).items())
    advice = (
        "fix them, or set data.on_bad_row: skip to leave them out"
        if on_bad_row == "error"
        else "none is left, so check the data or data.layout"
    )
    raise ValueError(
        f"{bad[0].row_id}: {bad[0].reason}. {len(bad)} of {rows} rows cannot be used ({counts}); {advice}."
    )


def detect_layout(rows: Sequence[Row]) -> str:
    """The layout whose columns the rows have; where several fit, the one that asks for more.

    Raises ValueError, listing the columns found and those each layout needs, where none fits or two fit equally.
    """
    votes = Counter(tuple(_fitting(row)) for row in rows[:_DETECTION_ROWS])
    votes.pop((), None)
    if votes:
        names = votes.most_common(1)[0][0]
        if len(names) == 1:
            return names[0]
        problem = f"fit the layouts {' and '.join(names)} alike"
    else:
        problem = "fit no layout"
    columns = ", ".join(dict.fromkeys(str(name) for row in rows[:_DETECTION_ROWS] for name in row.values))
    needs = "; ".join(f"{name}: {', '.join(layout.columns)}" for name, layout in LAYOUTS.items())
    where = f"{rows[0].file}: " if rows else ""
    raise ValueError(
        f"{where}the columns ({columns or 'none'}) {problem}; set data.layout, or rename the columns. "
        f"Layouts and the columns they need: {needs}."
    )


def _fitting(row: Row) -> list[str]:
    fits = {
        name: (set(layout.columns), layout.recognise is not None)
        for name, layout in LAYOUTS.items()
        if set(layout.columns) <= set(row.values) and (layout.recognise is None or layout.recognise(row.values))
    }
    # Recognised by its values says more than the same columns alone.
    return [
        name
        for name, (columns, recognised) in fits.items()
        if not any(columns < other or (columns == other and recognised < also) for other, also in fits.values())
    ]


def prompt_text(example: PreferenceExample) -> str:
    """The whole prompt as text: a string as it is, messages as "role: content" with blank lines between."""
    if isinstance(example.prompt, str):
        return example.prompt
    return "\n\n".join(f"{message.role}: {message.content}" for message in example.prompt)


def embedding_text(
    example: PreferenceExample, kind: Literal["prompt", "prompt_response", "last_turn"], response: str
) -> str:
    """The untruncated text that the sentence encoder reads for one response.

    Args:
        kind: `prompt` is `prompt_text`; `prompt_response` adds the response after a blank line (arXiv 2402.10958,
            Table 6); `last_turn` is the last user message alone, or the whole of a string prompt.
        response: the response in question; used by `prompt_response` only.
    """
    if kind == "prompt_response":
        answer = response if isinstance(example.prompt, str) else f"assistant: {response}"
        return f"{prompt_text(example)}\n\n{answer}"
    if kind == "last_turn" and not isinstance(example.prompt, str):
        return example.prompt[-1].content
    return prompt_text(example)
