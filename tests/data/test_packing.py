import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpo_jax.data.packing import NO_RESPONSE, fill_batch, pack, plan_batch
from rpo_jax.data.shapes import PackedShape

from .ragged import data_of, embeddings_of, example, examples_of_lengths, ids_of, sequence


def build_batch(data, chosen, rejected, *, paired, mismatched, shapes, own_rows=None):
    """A batch of these examples' responses; index -1 leaves its slot invalid."""

    def numbers(kind, index):
        of_example = dict(zip(data.example_index[data.of_kind(kind)].tolist(), data.of_kind(kind), strict=True))
        return np.array([NO_RESPONSE if i < 0 else of_example[i] for i in index.tolist()], np.int64)

    index = {"chosen": chosen, "rejected": rejected} | ({"mismatched": chosen} if mismatched else {})
    drawn = {kind: numbers(kind, examples) for kind, examples in index.items()}
    of_rejected = {"rejected": drawn["rejected"]}
    draws = [drawn] if paired else [{kind: drawn[kind] for kind in drawn if kind not in of_rejected}, of_rejected]
    plan = plan_batch(data, draws, shapes)
    batch = fill_batch(plan, data, draws, own_rows)
    if own_rows is None:
        assert plan.num_tokens == np.sum(batch.segment_ids > 0)
        assert plan.efficiency == pytest.approx(np.mean(batch.segment_ids > 0))
    return batch


LENGTHS = st.lists(st.tuples(*[st.integers(1, 12)] * 4), min_size=1, max_size=24)


def test_a_batch_token_by_token():
    short = example("file:1", [1, 12], [22, 2], [31], [41, 2], number=0)
    long = example("file:2", [1, 10, 11], [20, 21, 2], [30, 2], [40], number=1)
    index = np.array([0, 1, -1])
    data = data_of([short, long], width=2)
    batch = build_batch(data, index, index, paired=True, mismatched=True, shapes=[PackedShape(2, 20)])

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
    assert np.mean(batch.segment_ids > 0) == 16 / 40

    assert batch.sides["chosen"].valid.tolist() == [True, True, False]
    assert batch.sides["chosen"].prompt_id.tolist() == batch.sides["mismatched"].prompt_id.tolist() == [0, 1, -1]
    assert batch.sides["chosen"].text_id.tolist() == [0, 2, -1]
    assert batch.sides["rejected"].text_id.tolist() == [1, 3, -1]
    assert batch.sides["rejected"].example_index.tolist() == [0, 1, -1]
    np.testing.assert_array_equal(batch.sides["chosen"].embedding, [*embeddings_of(data, "chosen"), [0, 0]])
    np.testing.assert_array_equal(batch.sides["rejected"].embedding, [*embeddings_of(data, "rejected"), [0, 0]])


def test_processes_that_fill_their_own_rows_make_the_batch_of_one():
    data = data_of(examples_of_lengths([(3, 4, 5, 2), (2, 7, 3, 2), (4, 2, 2, 2), (3, 9, 4, 2)]))
    index, shapes = np.array([0, 1, -1, 2, 3]), [PackedShape(4, 20)]
    whole = build_batch(data, index, index, paired=True, mismatched=True, shapes=shapes)
    for own in ([True, False, False, True], [False, True, True, False]):
        mine = build_batch(data, index, index, paired=True, mismatched=True, shapes=shapes, own_rows=np.array(own))
        for name in ("tokens", "positions", "segment_ids", "branch_ids", "previous", "response_ids"):
            np.testing.assert_array_equal(getattr(mine, name)[own], getattr(whole, name)[own])
            assert not getattr(mine, name)[~np.array(own)].any(), "nobody filled the others"
        np.testing.assert_array_equal(mine.sides["chosen"].embedding, whole.sides["chosen"].embedding)


def test_unpaired_responses_have_segments_of_their_own():
    data = data_of(examples_of_lengths([(3, 2, None, 4), (2, None, 5, None)]))
    shapes = [PackedShape(1, 16), PackedShape(2, 16)]
    batch = build_batch(data, np.array([0]), np.array([1]), paired=False, mismatched=True, shapes=shapes)
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
    shapes = [PackedShape(rows, 48) for rows in range(1, 2 * count + 1)]
    batch = build_batch(data, chosen, rejected, paired=paired, mismatched=mismatched, shapes=shapes)
    expected = [(data.examples[i], ids_of(data.examples[i], "chosen")) for i in chosen]
    expected += [(data.examples[i], ids_of(data.examples[i], "rejected")) for i in rejected]
    expected += [(data.examples[i], ids_of(data.examples[i], "mismatched")) for i in chosen if mismatched]
    for slot, (source, response) in enumerate(expected):
        assert sequence(batch, slot) == (source.prompt_ids.tolist(), response.tolist())
    assert batch.response_ids.max() == len(expected) - 1

    num_tokens = int((batch.segment_ids > 0).sum())
    responses = sum(len(response) for _, response in expected)
    prompts = [len(example.prompt_ids) for example in data.examples]
    # Each prompt once, and again only where one row does not hold all that follows it.
    assert responses + sum(prompts) <= num_tokens <= responses + sum(prompts) * (1 if paired else 2)
    together = [
        sum(map(len, (e.prompt_ids, ids_of(e, "chosen"), ids_of(e, "rejected"), ids_of(e, "mismatched"))))
        for e in data.examples
    ]
    if max(together) <= 48:
        assert num_tokens == responses + sum(prompts)
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


