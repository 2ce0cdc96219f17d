"""Every response of a data set once, in rows as full as they get: for log-probs alone, which need no batches of pairs.

Letters: n segments; s responses of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from rpo_jax.core.records import KINDS, REFINED, Batch, PreferenceData, Side
from rpo_jax.data.packing import Segment, by_prompt, layout, pack, share_prompts
from rpo_jax.data.shapes import Shape

WINDOW = 16_384  # examples packed together: enough for full rows, few enough to pack in no time
ROW_TOKENS_MULTIPLE = 64


class Sweep:
    """Calls that reach every response once; all have one shape, so one program computes them.

    Args:
        responses: which of KINDS to reach, where an example has them.
        batch_pairs: a call has about as many tokens as this many examples, as a batch of training has.
        row_tokens: length of a row; where not given, the longest segment rounded up to a multiple of 64.
        rows_multiple: the number of rows of a call is a multiple of this.
        own_rows: from a number of rows to those that this process fills; all where not given.

    Rows hold segments of whatever examples fill them; responses to one prompt share it as far as a row holds them.
    """

    def __init__(
        self,
        data: PreferenceData,
        responses: Sequence[str],
        *,
        batch_pairs: int,
        row_tokens: int | None = None,
        rows_multiple: int = 1,
        own_rows: Callable[[int], Bool[np.ndarray, "R"]] | None = None,
    ) -> None:
        self.num_examples = len(data.examples)
        columns = [column for column, name in enumerate(KINDS) if name in responses]
        alone = [segment for i in range(self.num_examples) for segment in _segments(data, i, columns, row_tokens)]
        tokens = np.array([segment.num_tokens for segment in alone], np.int64)
        longest = int(tokens.max(initial=1))
        row_tokens = row_tokens or -(-longest // ROW_TOKENS_MULTIPLE) * ROW_TOKENS_MULTIPLE
        windows = [alone[start : start + WINDOW] for start in range(0, len(alone), WINDOW)]
        rows = [row for window in windows for row in _rows(window, row_tokens)]
        wanted = batch_pairs * tokens.sum() / (max(len(alone), 1) * row_tokens)
        num_rows = rows_multiple * -(-int(np.ceil(min(wanted, len(rows)))) // rows_multiple)
        self.shape = Shape(max(num_rows, rows_multiple), row_tokens)
        self._own_rows = None if own_rows is None else own_rows(self.shape.rows)
        self._calls = [rows[start : start + self.shape.rows] for start in range(0, len(rows), self.shape.rows)]
        self._num_slots = max((sum(_num_responses(row) for row in call) for call in self._calls), default=0)

    def __len__(self) -> int:
        return len(self._calls)

    def call(self, number: int) -> tuple[Batch, Int[np.ndarray, "s"], Int[np.ndarray, "s"]]:
        """A batch whose first s chosen slots are responses of any kind, and each one's example and column."""
        segments, rows, starts, places = [], [], [], []
        for row, held in enumerate(self._calls[number]):
            column = 0
            for segment in held:
                slots = range(len(places), len(places) + len(segment.responses))
                places += [divmod(place, len(KINDS)) for place, _ in segment.responses]
                renumbered = tuple((slot, ids) for slot, (_, ids) in zip(slots, segment.responses, strict=True))
                segments.append(segment._replace(responses=renumbered))
                rows.append(row)
                starts.append(column)
                column += segment.num_tokens
        batch = Batch(
            **layout(segments, np.array(rows), np.array(starts), self.shape, self._own_rows),
            chosen=_slots(self._num_slots, len(places)),
            rejected=_slots(0, 0),
            mismatched=_slots(0, 0),
            refined=(),
        )
        examples, columns = np.array(places, np.int64).reshape(-1, 2).T
        return batch, examples, columns


def _segments(data: PreferenceData, index: int, columns: Sequence[int], row_tokens: int | None) -> list[Segment]:
    """The example's responses, each numbered by its place in the table of n x KINDS log-probs.

    Those of one prompt in one segment, unless a row of `row_tokens` does not hold it: the longest that training needs
    may be shorter.
    """
    example, segments = data.examples[index], []
    for refined in (False, True):
        kinds = [(column, KINDS[column]) for column in columns if (KINDS[column] in REFINED) == refined]
        found = [(len(KINDS) * index + column, getattr(example, f"{kind}_ids")) for column, kind in kinds]
        present = tuple((place, ids) for place, ids in found if ids is not None)
        if not present:
            continue
        joined = Segment(example.row_id, example.prompt_of(kinds[0][1]), present)
        if row_tokens is not None and joined.num_tokens > row_tokens:
            segments += [joined._replace(responses=(response,)) for response in present]
        else:
            segments.append(joined)
    return segments


def _rows(alone: Sequence[Segment], row_tokens: int) -> list[list[Segment]]:
    shared = share_prompts(by_prompt(alone), row_tokens)
    rows, starts, num_rows = pack([segment.num_tokens for segment in shared], row_tokens)
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
