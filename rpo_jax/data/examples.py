"""Preference examples from rows: layouts by name or by their columns, faults counted or raised, texts to embed."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Literal

from rpo_jax.core.records import PreferenceExample, Row
from rpo_jax.data.faults import BadRow, Faults, plain
from rpo_jax.data.layouts import LAYOUTS
from rpo_jax.data.layouts.layout import Unusable, number_field
from rpo_jax.data.share import Reading, Skipped

_DETECTION_ROWS = 100  # the layout is a vote, so that a broken first row does not hide it


@dataclass(frozen=True)
class ExampleSet:
    """Usable examples in the order of their rows, and the rows that gave none.

    Attributes:
        examples: of all processes; None in place of one that another process has.
    """

    examples: tuple[PreferenceExample | None, ...]
    layout: str
    truncation_side: Literal["keep_start", "keep_end"]
    faults: Faults

    @property
    def own(self) -> list[PreferenceExample]:
        """The examples that this process has: all, where it is alone."""
        return [example for example in self.examples if example is not None]


class _Counted:
    """The readable rows of a stream, numbered; the unreadable ones are told to `on_bad`. `count` is of all."""

    def __init__(self, rows: Iterable[Row | BadRow | Skipped], on_bad: Callable[[int, BadRow], None]) -> None:
        self.count = 0
        self._rows, self._on_bad = rows, on_bad

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        for number, row in enumerate(self._rows):
            self.count += 1
            if isinstance(row, Row):
                yield number, row
            elif isinstance(row, BadRow):
                self._on_bad(number, row)


def make_examples(
    rows: Iterable[Row | BadRow | Skipped],
    layout: str = "auto",
    on_bad_row: Literal["error", "skip"] = "error",
    reading: Reading | None = None,
    scores: tuple[str, str] | None = None,
) -> ExampleSet:
    """Examples of every usable row. What of a row makes no example is not kept, so `rows` may be a stream.

    Args:
        rows: what `sources.read_rows` gives.
        layout: a name in LAYOUTS, or `auto` to go by the columns.
        on_bad_row: `error` raises if any row is unusable, naming the first by file and line, and counting all by
            kind; `skip` leaves them out and returns their counts as `faults`.
        reading: what `rows` was given, where several processes share the rows. The result is that of one process,
            but for the examples that others have.
        scores: columns with the scores of chosen and rejected responses; a row that lacks one that it needs is
            unusable.

    Raises ValueError also for an unknown layout, columns that fit none, scores asked of a layout that makes one example
    of several rows, or where no row is usable.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"data.on_bad_row is '{on_bad_row}'; use 'error' or 'skip'.")
    reading = reading or Reading()
    of_all, of_mine = Faults(), Faults()

    def add_fault(number: int, row: BadRow) -> None:
        of_all.add(*row)
        if reading.share.owns(number):
            of_mine.add(*row)

    counted = _Counted(rows, add_fault)
    stream = iter(counted)
    # Every process reads the first rows, so all tell the same layout by them.
    start = list(islice(stream, _DETECTION_ROWS))
    name = detect_layout([row for _, row in start]) if layout == "auto" and start else layout
    if name not in LAYOUTS and (start or name != "auto"):
        nearest = difflib.get_close_matches(name, LAYOUTS, n=1, cutoff=0.0)[0]
        raise ValueError(f"data.layout '{name}' is unknown; did you mean '{nearest}'? Known are {', '.join(LAYOUTS)}.")
    if scores is not None and start and LAYOUTS[name].joins_rows:
        raise ValueError(
            f"data.layout '{name}' makes an example of several rows, so no row scores its responses; use an objective "
            "without scores, or data with a row for each pair."
        )
    reading.everything = not start or LAYOUTS[name].joins_rows
    faults = of_all if reading.everything else of_mine
    numbers: list[int] = []
    examples: list[PreferenceExample | None] = []
    latest: list[Row] = []
    mine = _mine(chain(_emptied(start), stream), reading, numbers, latest)
    for outcome in LAYOUTS[name].read(mine) if start else ():
        if scores is not None and isinstance(outcome, PreferenceExample):
            outcome = _scored(outcome, latest[0], scores)
        if isinstance(outcome, BadRow):
            faults.add(*outcome)
            outcome = None
        examples.append(outcome)
    found, faults = _merged(reading, counted.count, numbers, examples, faults)
    if faults and (on_bad_row == "error" or not found):
        _refuse(faults, counted.count, on_bad_row)
    if not found:
        raise ValueError(
            f"no preference found: none of the {counted.count} rows gave an example in the layout '{name}' "
            f"({LAYOUTS[name].description}); check the data or data.layout."
        )
    return ExampleSet(tuple(found), name, LAYOUTS[name].truncation_side, faults)


def _mine(rows: Iterable[tuple[int, Row]], reading: Reading, numbers: list[int], latest: list[Row]) -> Iterator[Row]:
    """This process's rows; their numbers are appended to `numbers`, and `latest` holds the one that was taken last."""
    for number, row in rows:
        if reading.everything or reading.share.owns(number):
            numbers.append(number)
            latest[:] = [row]
            yield row


def _scored(example: PreferenceExample, row: Row, columns: tuple[str, str]) -> PreferenceExample | BadRow:
    """The example with the scores that its row gives to the responses it has."""
    try:
        chosen, rejected = (
            None if text is None else number_field(row.values, column)
            for text, column in zip((example.chosen, example.rejected), columns, strict=True)
        )
    except Unusable as reason:
        return BadRow(example.row_id, f"{reason} (data.chosen_score and data.rejected_score name the columns)")
    return replace(example, scores=(chosen, rejected))


def _merged(
    reading: Reading, count: int, numbers: list[int], examples: list[PreferenceExample | None], faults: Faults
) -> tuple[list[PreferenceExample | None], Faults]:
    """All processes' examples in the order of their rows, None in place of others' ones; and all faults.

    Raises ValueError where the processes have read different numbers of rows.
    """
    share = reading.share
    counts = share.gather(count)
    if len(set(counts)) > 1:
        other = next(process for process, rows in enumerate(counts) if rows != counts[0])
        raise ValueError(
            f"process {other} finds {counts[other]} rows in the data where process 0 finds {counts[0]}; give every "
            "host the same files."
        )
    if reading.everything:
        usable = [example for example in examples if example is not None]
        return [example if share.owns(number) else None for number, example in enumerate(usable)], faults
    own = {number: example for number, example in zip(numbers, examples, strict=True) if example is not None}
    everyone = sorted(number for part in share.gather(list(own)) for number in part)
    return [own.get(number) for number in everyone], faults.merged(share.gather)


def _emptied(rows: list[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    """The rows, each given up as it is taken."""
    rows.reverse()
    while rows:
        yield rows.pop()


def _refuse(faults: Faults, rows: int, on_bad_row: str) -> None:
    advice = (
        "fix them, or set data.on_bad_row: skip to leave them out"
        if on_bad_row == "error"
        else "none is left, so check the data or data.layout"
    )
    first = faults.first
    raise ValueError(
        f"{first.row_id}: {first.reason}. {faults.total} of {rows} rows cannot be used ({faults.counted()}); {advice}."
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
    columns = plain(", ".join(dict.fromkeys(str(name) for row in rows[:_DETECTION_ROWS] for name in row.values)))
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
