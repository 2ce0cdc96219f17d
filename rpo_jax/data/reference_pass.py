"""Every response of a data set once, in rows as full as they get: for log-probs alone, which need no batches of pairs.

Letters: n segments; s responses of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from rpo_jax.core.records import Batch, PreferenceData, Side
from rpo_jax.data.packing import (
    PackingPlan,
    Segment,
    by_prompt,
    longest_of,
    pack_groups,
    segments_by,
    token_arrays,
)
from rpo_jax.data.shapes import PackedShape

WINDOW = 16_384  # examples packed together: enough for full rows, few enough to pack in no time
ROW_TOKENS_MULTIPLE = 64


class ReferencePass:
    """Batches that reach every response once; all have one shape, so one program computes them.

    Args:
        kinds: which of KINDS to reach, where an example has them.
        batch_pairs: a batch has about as many tokens as this many examples, as a batch of training has.
        row_tokens: length of a row; where not given, the longest segment rounded up to a multiple of 64.
        rows_multiple: the number of rows of a batch is a multiple of this.
        own_rows: from a number of rows to those that this process fills; all where not given.

    Rows hold segments of whatever examples fill them; responses to one prompt share it as far as a row holds them.
    """

    def __init__(
        self,
        data: PreferenceData,
        kinds: Sequence[str],
        *,
        batch_pairs: int,
        row_tokens: int | None = None,
        rows_multiple: int = 1,
        own_rows: Callable[[int], Bool[np.ndarray, "R"]] | None = None,
    ) -> None:
        self.num_responses = len(data.responses)
        alone = _segments(data, kinds, row_tokens)
        tokens = np.array([segment.num_tokens for segment in alone], np.int64)
        row_tokens = row_tokens or -(-(longest_of(alone) or 1) // ROW_TOKENS_MULTIPLE) * ROW_TOKENS_MULTIPLE
        windows = [alone[start : start + WINDOW] for start in range(0, len(alone), WINDOW)]
        rows = [row for window in windows for row in _rows(window, row_tokens)]
        wanted = batch_pairs * tokens.sum() / (max(len(alone), 1) * row_tokens)
        num_rows = rows_multiple * -(-int(np.ceil(min(wanted, len(rows)))) // rows_multiple)
        self.shape = PackedShape(max(num_rows, rows_multiple), row_tokens)
        self._own_rows = None if own_rows is None else own_rows(self.shape.rows)
        self._batches = [rows[start : start + self.shape.rows] for start in range(0, len(rows), self.shape.rows)]
        self._num_slots = max((sum(map(_num_responses, batch)) for batch in self._batches), default=0)

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, number: int) -> tuple[Batch, Int[np.ndarray, "s"]]:
        """A batch whose first s slots, all called chosen, are responses of any kind; and their numbers in the data."""
        segments, rows, starts, numbers = [], [], [], []
        for row, held in enumerate(self._batches[number]):
            column = 0
            for segment in held:
                renumbered = tuple((len(numbers) + i, ids) for i, (_, ids) in enumerate(segment.responses))
                numbers += [response for response, _ in segment.responses]
                segments.append(segment._replace(responses=renumbered))
                rows.append(row)
                starts.append(column)
                column += segment.num_tokens
        plan = PackingPlan(segments, np.array(rows), np.array(starts), self.shape)
        sides = {"chosen": _slots(self._num_slots, len(numbers))}
        return Batch(**token_arrays(plan, self._own_rows), sides=sides), np.array(numbers, np.int64)


def _segments(data: PreferenceData, kinds: Sequence[str], row_tokens: int | None) -> list[Segment]:
    """A segment for each example and prompt, its responses numbered as the data numbers them.

    One for each response where a row of `row_tokens` does not hold them together: the longest that training needs may
    be shorter.
    """
    numbers = [number for number, response in enumerate(data.responses) if response.kind in kinds]
    found = segments_by(data, (((), number, number) for number in numbers))
    segments = []
    for segment in found.values():
        if row_tokens is not None and segment.num_tokens > row_tokens:
            segments += [segment._replace(responses=(response,)) for response in segment.responses]
        else:
            segments.append(segment)
    return segments


def _rows(alone: Sequence[Segment], row_tokens: int) -> list[list[Segment]]:
    shared, rows, starts, num_rows = pack_groups(by_prompt(alone), row_tokens)
    held: list[list[Segment]] = [[] for _ in range(num_rows)]
    for index in np.lexsort((starts, rows)).tolist():
        held[rows[index]].append(shared[index])
    return held


def _num_responses(row: Sequence[Segment]) -> int:
    return sum(len(segment.responses) for segment in row)


def _slots(count: int, used: int) -> Side:
    """Slots for log-probs alone: nothing is contrasted, so nothing is known of them but which are used."""
    zeros, unknown = np.zeros(count, np.float32), np.full(count, -1, np.int32)
    return Side(np.arange(count) < used, zeros, np.zeros((count, 0), np.float32), unknown, unknown, unknown)
