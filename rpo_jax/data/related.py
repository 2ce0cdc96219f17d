"""An order in which neighbours in embedding space come together, and which is the same on every machine.

A balanced tree: a set is cut in two halves along the direction in which it is widest, the halves again, down to
batches and on to contrast groups. Sources: Boley 1998, "Principal direction divisive partitioning", for the
direction; Verma, Kpotufe & Dasgupta 2009, "Which spatial partition trees are adaptive to intrinsic dimension?", for
the cut at the median.

Every sum here is one of whole numbers that floating point holds exactly, in whatever order they are added. So hosts
with other processors, libraries or numbers of threads cannot come to other batches.

Letters: n rows of embeddings, E their width, s places of a pool's order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

_LENGTH = 1024  # of a whole-number vector: products of two stay far below 2**24, which float32 holds exactly
_FINE = 32_767  # steps of a vector's largest entry, before its length is known
_SAMPLE = 256  # members that a set's direction is taken from: enough for it, few enough to differ between epochs
_ITERATIONS = 4  # of the power method; more gives the widest direction, fewer gives epochs batches more different
_CHUNK_ROWS = 65_536

Points = Int[np.ndarray, "n E"]


def whole_points(embeddings: Float[np.ndarray, "n E"], *rows: Int[np.ndarray, "d"]) -> Int[np.ndarray, "d E"]:
    """Unit vectors in whole numbers, of length about 1,024, in int16; of the sum of several embeddings of a draw.

    A zero vector stays zero.

    Args:
        rows: of the embeddings that each draw has; draw d has row d where none are given.
    """
    rows = rows or (np.arange(len(embeddings)),)
    points = np.empty((len(rows[0]), embeddings.shape[1]), np.int16)
    for start in range(0, len(points), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        parts = [embeddings[of_draw[part]] for of_draw in rows]
        points[part] = _whole(np.sum([_whole(rows) for rows in parts], axis=0) if parts[1:] else parts[0])
    return points


def related_order(
    points: Sequence[Points], streams: Sequence[Int[np.ndarray, "s"]], sizes: Sequence[int], seed: Sequence[int]
) -> list[Int[np.ndarray, "s"]]:
    """The streams in an order whose batches are of neighbours, across streams too; batches in random order.

    Args:
        points: what `whole_points` made of each pool, read at the indices in its stream.
        streams: indices into each pool, as many in each; batch k of all streams are the k-th places of each.
        sizes: places of a batch and, within it, of ever smaller groups, each a divisor of the one before. A last
            batch that is not full stays last.
        seed: of all choices; another seed gives other batches.
    """
    rng = np.random.default_rng(seed)
    parts = [list(streams)]
    for size in sizes:
        parts = [leaf for part in parts for leaf in _leaves(points, part, size, rng)]
        if size == sizes[0]:
            full = len(streams[0]) // size
            parts = [parts[index] for index in rng.permutation(full)] + parts[full:]
    return [np.concatenate([part[pool] for part in parts]) for pool in range(len(streams))]


def _whole(rows: Float[np.ndarray, "n E"] | Int[np.ndarray, "n E"]) -> Float[np.ndarray, "n E"]:
    """Rows of length about _LENGTH in whole numbers; divided by a maximum first, which no order of sums can change."""
    rows = np.asarray(rows, np.float64)
    largest = np.abs(rows).max(axis=-1, keepdims=True, initial=0.0)
    fine = np.rint(rows / np.where(largest > 0, largest, 1.0) * _FINE)
    length = np.sqrt(np.sum(fine * fine, axis=-1, keepdims=True))
    return np.rint(fine * (_LENGTH / np.maximum(length, 1.0)))


def _direction(members: Points, rng: np.random.Generator) -> Float[np.ndarray, "E"]:
    """About the direction in which the members are widest, of length _LENGTH, by the power method."""
    centred = members.astype(np.float64)
    centred -= np.rint(centred.sum(axis=0) / len(centred))
    first, second = rng.choice(len(centred), 2, replace=False)
    direction = _whole(centred[first] - centred[second])
    for _ in range(_ITERATIONS):
        along = centred @ direction
        along = np.rint(along / max(np.abs(along).max(), 1.0) * _LENGTH)
        direction = _whole(along @ centred)
    return direction.astype(np.float32)


def _sample(points: Points, members: Int[np.ndarray, "s"], rng: np.random.Generator) -> Points:
    return points[members if len(members) <= _SAMPLE else members[rng.choice(len(members), _SAMPLE, replace=False)]]


def _leaves(
    points: Sequence[Points], members: list[Int[np.ndarray, "s"]], size: int, rng: np.random.Generator
) -> list[list[Int[np.ndarray, "s"]]]:
    """Sets of `size` of each stream, the last with what is left over, neighbours nearby."""
    count = -(-len(members[0]) // size)
    if count <= 1:
        return [members]
    cut = count // 2 * size
    sampled = [_sample(pool, stream, rng) for pool, stream in zip(points, members, strict=True)]
    direction = _direction(np.concatenate(sampled), rng)
    # Each stream at the same place of its own: every half has as many of each, whatever the pools are like.
    ordered = [stream[_along(pool, stream, direction)] for pool, stream in zip(points, members, strict=True)]
    halves = [stream[:cut] for stream in ordered], [stream[cut:] for stream in ordered]
    return [leaf for half in halves for leaf in _leaves(points, half, size, rng)]


def _along(points: Points, members: Int[np.ndarray, "s"], direction: Float[np.ndarray, "E"]) -> Int[np.ndarray, "s"]:
    """Places of the members from one end of a direction to the other; ties in the order given."""
    chunks = (members[start : start + _CHUNK_ROWS] for start in range(0, len(members), _CHUNK_ROWS))
    return np.argsort(np.concatenate([points[chunk].astype(np.float32) @ direction for chunk in chunks]), kind="stable")
