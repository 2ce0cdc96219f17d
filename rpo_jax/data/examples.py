"""Preference examples from rows: layouts by name or by their columns, faults counted or raised, texts to embed."""

from __future__ import annotations

import difflib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Literal

from rpo_jax.core.records import PreferenceExample, Row
from rpo_jax.data.faults import BadRow, Faults, plain
from rpo_jax.data.layouts import LAYOUTS
from rpo_jax.data.layouts.layout import Unusable, number_field

_DETECTION_ROWS = 100  # the layout is a vote, so that a broken first row does not hide it


@dataclass(frozen=True)
class ExampleSet:
    """Usable examples in the order of their rows, and the rows that gave none.

    Attributes:
        num_rows: that were read, unusable ones too.
    """

    examples: tuple[PreferenceExample, ...]
    layout: str
    truncation_side: Literal["keep_start", "keep_end"]
    faults: Faults
    num_rows: int


def make_examples(
    rows: Iterable[Row | BadRow],
    layout: str = "auto",
    on_bad_row: Literal["error", "skip"] = "error",
    scores: Mapping[str, str] | None = None,
) -> ExampleSet:
    """Examples of every usable row. What of a row makes no example is not kept, so `rows` may be a stream.

    Args:
        rows: what `sources.read_rows` gives.
        layout: a name in LAYOUTS, or `auto` to go by the columns.
        on_bad_row: `error` raises if any row is unusable, naming the first by file and line, and counting all by
            kind; `skip` leaves them out and returns their counts as `faults`.
        scores: for each kind of response the column with its score; a row that lacks one that it needs is unusable.

    Raises ValueError also for an unknown layout, columns that fit none, scores asked of a layout that makes one example
    of several rows, or where no row is usable.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"data.on_bad_row is '{on_bad_row}'; use 'error' or 'skip'.")
    faults, num_rows = Faults(), 0

    def readable() -> Iterator[Row]:
        nonlocal num_rows
        for row in rows:
            num_rows += 1
            if isinstance(row, Row):
                yield row
            else:
                faults.add(*row)

    stream = readable()
    start = deque(islice(stream, _DETECTION_ROWS))
    name = detect_layout(start) if layout == "auto" and start else layout
    if name not in LAYOUTS and (start or name != "auto"):
        nearest = difflib.get_close_matches(name, LAYOUTS, n=1, cutoff=0.0)[0]
        raise ValueError(f"data.layout '{name}' is unknown; did you mean '{nearest}'? Known are {', '.join(LAYOUTS)}.")
    if scores is not None and start and LAYOUTS[name].joins_rows:
        raise ValueError(
            f"data.layout '{name}' makes an example of several rows, so no row scores its responses; use an objective "
            "without scores, or data with a row for each pair."
        )
    everything = chain((start.popleft() for _ in range(len(start))), stream)  # each given up as it is taken
    examples = []
    for outcome in _read(name, everything, scores) if start else ():
        if isinstance(outcome, PreferenceExample):
            examples.append(outcome)
        else:
            faults.add(*outcome)
    if faults and (on_bad_row == "error" or not examples):
        raise faults.error(
            f"{num_rows} rows cannot be used", on_bad_row, "none is left, so check the data or data.layout"
        )
    if not examples:
        raise ValueError(
            f"no preference found: none of the {num_rows} rows gave an example in the layout '{name}' "
            f"({LAYOUTS[name].description}); check the data or data.layout."
        )
    return ExampleSet(tuple(examples), name, LAYOUTS[name].truncation_side, faults, num_rows)


def _read(layout: str, rows: Iterable[Row], scores: Mapping[str, str] | None) -> Iterator[PreferenceExample | BadRow]:
    read = LAYOUTS[layout].read
    if scores is None:
        yield from read(rows)
        return
    for row in rows:
        for outcome in read([row]):
            yield _scored(outcome, row, scores) if isinstance(outcome, PreferenceExample) else outcome


def _scored(example: PreferenceExample, row: Row, columns: Mapping[str, str]) -> PreferenceExample | BadRow:
    """The example with the scores that its row gives to the responses it has."""
    try:
        responses = [one._replace(score=number_field(row.values, columns[one.kind])) for one in example.responses]
    except Unusable as reason:
        return BadRow(example.row_id, f"{reason} (data.chosen_score and data.rejected_score name the columns)")
    return replace(example, responses=tuple(responses))


def detect_layout(rows: Iterable[Row]) -> str:
    """The layout whose columns the first rows have; where several fit, the one that asks for more.

    Raises ValueError, listing the columns found and those each layout needs, where none fits or two fit equally.
    """
    rows = list(islice(rows, _DETECTION_ROWS))
    votes = Counter(tuple(_fitting(row)) for row in rows)
    votes.pop((), None)
    if votes:
        names = votes.most_common(1)[0][0]
        if len(names) == 1:
            return names[0]
        problem = f"fit the layouts {' and '.join(names)} alike"
    else:
        problem = "fit no layout"
    columns = plain(", ".join(dict.fromkeys(str(name) for row in rows for name in row.values)))
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
