"""Preference examples from rows: layouts by name or by their columns, faults counted or raised, texts to embed."""

from __future__ import annotations

import difflib
import math
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Literal

from rpo_jax.core.records import PreferenceExample, Row
from rpo_jax.data.faults import BadRow, Faults, LeftOut, plain
from rpo_jax.data.layouts import LAYOUTS
from rpo_jax.data.layouts.fields import LARGEST, Fields, Unusable, number_field
from rpo_jax.data.layouts.layout import Layout
from rpo_jax.data.layouts.messages import turns_text
from rpo_jax.data.layouts.ranked import ABOVE_MEAN, AllEqual, Rule, by_rule

_DETECTION_ROWS = 100  # the layout is a vote, so that a broken first row does not hide it
ScoreColumns = str | Mapping[str, float]
_NAMED_COLUMNS, _NAME_CHARACTERS = 200, 100  # so many are reported, and none longer: junk has any number


@dataclass(frozen=True)
class ExampleSet:
    """Usable examples in the order of their rows, and the rows that gave none.

    Attributes:
        num_rows: that were read, unusable ones too.
        columns: those that rows have, and which of the layout's each was read as; empty where no one read it.
        left_out: rows of which the rule that ranks responses makes nothing; they are no faults.
    """

    examples: tuple[PreferenceExample, ...]
    layout: str
    truncation_side: Literal["keep_start", "keep_end"]
    faults: Faults
    num_rows: int
    columns: Mapping[str, str]
    left_out: Faults = field(default_factory=Faults)

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """Where prompts were found; none where they are what the answers begin with."""
        return tuple(column for column, name in self.columns.items() if name in LAYOUTS[self.layout].prompt)


