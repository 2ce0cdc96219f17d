"""The simulation of sums in bfloat16, against what rounding to 8 bits allows."""

import numpy as np
import pytest

from benchmarks import gradient_sums


def test_sums_that_bfloat16_holds_are_exact_however_they_are_added():
    parts = np.ones((64, 3), np.float32)
    for add in (gradient_sums.ring, gradient_sums.tree, gradient_sums.wide):
        np.testing.assert_array_equal(add(parts), 64)


def test_a_ring_loses_addends_that_are_small_beside_its_sum_and_a_tree_does_not():
    """Ones beyond 256 round away: bfloat16 has 8 bits."""
    parts = np.ones((1024, 3), np.float32)
    np.testing.assert_array_equal(gradient_sums.ring(parts), 256)
    np.testing.assert_array_equal(gradient_sums.tree(parts), 1024)


def test_errors_are_told_beside_the_sampling_s():
    few, many = (gradient_sums.measure(shards, 10.0, entries=500) for shards in (8, 1024))
    assert few.sampling == pytest.approx(10 / 8**0.5, rel=0.1)
    assert many.sampling == pytest.approx(10 / 1024**0.5, rel=0.1)
    for found in (few, many):
        assert found.wide < 2**-8 < many.ring
    assert few.ring < many.ring
