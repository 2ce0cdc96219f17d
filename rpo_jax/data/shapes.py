"""Which few shapes the batches of a run are padded to: every one that is used is compiled once.

Letters: b sampled batches; t row lengths considered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

MAX_SHAPES = 6  # that a run can be expected to meet
# By how much the largest batch of a run may exceed the largest of the sample: the larger of the two.
MARGIN_DEVIATIONS = 2
MARGIN_SHARE = 0.05
FAR = 2.0  # times the rows of the largest sampled batch: no batch of a run is that large
WORTH_COMPILING = 0.005  # of the positions that all sampled batches take


class PackedShape(NamedTuple):
    rows: int
    tokens: int

    @property
    def size(self) -> int:
        return self.rows * self.tokens


def row_lengths(longest: int, multiple: int, most: int = 12) -> tuple[int, ...]:
    """At most `most` row lengths, ascending multiples of `multiple`; the last one holds a segment of `longest`."""
    step = multiple * -(-longest // (multiple * most))
    last = -(-longest // multiple) * multiple
    return (*range(step, last, step), last)


def choose_shapes(
    needed: Int[np.ndarray, "b t"], lengths: Sequence[int], *, most_rows: int, multiple: int
) -> tuple[PackedShape, ...]:
    """Shapes, ascending in size, that waste little on batches like the sampled ones, and one that holds any batch.

    Args:
        needed: rows that each sampled batch needs at each row length; 0 where one of its segments is longer.
        lengths: the row lengths, ascending.
        most_rows: no batch needs more rows of the last length.
        multiple: every number of rows is a multiple of this.

    Greedy, then exchanging one shape at a time for a better one until none is: there are too many subsets to try all,
    and on real lengths the greedy choice is already within a percent of where this ends.
    """
    rows = -(-needed // multiple) * multiple
    bound = PackedShape(-(-most_rows // multiple) * multiple, lengths[-1])
    most = needed[:, -1].max()
    deviation = np.std(needed[2 * needed[:, -1] >= most, -1])  # without an epoch's last batch, which may be small
    largest = int(np.ceil(most + max(MARGIN_DEVIATIONS * deviation, MARGIN_SHARE * most)))
    margin = PackedShape(multiple * -(-largest // multiple), lengths[-1])
    # What a run can be expected to need beyond its sample is a shape of its own, smaller than the proof's bound, which
    # is not counted where it is so far off that it will not be compiled.
    fixed = [margin, bound] if margin.rows < bound.rows else [bound]
    most_chosen = MAX_SHAPES - (1 if bound.rows > FAR * most else len(fixed))
    candidates = sorted(
        {PackedShape(int(rows[b, t]), lengths[t]) for b, t in zip(*np.nonzero(rows), strict=True)} - {*fixed}
    )
    if not candidates:
        return tuple(fixed)
    column = {length: t for t, length in enumerate(lengths)}
    costs = np.stack([_costs(shape, needed[:, column[shape.tokens]]) for shape in candidates], axis=1)
    without = np.min([_costs(shape, needed[:, -1]) for shape in fixed], axis=0)

    chosen: list[int] = []
    while len(chosen) < most_chosen:
        now = _best(without, costs, chosen)
        totals = np.minimum(now[:, None], costs).sum(0)
        if now.sum() - totals.min() < WORTH_COMPILING * now.sum():
            break
        chosen.append(int(totals.argmin()))
    exchanged = True
    while exchanged:
        exchanged = False
        for place in range(len(chosen)):
            rest = _best(without, costs, chosen[:place] + chosen[place + 1 :])
            totals = np.minimum(rest[:, None], costs).sum(0)
            if totals.min() < totals[chosen[place]]:
                chosen[place], exchanged = int(totals.argmin()), True
    return tuple(sorted({*fixed, *(candidates[i] for i in chosen)}, key=lambda shape: (shape.size, shape.tokens)))


def _costs(shape: PackedShape, needed: Int[np.ndarray, "b"]) -> Float[np.ndarray, "b"]:
    """Positions that each batch takes in this shape; infinite where it does not fit."""
    return np.where((needed > 0) & (needed <= shape.rows), float(shape.size), np.inf)


def _best(
    without: Float[np.ndarray, "b"], costs: Float[np.ndarray, "b c"], chosen: Sequence[int]
) -> Float[np.ndarray, "b"]:
    return np.min([without, *(costs[:, i] for i in chosen)], axis=0)
