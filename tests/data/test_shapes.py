import numpy as np
import pytest

from rpo_jax.data.shapes import MAX_SHAPES, PackedShape, choose_shapes, row_lengths


def padded(shapes, needed, lengths):
    """Positions of each batch in the smallest shape that holds it."""
    return [min(s.size for s in shapes if 0 < rows[lengths.index(s.tokens)] <= s.rows) for rows in np.asarray(needed)]


@pytest.mark.parametrize(("longest", "expected"), [(1, (64,)), (64, (64,)), (65, (64, 128)), (733, range(64, 769, 64))])
def test_row_lengths_are_multiples(longest, expected):
    assert row_lengths(longest, 64) == tuple(expected)


@pytest.mark.parametrize("longest", [769, 2000, 8192, 100_001])
def test_row_lengths_are_few(longest):
    lengths = row_lengths(longest, 64)
    assert len(lengths) <= 12
    assert lengths[-1] - 64 < longest <= lengths[-1]
    assert all(length % 64 == 0 for length in lengths)


def test_as_many_needs_as_shapes_are_met_exactly():
    needed = np.repeat([[3], [5], [7], [11]], 10, axis=0)
    shapes = choose_shapes(needed, (64,), most_rows=40, multiple=1)
    assert padded(shapes, needed, [64]) == [rows * 64 for rows in needed[:, 0]]
    assert shapes[-1] == PackedShape(40, 64)


def test_rare_batches_get_no_shape_of_their_own():
    needed = np.array([[100]] * 999 + [[99]])
    assert {shape.rows for shape in choose_shapes(needed, (64,), most_rows=300, multiple=1)} == {100, 105, 300}


def test_no_worse_than_the_best_of_all_subsets_by_much():
    """Against every subset of row counts, which one row length leaves few enough of to try."""
    from itertools import combinations

    rng = np.random.default_rng(0)
    needed = np.round(rng.normal(20, 3, (200, 1))).astype(int)
    shapes = choose_shapes(needed, (64,), most_rows=64, multiple=1)
    fixed = [shape for shape in shapes if shape.rows > needed.max()]
    free = MAX_SHAPES + 1 - len(fixed)
    every = [PackedShape(int(rows), 64) for rows in np.unique(needed)]
    best = min(sum(padded([*fixed, *some], needed, [64])) for some in combinations(every, free))
    assert sum(padded(shapes, needed, [64])) <= 1.01 * best


def test_a_short_row_is_used_where_it_holds_the_batch():
    needed = np.array([[4, 2], [0, 2], [4, 2], [0, 2]])  # at 40 and at 100 tokens
    shapes = choose_shapes(needed, (40, 100), most_rows=9, multiple=1)
    assert padded(shapes, needed, [40, 100]) == [160, 200, 160, 200]
