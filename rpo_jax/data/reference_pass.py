"""Every response of a data set once, in rows as full as they get: for log-probs alone, which need no batches of pairs.

Letters: n segments; s responses of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
from jaxtyping import Bool, Int

from rpo_jax.core.records import Batch, PreferenceData, Side
from rpo_jax.core.shards import ROW_TOKENS_MULTIPLE
from rpo_jax.data.packing import (
    PackingPlan,
    Segment,
    by_prompt,
    pack_groups,
    segments_by,
    token_arrays,
)
from rpo_jax.data.shapes import PackedShape

WINDOW = 16_384  # examples packed together: enough for full rows, few enough to pack in no time
_PROMPTS = 128  # more than an example has
_Row = list[tuple[int, ...]]  # of each of its segments the responses, by their numbers in the data


class ReferencePass:
    """Batches that reach every response once; all have one shape, so one program computes them.

    Args:
        kinds: which of KINDS to reach, where an example has them.
        batch_pairs: a batch has about as many tokens as this many examples, as a batch of training has.
        row_tokens: length of a row; where not given, the longest segment rounded up to `tokens_multiple`.
        tokens_multiple: 64, or what devices that share a row can divide.
        rows_multiple: the number of rows of a batch is a multiple of this.
        own_rows: from a number of rows to those that this process fills; all where not given.
        doubling: rows and slots are powers of two (times `rows_multiple`), so that what is compiled for one data set
            serves the next.

    Rows hold segments of whatever examples fill them; responses to one prompt share it as far as a row holds them.
    """

    def __init__(
        self,
        data: PreferenceData,
        kinds: Sequence[str],
        *,
        batch_pairs: int,
        row_tokens: int | None = None,
        tokens_multiple: int = ROW_TOKENS_MULTIPLE,
        rows_multiple: int = 1,
        own_rows: Callable[[int], Bool[np.ndarray, "R"]] | None = None,
        doubling: bool = False,
    ) -> None:
        self._data, self.num_responses = data, data.num_responses
        numbers = np.sort(np.concatenate([data.of_kind(kind) for kind in kinds]))
        row_tokens = row_tokens or -(-(_longest(data, numbers) or 1) // tokens_multiple) * tokens_multiple
        num_segments = tokens = 0
        rows: list[_Row] = []
        for window in _windows(data, numbers):
            alone = _segments(data, window, row_tokens)
            num_segments += len(alone)
            tokens += sum(segment.num_tokens for segment in alone)
            rows += _rows(alone, row_tokens)
        wanted = batch_pairs * tokens / (max(num_segments, 1) * row_tokens)
        num_rows = rows_multiple * -(-int(np.ceil(min(wanted, len(rows)))) // rows_multiple)
        num_rows = max(num_rows, rows_multiple)
        self.shape = PackedShape(
            rows_multiple * _power_of_two(num_rows // rows_multiple) if doubling else num_rows, row_tokens
        )
        self._own_rows = None if own_rows is None else own_rows(self.shape.rows)
        self._batches = [rows[start : start + self.shape.rows] for start in range(0, len(rows), self.shape.rows)]
        self._num_slots = max((sum(map(len, chain(*batch))) for batch in self._batches), default=0)
        if doubling:
            self._num_slots = _power_of_two(self._num_slots)

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, number: int) -> tuple[Batch, Int[np.ndarray, "s"]]:
        """A batch whose first s slots, all called chosen, are responses of any kind; and their numbers in the data."""
        segments, rows, starts, numbers, flat = [], [], [], [], self._data.flat
        for row, held in enumerate(self._batches[number]):
            column = 0
            for own in held:
                responses = tuple((len(numbers) + i, flat.response(response).ids) for i, response in enumerate(own))
                segments.append(Segment(flat.row_ids[flat.example_index[own[0]]], flat.prompt_of(own[0]), responses))
                numbers += own
                rows.append(row)
                starts.append(column)
                column += segments[-1].num_tokens
        plan = PackingPlan(segments, np.array(rows), np.array(starts), self.shape)
        sides = {"chosen": _slots(self._num_slots, len(numbers))}
        return Batch(**token_arrays(plan, self._own_rows), sides=sides), np.array(numbers, np.int64)


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()


def _longest(data: PreferenceData, numbers: Int[np.ndarray, "_"]) -> int:
    """Tokens of the longest segment that holds all of these responses to its prompt."""
    flat = data.flat
    segments, of = np.unique(data.example_index[numbers] * _PROMPTS + flat.prompt[numbers], return_inverse=True)
    responses = np.bincount(of, flat.response_tokens[numbers], minlength=len(segments)).astype(np.int64)
    return int((responses + flat.prompt_tokens(*np.divmod(segments, _PROMPTS))).max(initial=0))


def _windows(data: PreferenceData, numbers: Int[np.ndarray, "_"]) -> Iterator[list[int]]:
    """The responses, those of so many examples at a time."""
    _, first = np.unique(data.example_index[numbers], return_index=True)
    for part in np.split(numbers, first[WINDOW::WINDOW]):
        yield part.tolist()


def _segments(data: PreferenceData, numbers: Sequence[int], row_tokens: int) -> list[Segment]:
    """A segment for each example and prompt, its responses numbered as the data numbers them.

    One for each response where a row of `row_tokens` does not hold them together: the longest that training needs may
    be shorter.
    """
    segments = []
    for segment in segments_by(data, (((), number, number) for number in numbers)).values():
        if segment.num_tokens > row_tokens:
            segments += [segment._replace(responses=(response,)) for response in segment.responses]
        else:
            segments.append(segment)
    return segments


def _rows(alone: Sequence[Segment], row_tokens: int) -> list[_Row]:
    shared, rows, starts, num_rows = pack_groups(by_prompt(alone), row_tokens)
    held: list[_Row] = [[] for _ in range(num_rows)]
    for index in np.lexsort((starts, rows)).tolist():
        held[rows[index]].append(tuple(number for number, _ in shared[index].responses))
    return held


def _slots(count: int, used: int) -> Side:
    """Slots for log-probs alone: nothing is contrasted, so nothing is known of them but which are used."""
    zeros, unknown = np.zeros(count, np.float32), np.full(count, -1, np.int32)
    return Side(np.arange(count) < used, zeros, np.zeros((count, 0), np.float32), unknown, unknown, unknown)
