"""How a row's work is counted and dealt, against what can be counted by hand."""

import numpy as np

from benchmarks import context_balance as balance


def test_a_causal_row_without_a_prompt_grows_by_two_blocks_a_stripe():
    seen, scored = balance.work(1024, [(0, [1024])])
    np.testing.assert_array_equal(seen, 2 * np.arange(1, 9))
    np.testing.assert_array_equal(scored, 128)
    one_part, zig_zag, stripes, _ = balance.unevenness(np.tile(seen, 2), 2)
    assert zig_zag == one_part == 1.0
    assert stripes == 40 / 36
    assert balance.unevenness(np.arange(16.0), 2)[:3] == [92 / 60, 1.0, 64 / 60]


def test_a_response_sees_its_prompt_and_itself_alone():
    seen, scored = balance.work(512, [(128, [128, 128])])
    np.testing.assert_array_equal(seen, [2, 4, 4, 0])
    np.testing.assert_array_equal(scored, [0, 128, 128, 0])
