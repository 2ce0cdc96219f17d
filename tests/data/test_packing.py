import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpo_jax.data.packing import build_batch, pack, packing_efficiency

from .ragged import data_of, example, examples_of_lengths, sequence

LENGTHS = st.lists(st.tuples(*[st.integers(1, 12)] * 4), min_size=1, max_size=24)


def test_a_batch_token_by_token():
    short = example("file:1", [1, 12], [22, 2], [31], [41, 2], number=0)
    long = example("file:2", [1, 10, 11], [20, 21, 2], [30, 2], [40], number=1)
    index = np.array([0, 1, -1])
    data = data_of([short, long], width=2)
    batch = build_batch(data, index, index, paired=True, mismatched=True, row_tokens=20, row_counts=(2,))

    # Slots: chosen 0-2, rejected 3-5, mismatched 6-8. The longer segment comes first.
    # fmt: off
    expected = {
        "tokens":       [1, 10, 11, 20, 21, 2, 30,  2, 40, 1, 12, 22,  2, 31, 41,  2,  0,  0,  0,  0],
        "positions":    [0,  1,  2,  3,  4, 5,  3,  4,  3, 0,  1,  2,  3,  2,  2,  3,  0,  0,  0,  0],
        "segment_ids":  [1,  1,  1,  1,  1, 1,  1,  1,  1, 2,  2,  2,  2,  2,  2,  2,  0,  0,  0,  0],
        "branch_ids":   [0,  0,  0,  1,  1, 1,  2,  2,  3, 0,  0,  1,  1,  2,  3,  3,  0,  0,  0,  0],
        "previous":     [0,  0,  1,  2,  3, 4,  2,  6,  2, 9,  9, 10, 11, 10, 10, 14,  0,  0,  0,  0],
        "response_ids": [-1, -1, -1, 1, 1, 1,  4,  4,  7, -1, -1, 0,  0,  3,  6,  6, -1, -1, -1, -1],
    }
    # fmt: on
    for name, row in expected.items():
        array = getattr(batch, name)
        assert array.dtype == np.int32
        assert array[0].tolist() == row, name
        assert (array[1] == (-1 if name == "response_ids" else 0)).all(), name
    assert packing_efficiency(batch) == 16 / 40

    assert batch.chosen.valid.tolist() == [True, True, False]
    assert batch.chosen.prompt_id.tolist() == batch.mismatched.prompt_id.tolist() == [0, 1, -1]
    assert batch.chosen.text_id.tolist() == [0, 2, -1]
    assert batch.rejected.text_id.tolist() == [1, 3, -1]
    assert batch.rejected.example_index.tolist() == [0, 1, -1]
    np.testing.assert_array_equal(batch.chosen.embedding, [*data.chosen_embeddings, [0, 0]])
    np.testing.assert_array_equal(batch.rejected.embedding, [*data.rejected_embeddings, [0, 0]])


def test_unpaired_responses_have_segments_of_their_own():
    data = data_of(examples_of_lengths([(3, 2, None, 4), (2, None, 5, None)]))
    batch = build_batch(
        data, np.array([0]), np.array([1]), paired=False, mismatched=True, row_tokens=16, row_counts=(1, 2)
    )
    assert batch.tokens.shape == (1, 16)
    assert batch.segment_ids[0].tolist() == [1] * 9 + [2] * 7
    assert batch.branch_ids[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 0, 0, 1, 1, 1, 1, 1]
    assert batch.response_ids[0].tolist() == [-1] * 3 + [0] * 2 + [2] * 4 + [-1] * 2 + [1] * 5


@given(lengths=LENGTHS, paired=st.booleans(), mismatched=st.booleans(), order=st.randoms(use_true_random=False))
def test_no_token_is_lost_or_duplicated(lengths, paired, mismatched, order):
    count = len(lengths)
    data = data_of(examples_of_lengths(lengths))
    chosen = np.arange(count)
    rejected = chosen if paired else np.array(order.sample(range(count), count))
    batch = build_batch(
        data, chosen, rejected, paired=paired, mismatched=mismatched, row_tokens=48, row_counts=range(1, 2 * count + 1)
    )
    expected = [(data.examples[i], data.examples[i].chosen_ids) for i in chosen]
    expected += [(data.examples[i], data.examples[i].rejected_ids) for i in rejected]
    expected += [(data.examples[i], data.examples[i].mismatched_ids) for i in chosen if mismatched]
    for slot, (source, response) in enumerate(expected):
        assert sequence(batch, slot) == (source.prompt_ids.tolist(), response.tolist())
    assert batch.response_ids.max() == len(expected) - 1

    prompt_copies = count if paired else 2 * count
    prompts = sum(len(source.prompt_ids) for source, _ in expected[:prompt_copies])
    num_tokens = prompts + sum(len(response) for _, response in expected)
    assert (batch.segment_ids > 0).sum() == num_tokens
    assert packing_efficiency(batch) == pytest.approx(num_tokens / batch.tokens.size)
    for row in batch.segment_ids:  # numbered from the left, padding at the end
        assert row[row > 0].tolist() == sorted(row[row > 0])
        assert not row[(row > 0).sum() :].any()


@given(lengths=st.lists(st.integers(1, 30), max_size=60))
def test_first_fit_decreasing(lengths):
    rows, starts, num_rows = pack(lengths, 30)
    used = np.zeros((num_rows, 30), int)
    for length, row, start in zip(lengths, rows, starts, strict=True):
        assert start + length <= 30
        used[row, start : start + length] += 1
    assert used.max(initial=0) <= 1
    filled = used.sum(1)
    assert (filled > 0).all()
    if num_rows > 1:  # the two emptiest rows would have been one
        assert np.sort(filled)[:2].sum() > 30


def test_first_fit_decreasing_by_hand():
    rows, starts, num_rows = pack([2, 5, 4, 3, 6], 10)
    assert rows.tolist() == [1, 1, 0, 1, 0]
    assert starts.tolist() == [8, 0, 6, 5, 0]
    assert num_rows == 2


def test_a_batch_takes_the_smallest_row_count_that_holds_it():
    data = data_of(examples_of_lengths([(4, 3, 3, None)] * 3))
    index = np.arange(3)
    kwargs = {"paired": True, "mismatched": False, "row_tokens": 10}
    assert build_batch(data, index, index, row_counts=(2, 4, 8), **kwargs).tokens.shape == (4, 10)
    assert build_batch(data, index[:2], index[:2], row_counts=(2, 4, 8), **kwargs).tokens.shape == (2, 10)


def test_a_batch_without_examples_is_all_padding():
    data = data_of(examples_of_lengths([(4, 3, 3, None)]))
    index = np.array([-1, -1])
    batch = build_batch(data, index, index, paired=True, mismatched=False, row_tokens=8, row_counts=(1,))
    assert not batch.segment_ids.any()
    assert (batch.response_ids == -1).all()
    assert not batch.chosen.valid.any()
    assert not batch.rejected.valid.any()


def test_a_segment_longer_than_a_row_is_refused_by_name():
    data = data_of(examples_of_lengths([(4, 3, 3, None), (4, 4, 3, None)]))
    index = np.arange(2)
    with pytest.raises(ValueError, match=r"file:2 needs 11 tokens.*row_tokens=10"):
        build_batch(data, index, index, paired=True, mismatched=False, row_tokens=10, row_counts=(2,))
