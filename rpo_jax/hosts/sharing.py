"""Work on a list that the processes of a run divide among themselves; with one process it is a plain call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from rpo_jax.hosts import processes

T = TypeVar("T")
R = TypeVar("R")

BLOCK_ITEMS = 64  # neighbours stay together: rows of one table are decoded, and texts embedded, so many at a time


def shared(items: Sequence[T], work: Callable[[Sequence[T]], Iterable[R]]) -> Iterable[R]:
    """`work(items)`, of which every process computes a part; all get all results, in the order of one process.

    One process alone gets them as `work` makes them, which may be one after another.

    Every process must call this with equally many items, in the same order of calls.

    Args:
        work: makes one result for each item, whatever other items come with it. Results are dicts, lists, strings,
            numbers, None and NumPy arrays, nested as one likes; tuples of another process arrive as lists. None of a
            process's items is needed for it to take part: `work` must take an empty list.

    Raises PeerFailure where another process has stopped because of something that its user can correct.
    """
    count = processes.num_processes()
    if count == 1:
        return work(items)
    owners = [number // BLOCK_ITEMS % count for number in range(len(items))]
    mine = [item for item, owner in zip(items, owners, strict=True) if owner == processes.process_id()]
    results = list(work(mine))
    assert len(results) == len(mine), "one result for each item"
    parts = [iter(part) for part in processes.gather(results)]
    return [next(parts[owner]) for owner in owners]