def test_a_batch_takes_the_smallest_shape_that_holds_it():
    data = data_of(examples_of_lengths([(4, 3, 3, None)] * 3))
    index = np.arange(3)

    def shape_of(index, *shapes):
        shapes = [PackedShape(*shape) for shape in shapes]
        return build_batch(data, index, index, paired=True, mismatched=False, shapes=shapes).tokens.shape

    assert shape_of(index, (2, 10), (4, 10), (8, 10)) == (4, 10)
    assert shape_of(index[:2], (2, 10), (4, 10), (8, 10)) == (2, 10)
    assert shape_of(index, (4, 10), (1, 30), (1, 32)) == (1, 30)
    assert shape_of(index, (1, 30), (3, 10), (2, 15)) == (3, 10), "the shortest rows of equal sizes"
    assert shape_of(index, (50, 9), (1, 64), (2, 19)) == (1, 64), "two segments do not fit into 19 tokens"


def same_prompt_examples(responses, prompt=(5, 6, 7, 8)):
    """Pairs to one prompt, of these (chosen, rejected) lengths, every response token a different one."""
    made, first = [], 10
    for number, sizes in enumerate(responses):
        sides = [range(first, first + sizes[0]), range(first + sizes[0], first + sum(sizes))]
        first += sum(sizes)
        made.append(example(f"file:{number + 1}", list(prompt), *map(list, sides), number=number))
    return made


def copies_of_the_prompt(batch):
    return int(((batch.branch_ids == 0) & (batch.segment_ids > 0)).sum()) / 4


@pytest.mark.parametrize("paired", [True, False])
def test_all_responses_to_one_prompt_share_it(paired):
    data = data_of(same_prompt_examples([(3, 2), (1, 4), (2, 2)]))
    index = np.arange(3)
    rejected = index if paired else np.array([2, 0, 1])
    batch = build_batch(data, index, rejected, paired=paired, mismatched=False, shapes=[PackedShape(1, 18)])
    assert copies_of_the_prompt(batch) == 1
    assert batch.branch_ids.max() == 6
    assert np.mean(batch.segment_ids > 0) == 1.0
    for slot in range(6):
        source = data.examples[(index if slot < 3 else rejected)[slot % 3]]
        response = ids_of(source, "chosen") if slot < 3 else ids_of(source, "rejected")
        assert sequence(batch, slot) == ([5, 6, 7, 8], response.tolist())


def test_a_prompt_is_stored_again_where_a_row_does_not_hold_all_its_responses():
    data = data_of(same_prompt_examples([(3, 3)] * 5))
    index = np.arange(5)
    batch = build_batch(data, index, index, paired=True, mismatched=False, shapes=[PackedShape(3, 16)])
    assert copies_of_the_prompt(batch) == 3, "two pairs to a row"
    for slot in range(10):
        source = data.examples[slot % 5]
        response = ids_of(source, "chosen") if slot < 5 else ids_of(source, "rejected")
        assert sequence(batch, slot) == ([5, 6, 7, 8], response.tolist())


def test_prompts_that_differ_do_not_share():
    """One prompt cut to two lengths, and one that is another's start."""
    examples = same_prompt_examples([(3, 2)]) + same_prompt_examples([(3, 2)], prompt=(5, 6, 7))
    examples += same_prompt_examples([(3, 2)], prompt=(5, 6, 7, 9))
    index = np.arange(3)
    batch = build_batch(data_of(examples), index, index, paired=True, mismatched=False, shapes=[PackedShape(1, 32)])
    assert batch.segment_ids.max() == 3


def test_a_batch_without_examples_is_all_padding():
    data = data_of(examples_of_lengths([(4, 3, 3, None)]))
    index = np.array([-1, -1])
    batch = build_batch(data, index, index, paired=True, mismatched=False, shapes=[PackedShape(1, 8)])
    assert not batch.segment_ids.any()
    assert (batch.response_ids == -1).all()
    assert not batch.sides["chosen"].valid.any()
    assert not batch.sides["rejected"].valid.any()


def test_a_segment_longer_than_a_row_is_refused_by_name():
    data = data_of(examples_of_lengths([(4, 3, 3, None), (4, 4, 3, None)]))
    index = np.arange(2)
    with pytest.raises(ValueError, match=r"file:2 needs 11 tokens.*row_tokens=10"):
        build_batch(data, index, index, paired=True, mismatched=False, shapes=[PackedShape(2, 10)])