def make_examples(
    rows: Iterable[Row | BadRow],
    layout: str = "auto",
    on_bad_row: Literal["error", "skip"] = "error",
    scores: Mapping[str, ScoreColumns] | None = None,
    columns: Mapping[str, str] | None = None,
    ignore_columns: Collection[str] = (),
    rule: Rule = ABOVE_MEAN,
    row_values: Mapping[str, str] | None = None,
) -> ExampleSet:
    """Examples of every usable row. What of a row makes no example is not kept, so `rows` may be a stream.

    Args:
        rows: what `sources.read_rows` gives.
        layout: a name in LAYOUTS, or `auto` to go by the columns.
        on_bad_row: `error` raises if any row is unusable, naming the first by file and line, and counting all by
            kind; `skip` leaves them out and returns their counts as `faults`.
        scores: for each kind of response the column with its score, or columns and their weights in a sum; a row that
            lacks one that it needs is unusable.
        columns: what the rows call columns of the layout, where their names differ.
        ignore_columns: columns that are as if they were not there.
        rule: which of a prompt's responses are chosen, where the layout ranks them by scores.
        row_values: names of numbers that every row has, and the columns that they are in.

    Raises ValueError also for an unknown layout, columns that fit none, `columns` that the layout or the rows do not
    have, scores asked of a layout that makes one example of several rows, or where no row is usable.
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
    if not num_rows:
        raise ValueError("no preference found: there are no rows.")
    _check_found(start, columns or {})
    name = detect_layout(start, columns, ignore_columns) if layout == "auto" and start else layout
    if name not in LAYOUTS and (start or name != "auto"):
        nearest = difflib.get_close_matches(name, LAYOUTS, n=1, cutoff=0.0)[0]
        raise ValueError(f"data.layout '{name}' is unknown; did you mean '{nearest}'? Known are {', '.join(LAYOUTS)}.")
    if (scores is not None or row_values) and start and LAYOUTS[name].joins_rows:
        raise ValueError(
            f"data.layout '{name}' makes an example of several rows, so no row scores its responses, or has a weight "
            "or a label smoothing of its own; use an objective and settings without them, or data with a row for each "
            "pair."
        )
    everything = chain((start.popleft() for _ in range(len(start))), stream)  # each given up as it is taken
    examples, read, left_out = [], _Read(columns or {}, ignore_columns, rule, row_values or {}), Faults()
    if num_rows > faults.total:
        read.check(name)
        for outcome in read.outcomes(LAYOUTS[name], everything, scores):
            if isinstance(outcome, PreferenceExample):
                examples.append(outcome)
            else:
                (left_out if isinstance(outcome, LeftOut) else faults).add(*outcome)
    if faults and (on_bad_row == "error" or not examples):
        raise faults.error(
            f"{num_rows} rows cannot be used", on_bad_row, "none is left, so check the data or data.layout"
        )
    if not examples and left_out:
        raise ValueError(
            f"no preference found: data.ranked_rule={rule.name} leaves out {left_out.total} of {num_rows} rows "
            f"({left_out.counted()}); check their scores, or use another rule."
        )
    if not examples:
        raise ValueError(
            f"no preference found: none of the {num_rows} rows gave an example in the layout '{name}' "
            f"({LAYOUTS[name].description}); check the data or data.layout."
        )
    side = LAYOUTS[name].truncation_side
    return ExampleSet(tuple(examples), name, side, faults, num_rows, read.columns_read, left_out)


def _check_found(rows: Collection[Row], columns: Mapping[str, str]) -> None:
    """Raises ValueError for the first of `columns` that no row has."""
    for name, column in columns.items():
        if rows and not any(column in row.values for row in rows):
            raise ValueError(
                f"{next(iter(rows)).file}: data.columns.{name} is '{plain(column)}', but the columns are "
                f"{columns_of(rows)}; name one of them."
            )


def columns_of(rows: Iterable[Row]) -> str:
    """The names of all columns of the rows, for a message."""
    return plain(", ".join(dict.fromkeys(str(name) for row in rows for name in row.values))) or "none"


class _Read:
    """Rows on their way through a layout, and what was read of them.

    Attributes:
        columns_read: as ExampleSet.columns.
    """

    def __init__(
        self, columns: Mapping[str, str], ignored: Collection[str], rule: Rule, row_values: Mapping[str, str]
    ) -> None:
        self._columns, self._ignored, self._rule, self._row_values = columns, frozenset(ignored), rule, row_values
        self.columns_read: dict[str, str] = {}

    def check(self, layout: str) -> None:
        """Raises ValueError for a name that the layout does not know."""
        names = LAYOUTS[layout].names
        for name in self._columns:
            if name not in names:
                nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"data.columns.{name}: the layout '{layout}' has no column of this name; did you mean '{nearest}'? "
                    f"It reads {', '.join(names)}."
                )

    def outcomes(
        self, layout: Layout, rows: Iterable[Row], scores: Mapping[str, ScoreColumns] | None
    ) -> Iterator[PreferenceExample | BadRow]:
        fields = self._fields(layout, rows)
        scores = None if layout.ranks else scores
        if scores is None and not layout.ranks and not self._row_values:
            yield from layout.read(fields)
            return
        for row in fields:
            for outcome in layout.read([row]):
                if isinstance(outcome, PreferenceExample) and layout.ranks:
                    outcome = _ranked(outcome, self._rule)
                if isinstance(outcome, PreferenceExample) and scores is not None:
                    outcome = _scored(outcome, row, scores)
                if isinstance(outcome, PreferenceExample) and self._row_values:
                    outcome = _valued(outcome, row, self._row_values)
                yield outcome

    def _fields(self, layout: Layout, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            values = layout.fields(row.values, self._columns, self._ignored)
            yield row._replace(values=values)
            self._note(row.values, values)

    def _note(self, values: Mapping[str, object], fields: Fields) -> None:
        for column in values:
            if column in fields.read:
                self.columns_read[column] = fields.read[column]
            elif len(self.columns_read) < _NAMED_COLUMNS and len(column) <= _NAME_CHARACTERS:
                self.columns_read.setdefault(column, "")


def _ranked(example: PreferenceExample, rule: Rule) -> PreferenceExample | BadRow:
    """The example with chosen and rejected responses."""
    try:
        return by_rule(example, rule)
    except AllEqual as reason:
        return LeftOut(example.row_id, str(reason))
    except Unusable as reason:
        return BadRow(example.row_id, str(reason))


def _scored(example: PreferenceExample, row: Row, columns: Mapping[str, ScoreColumns]) -> PreferenceExample | BadRow:
    """The example with the scores that its row gives to the responses it has."""

    def score(of: ScoreColumns) -> float:
        if isinstance(of, str):
            return number_field(row.values, of)
        products = [weight * number_field(row.values, column) for column, weight in of.items()]
        if not abs(total := sum(products)) <= LARGEST:
            raise Unusable(f"no finite score: the weighted sum of {', '.join(of)} is {total:g}")
        return math.fsum(products)

    try:
        responses = [one._replace(score=score(columns[one.kind])) for one in example.responses]
    except Unusable as reason:
        return BadRow(example.row_id, f"{reason} (data.chosen_score and data.rejected_score name the columns)")
    return replace(example, responses=tuple(responses))


# What numbers of a row may be: the least and the most.
ROW_VALUES = {"weight": (0.0, math.inf), "label_smoothing": (0.0, 0.5), "margin": (-math.inf, math.inf)}


def _valued(example: PreferenceExample, row: Row, columns: Mapping[str, str]) -> PreferenceExample | BadRow:
    """The example with the numbers of its row."""
    numbers = {}
    for name, column in columns.items():
        low, high = ROW_VALUES[name]
        try:
            numbers[name] = number_field(row.values, column)
            if not low <= numbers[name] <= high:
                bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
                raise Unusable(f"column '{column}' is not {bounds}: got {numbers[name]:g}")
        except Unusable as reason:
            return BadRow(example.row_id, f"{reason} (data.{name} names the column)")
    return replace(example, values=tuple(numbers.items()))


def detect_layout(
    rows: Iterable[Row], columns: Mapping[str, str] | None = None, ignore_columns: Collection[str] = ()
) -> str:
    """The layout whose columns the first rows have; where several fit, the one that asks for more.

    `columns` and `ignore_columns` are as for make_examples.

    Raises ValueError, listing the columns found and those each layout needs, where none fits or two fit equally.
    """
    rows = list(islice(rows, _DETECTION_ROWS))
    votes = Counter(tuple(fitting_layouts(row, columns, ignore_columns)) for row in rows)
    votes.pop((), None)
    if votes:
        names = votes.most_common(1)[0][0]
        if len(names) == 1:
            return names[0]
        problem = f"fit the layouts {' and '.join(names)} alike"
    else:
        problem = "fit no layout"
    needs = "; ".join(f"{name}: {', '.join(layout.columns)}" for name, layout in LAYOUTS.items())
    where = f"{rows[0].file}: " if rows else ""
    raise ValueError(
        f"{where}the columns ({columns_of(rows)}) {problem}; set data.layout, or say with data.columns what they are. "
        f"Layouts and the columns they need: {needs}."
    )


def fitting_layouts(row: Row, columns: Mapping[str, str] | None, ignore_columns: Collection[str]) -> list[str]:
    """The layouts that a row may be of, most of all by its columns: without those that ask for less than another."""
    fits = {}
    for name, layout in LAYOUTS.items():
        values = layout.fields(row.values, columns, ignore_columns)
        if not all(column in values for column in layout.columns):
            continue
        if layout.recognise is None or layout.recognise(values):
            fits[name] = (set(layout.columns), layout.recognise is not None)
    # Recognised by its values says more than the same columns alone.
    return [
        name
        for name, (columns, recognised) in fits.items()
        if not any(columns < other or (columns == other and recognised < also) for other, also in fits.values())
    ]


def prompt_text(example: PreferenceExample) -> str:
    """The whole prompt as text: a string as it is, messages as "role: content" with blank lines between."""
    return example.prompt if isinstance(example.prompt, str) else turns_text(example.prompt)


def embedding_text(
    example: PreferenceExample, kind: Literal["prompt", "prompt_response", "last_turn"], response: str
) -> str:
    """The untruncated text that the sentence encoder reads for one response.

    Args:
        kind: `prompt` is `prompt_text`; `prompt_response` adds the response after a blank line (arXiv 2402.10958,
            Table 6); `last_turn` is the last user message alone, or the whole of a string prompt.
        response: the response in question; used by `prompt_response` only.
    """
    prompt, text = example.prompt, prompt_text(example)
    if isinstance(prompt, str):
        return f"{text}\n\n{response}" if kind == "prompt_response" else text
    if kind == "prompt_response":
        return text + ("" if prompt[-1].role == "assistant" else "\n\nassistant: ") + response
    if kind == "last_turn":
        return next((turn.content for turn in reversed(prompt) if turn.role == "user"), prompt[-1].content)
    return text
