import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rpo_jax.core.records import PreferenceData, TokenizedExample, TokenizedResponse
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.data.packing import fill_batch, plan_batch
from rpo_jax.data.reference_pass import ReferencePass
from rpo_jax.data.shapes import MAX_SHAPES, PackedShape

from .ragged import RESPONSES, changed, data_of, embedded, embeddings_of, examples_of_lengths, ids_of, sequence


def paired_data(count=10, width=0, seed=0):
    sizes = np.random.default_rng(seed).integers(1, 20, size=(count, 4))
    return data_of(examples_of_lengths(sizes.tolist()), width)


def unpaired_data(num_chosen, num_rejected):
    lengths = [(3, 4, None, 2)] * num_chosen + [(2, None, 5, None)] * num_rejected
    return data_of(examples_of_lengths(lengths))


def served(batches, epoch, side="chosen"):
    """Examples of the valid slots of an epoch, in order."""
    first = epoch * batches.steps_per_epoch
    sides = [batches.batch_at(first + step).sides[side] for step in range(batches.steps_per_epoch)]
    return [int(i) for side in sides for i in side.example_index[side.valid]]


def assert_equal(left, right):
    def arrays(batch):
        fields = [*batch[:6], *(field for side in batch.sides.values() for field in side)]
        return [field for field in fields if field is not None]

    for a, b in zip(arrays(left), arrays(right), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_every_row_once_an_epoch(pairing, order):
    batches = PreferenceBatches(paired_data(10), pairs=4, pairing=pairing, order=order, seed=3)
    assert batches.steps_per_epoch == 3
    for epoch in range(3):
        for side in ("chosen", "rejected"):
            indices = served(batches, epoch, side)
            assert sorted(indices) == list(range(10))
            assert order == "shuffled" or indices == list(range(10))


def test_paired_slots_hold_one_pair_and_unpaired_ones_are_shuffled_apart():
    paired = PreferenceBatches(paired_data(40), pairs=8, seed=0)
    assert served(paired, 0, "chosen") == served(paired, 0, "rejected")
    unpaired = PreferenceBatches(paired_data(40), pairs=8, pairing="unpaired", seed=0)
    assert served(unpaired, 0, "chosen") != served(unpaired, 0, "rejected")


def test_epochs_and_seeds_shuffle_differently():
    batches = PreferenceBatches(paired_data(40), pairs=8, seed=0)
    orders = [served(batches, 0), served(batches, 1), served(PreferenceBatches(paired_data(40), pairs=8, seed=1), 0)]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_a_batch_depends_on_its_step_only(pairing):
    def fresh():
        return PreferenceBatches(paired_data(10, width=3), pairs=4, pairing=pairing, responses=RESPONSES, seed=5)

    batches = fresh()
    forward = [batches.batch_at(step) for step in range(9)]
    for step in (7, 2, 8, 0, 5):
        assert_equal(batches.batch_at(step), forward[step])
        assert_equal(fresh().batch_at(step), forward[step])


def test_the_last_batch_of_an_epoch_is_filled_with_invalid_slots():
    batches = PreferenceBatches(paired_data(10, width=3), pairs=4, responses=RESPONSES, seed=0)
    batch = batches.batch_at(2)
    for side in batch.sides.values():
        assert side.valid.tolist() == [True, True, False, False]
        assert side.example_index[2:].tolist() == side.prompt_id[2:].tolist() == side.text_id[2:].tolist() == [-1, -1]
        assert not side.embedding[2:].any()
        assert not side.reference_log_prob[2:].any()
    assert set(np.unique(batch.response_ids)) == {-1, 0, 1, 4, 5, 8, 9}


@pytest.mark.parametrize(
    ("responses", "sizes"), [(("chosen",), (4, 0, 0)), (("rejected", "chosen"), (4, 4, 0)), (RESPONSES, (4, 4, 4))]
)
def test_slots_follow_the_responses_asked_for(responses, sizes):
    batches = PreferenceBatches(paired_data(9, width=2), pairs=4, responses=responses, seed=0)
    for step in range(3):
        batch = batches.batch_at(step)
        assert tuple(len(batch.sides[kind].valid) if kind in batch.sides else 0 for kind in RESPONSES) == sizes
        assert {side.embedding.shape[1] for side in batch.sides.values()} == {2}
        assert batch.response_ids.max() < sum(sizes)


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_each_slot_holds_its_example(pairing):
    data = paired_data(13)
    batches = PreferenceBatches(data, pairs=5, pairing=pairing, responses=RESPONSES, seed=2)
    for step in range(batches.steps_per_epoch):
        batch = batches.batch_at(step)
        assert batch.sides["mismatched"].example_index.tolist() == batch.sides["chosen"].example_index.tolist()
        for side, name in enumerate(RESPONSES):
            slots = batch.sides[name]
            for slot in np.flatnonzero(slots.valid):
                source = data.examples[slots.example_index[slot]]
                prompt, response = sequence(batch, 5 * side + slot)
                assert prompt == source.prompt_ids.tolist()
                assert response == ids_of(source, name).tolist()


@pytest.mark.parametrize(("num_chosen", "num_rejected"), [(11, 4), (4, 11)])
def test_the_smaller_pool_goes_round_in_a_new_order(num_chosen, num_rejected):
    batches = PreferenceBatches(unpaired_data(num_chosen, num_rejected), pairs=3, pairing="unpaired", seed=0)
    assert batches.steps_per_epoch == 4
    streams = {side: [i for epoch in range(4) for i in served(batches, epoch, side)] for side in ("chosen", "rejected")}
    pools = {"chosen": range(num_chosen), "rejected": range(num_chosen, num_chosen + num_rejected)}
    for side, stream in streams.items():
        size = len(pools[side])
        rounds = [stream[start : start + size] for start in range(0, 44 - size + 1, size)]
        assert all(sorted(once) == list(pools[side]) for once in rounds)
        assert len({tuple(once) for once in rounds}) > 1
    last = batches.batch_at(3)
    assert last.sides["chosen"].valid.tolist() == last.sides["rejected"].valid.tolist() == [True, True, False]


def test_unpaired_data_without_rejected_responses_serves_sft():
    batches = PreferenceBatches(unpaired_data(5, 3), pairs=2, pairing="unpaired", responses=("chosen",), seed=0)
    assert batches.steps_per_epoch == 3
    assert sorted(served(batches, 0)) == [0, 1, 2, 3, 4]


def test_reference_log_probs_come_from_the_column_of_their_response():
    data = paired_data(6)
    table = np.arange(18, dtype=np.float32).reshape(6, 3)
    data = embedded(data.examples, embeddings_of(data, "chosen"), embeddings_of(data, "rejected"), table)
    batch = PreferenceBatches(data, pairs=6, pairing="unpaired", responses=RESPONSES, seed=1).batch_at(0)
    for column, side in enumerate((batch.sides["chosen"], batch.sides["rejected"], batch.sides["mismatched"])):
        assert side.reference_log_prob.tolist() == table[side.example_index, column].tolist()


def test_row_tokens_go_up_to_the_longest_segment_rounded_up():
    data = data_of(examples_of_lengths([(3, 4, 5, 6), (30, 20, 14, 60)]))

    def longest(**arguments):
        return max(shape.tokens for shape in PreferenceBatches(data, pairs=1, seed=0, **arguments).shapes)

    assert longest() == 64
    assert longest(responses=RESPONSES) == 128
    assert PreferenceBatches(data, pairs=1, seed=0, row_tokens=65).batch_at(0).tokens.shape[1] == 65
    with pytest.raises(ValueError, match=r"file:2 needs 64 tokens.*batch.row_tokens=63; raise it to 64"):
        PreferenceBatches(data, pairs=1, seed=0, row_tokens=63)


def skewed_lengths(count=400):
    sizes = np.random.default_rng(1).lognormal(3, 0.8, size=(count, 4)).clip(max=100).astype(int) + 1
    return data_of(examples_of_lengths(sizes.tolist()))


def share_of_tokens(batches, steps):
    """Share of all positions of these batches that hold a token, and their shapes."""
    made = [batches.batch_at(step) for step in steps]
    tokens = sum(int((batch.segment_ids > 0).sum()) for batch in made)
    return tokens / sum(batch.tokens.size for batch in made), {batch.tokens.shape for batch in made}


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
@pytest.mark.parametrize(("rows_multiple", "row_tokens"), [(1, None), (4, None), (1, 320)])
def test_few_shapes_all_of_them_announced(pairing, rows_multiple, row_tokens):
    batches = PreferenceBatches(
        skewed_lengths(), pairs=32, pairing=pairing, seed=0, row_tokens=row_tokens, rows_multiple=rows_multiple
    )
    share, used = share_of_tokens(batches, range(20 * batches.steps_per_epoch))
    assert used <= set(batches.shapes)
    assert len(batches.shapes) <= MAX_SHAPES + 1
    assert batches.shapes == tuple(sorted(batches.shapes, key=lambda shape: shape.size))
    assert all(shape.rows % rows_multiple == 0 for shape in batches.shapes)
    assert row_tokens is None or {shape.tokens for shape in batches.shapes} == {row_tokens}
    assert share > (0.85 if rows_multiple == 1 else 0.8)


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_the_largest_shape_holds_the_worst_batch(pairing):
    """32 long segments among 3,000 short ones, in one batch although no sampled one has them together."""
    sizes = [(1, 2, 2, None)] * 3000 + [(40, 30, 30, None)] * 32
    batches = PreferenceBatches(data_of(examples_of_lengths(sizes)), pairs=32, pairing=pairing, seed=0)
    assert len(batches.shapes) > 1, "they are chosen by the real batches"
    worst = np.arange(3000, 3032)
    batches._indices = lambda _: dict.fromkeys(batches._pools, worst)
    assert batches.batch_at(0).tokens.shape == batches.shapes[-1]


def test_the_largest_shape_holds_a_small_pool_that_comes_round_within_a_batch():
    """Five long rejected responses for 200 short chosen ones: a batch of 32 holds each of them six or seven times."""
    sizes = [(4, 4, None, None)] * 200 + [(8, None, 120, None)] * 5
    batches = PreferenceBatches(
        data_of(examples_of_lengths(sizes)), pairs=32, pairing="unpaired", seed=0, row_tokens=128
    )
    rows = max(batches.batch_at(step).tokens.shape[0] for step in range(40))
    assert rows >= 32, "every rejected response fills a row"
    assert batches.shapes[-1].rows > rows


def test_responses_to_one_prompt_share_it_across_a_batch():
    """Four pairs to each prompt: a batch in file order stores every prompt once, and needs fewer rows for it."""
    examples = examples_of_lengths([(40, 5, 5, None)] * 16)
    shared = [changed(e, prompt=examples[i // 4].prompt_ids) for i, e in enumerate(examples)]
    sizes = []
    for data in (data_of(examples), data_of(shared)):
        batch = PreferenceBatches(data, pairs=8, order="sequential", seed=0, row_tokens=128).batch_at(0)
        sizes.append((int((batch.segment_ids > 0).sum()), batch.tokens.size))
    (tokens, positions), (shared_tokens, shared_positions) = sizes
    assert tokens == 8 * 50
    assert shared_tokens == 2 * 40 + 8 * 10
    assert (positions, shared_positions) == (4 * 128, 2 * 128)


def test_a_pair_that_lacks_a_side_is_refused_by_name():
    data = data_of(examples_of_lengths([(1, 1, 1, None), (1, 1, 1, None), (1, None, 1, None)]))
    with pytest.raises(ValueError, match=r"file:3 has no chosen response.*data.pairing: unpaired"):
        PreferenceBatches(data, pairs=2, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": 0}, "pairs=0"),
        ({"pairing": "both"}, "pairing='both' is unknown; use one of paired, unpaired"),
        ({"order": "random"}, "order='random' is unknown"),
        ({"responses": ("rejected",)}, "must hold chosen"),
        ({"responses": ("chosen", "best")}, "none but chosen, rejected, mismatched"),
        ({"responses": RESPONSES}, "file:1 has no mismatched response; tokenise the data with mismatched=True"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    data = data_of(examples_of_lengths([(1, 1, 1, None)]))
    with pytest.raises(ValueError, match=message):
        PreferenceBatches(data, **{"pairs": 1, "seed": 0, **arguments})


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="None of the 3 examples has a rejected response"):
        PreferenceBatches(unpaired_data(3, 0), pairs=1, pairing="unpaired", seed=0)


def test_a_sweep_over_unequal_pools_has_every_response_once():
    data = unpaired_data(7, 3)
    batches = PreferenceBatches(data, pairs=2, pairing="unpaired", order="sequential", once=True, seed=0)
    assert batches.steps_per_epoch == 4
    for epoch in (0, 1):
        assert served(batches, epoch, "chosen") == [0, 1, 2, 3, 4, 5, 6]
        assert served(batches, epoch, "rejected") == [7, 8, 9]


def test_training_in_file_order_compares_something_in_every_step():
    batches = PreferenceBatches(unpaired_data(7, 3), pairs=2, pairing="unpaired", order="sequential", seed=0)
    for epoch in (0, 1):
        assert served(batches, epoch, "chosen") == [0, 1, 2, 3, 4, 5, 6]
        assert served(batches, epoch, "rejected") == [7, 8, 9, 7, 8, 9, 7]


def many_responses(mismatched=False):
    """Two examples with a prompt and several responses of one kind, every token of them a different one."""
    rng, made, first = np.random.default_rng(3), [], 10
    for number, kinds in enumerate(("chosen rejected chosen chosen rejected", "rejected chosen")):
        responses = []
        for kind in kinds.split() + ["mismatched"] * mismatched:
            tokens = np.arange(first, first + rng.integers(2, 6), dtype=np.int32)
            first += len(tokens)
            responses.append(TokenizedResponse(kind, tokens, first))
        prompt = np.array([1, 2, 3 + number], np.int32)
        made.append(TokenizedExample(f"file:{number + 1}", number, (prompt,), tuple(responses)))
    return PreferenceData(made, reference_log_probs=np.arange(7 + 2 * mismatched, dtype=np.float32))


def test_several_responses_of_one_kind_share_a_segment():
    data = many_responses()
    drawn = {kind: data.of_kind(kind) for kind in ("chosen", "rejected")}
    plan = plan_batch(data, [drawn], [PackedShape(1, 64)])
    batch = fill_batch(plan, data, [drawn])
    assert batch.segment_ids.max() == 2, "each prompt once"
    assert batch.branch_ids.max() == 5
    assert {kind: len(side.valid) for kind, side in batch.sides.items()} == {"chosen": 4, "rejected": 3}
    for slot, number in enumerate(np.concatenate([*drawn.values()])):
        expected = data.example_of(number).prompt_ids.tolist(), data.response(number).ids.tolist()
        assert sequence(batch, slot) == expected


def test_a_reference_pass_reaches_several_responses_of_one_kind():
    data = many_responses()
    batches = ReferencePass(data, ("chosen", "rejected"), batch_pairs=2)
    batch, numbers = batches.batch(0)
    assert len(batches) == 1
    assert sorted(numbers) == list(range(7))
    for slot, number in enumerate(numbers):
        assert sequence(batch, slot)[1] == data.response(number).ids.tolist()


def test_unpaired_pools_hold_every_response_of_a_kind():
    data = many_responses(mismatched=True)
    batches = PreferenceBatches(data, pairs=2, pairing="unpaired", responses=RESPONSES, seed=0)
    assert batches.steps_per_epoch == 2
    seen = {kind: [] for kind in RESPONSES}
    for step in range(batches.steps_per_epoch):
        batch = batches.batch_at(step)
        np.testing.assert_array_equal(
            batch.sides["mismatched"].example_index, batch.sides["chosen"].example_index, "the example's own"
        )
        for kind, slots in batch.slots().items():
            side = batch.sides[kind]
            for slot in np.flatnonzero(side.valid):
                number = int(side.reference_log_prob[slot])  # as made above
                assert data.response(number).kind == kind
                assert sequence(batch, slots.start + slot)[1] == data.response(number).ids.tolist()
                seen[kind].append(number)
    assert sorted(seen["chosen"]) == data.of_kind("chosen").tolist()
    assert sorted(set(seen["rejected"])) == data.of_kind("rejected").tolist(), (
        "three in an epoch of four: one comes twice"
    )


def test_a_pair_is_the_first_response_of_each_kind():
    data = many_responses()
    batch = PreferenceBatches(data, pairs=2, order="sequential", seed=0).batch_at(0)
    for kind, slots in batch.slots().items():
        for slot, example in enumerate(data.examples):
            assert sequence(batch, slots.start + slot)[1] == ids_of(example, kind).tolist()


def test_a_draw_of_a_group_is_a_prompt_with_all_its_responses():
    """The two prompts of `many_responses` in a batch: slots for the most that one has of each kind."""
    data = many_responses()
    batches = PreferenceBatches(data, pairs=2, pairing="grouped", seed=0)
    held = {kind: np.bincount(data.example_index[data.of_kind(kind)], minlength=2) for kind in ("chosen", "rejected")}
    for step in range(3):
        batch, order = batches.batch_at(step), set()
        assert batches.steps_per_epoch == 1
        for kind, slots in batch.slots().items():
            side = batch.sides[kind]
            assert len(side.valid) == 2 * held[kind].max()
            for place, of in enumerate(np.split(np.arange(len(side.valid)), 2)):
                (example,) = set(side.example_index[of][side.valid[of]].tolist())
                order.add((place, example))
                numbers = [n for n in data.of_kind(kind) if data.example_index[n] == example]
                filled = of[side.valid[of]]
                assert filled.tolist() == of[: len(numbers)].tolist(), "side by side"
                for slot, number in zip(filled, numbers, strict=True):
                    prompt, response = sequence(batch, slots.start + slot)
                    assert response == data.response(number).ids.tolist()
                    assert prompt == data.example_of(number).prompt_ids.tolist()
        assert len(order) == 2, "both kinds have their prompts in the same places"
        assert batch.segment_ids.max() == 2, "each prompt once"


def test_a_group_that_is_longer_than_a_row_has_its_prompt_in_several():
    data = many_responses()
    longest = int(data.flat.response_tokens.max()) + 3
    batches = PreferenceBatches(data, pairs=2, pairing="grouped", seed=0, row_tokens=longest)
    batch = batches.batch_at(0)
    seen = sorted(
        sequence(batch, slot)[1]
        for slots in batch.slots().values()
        for slot in range(slots.start, slots.stop)
        if (batch.response_ids == slot).any()
    )
    assert seen == sorted(data.response(n).ids.tolist() for n in range(data.num_responses))
    with pytest.raises(
        ValueError, match=rf"file:\d needs {longest} tokens .* more than batch.row_tokens={longest - 1}"
    ):
        PreferenceBatches(data, pairs=2, pairing="grouped", seed=0, row_tokens=longest - 1)


@pytest.mark.parametrize("order", ["shuffled", "sequential", "related"])
def test_groups_come_once_an_epoch(order):
    data = paired_data(10, width=4)
    batches = PreferenceBatches(data, pairs=4, pairing="grouped", order=order, seed=1)
    for side in ("chosen", "rejected"):
        assert sorted(served(batches, 1, side)) == list(range(10))
    assert served(batches, 0, "chosen") == served(batches, 0, "rejected")


def test_groups_without_any_rejected_response_are_refused():
    with pytest.raises(ValueError, match="None of the 3 examples has a rejected response"):
        PreferenceBatches(unpaired_data(3, 0), pairs=2, pairing="grouped", seed=0)


def test_numbers_of_rows_are_in_the_slots_of_their_responses():
    data = many_responses()
    numbers = np.arange(7, dtype=np.float32)
    data = PreferenceData(data.examples, row_values={"weight": numbers + 1})
    batch = PreferenceBatches(data, pairs=2, pairing="grouped", seed=0).batch_at(0)
    for kind, slots in batch.slots().items():
        side = batch.sides[kind]
        for slot, valid in enumerate(side.valid):
            value = side.row_values["weight"][slot]
            assert (value > 0) == valid
            if valid:
                assert sequence(batch, slots.start + slot)[1] == data.response(int(value) - 1).ids.tolist()


def mixed_data(counts):
    """Examples of several sources, one after another."""
    return replace(paired_data(sum(counts)), source=np.repeat(np.arange(len(counts)), counts))


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_an_epoch_of_a_mixture_takes_each_source_by_its_weight(pairing):
    batches = PreferenceBatches(mixed_data([8, 10, 5]), pairs=4, pairing=pairing, weights=(0.5, 1, 2), seed=0)
    assert (batches.epoch_draws, batches.steps_per_epoch) == (4 + 10 + 10, 6)
    for side in ("chosen", "rejected"):
        epochs = [Counter(served(batches, epoch, side)) for epoch in range(4)]
        for counts in epochs:
            assert [counts[i] for i in range(8, 23)] == [1] * 10 + [2] * 5
            assert sum(counts[i] for i in range(8)) == 4
        # Half of the first source in one epoch, the other half in the next, and other halves after that.
        assert [{*first, *second} >= set(range(8)) for first, second in itertools.pairwise(epochs)][::2] == [True, True]
        assert {i for i in epochs[0] if i < 8} != {i for i in epochs[2] if i < 8}


def test_a_batch_of_a_mixture_depends_on_its_step_only():
    arguments = {"pairs": 4, "weights": (0.3, 2.5), "seed": 1}
    batches = PreferenceBatches(mixed_data([9, 7]), **arguments)
    for step in (17, 3, 0, 17):
        assert_equal(batches.batch_at(step), PreferenceBatches(mixed_data([9, 7]), **arguments).batch_at(step))
    other = PreferenceBatches(mixed_data([9, 7]), **arguments | {"seed": 2})
    assert served(other, 0) != served(batches, 0)


def test_neighbours_and_the_worst_batch_of_a_mixture_fit():
    lengths = [(3, 2, 2, 2)] * 12 + [(60, 60, 60, 60)]
    data = replace(data_of(examples_of_lengths(lengths), 2), source=np.repeat([0, 1], [12, 1]))
    for order in ("shuffled", "related"):
        batches = PreferenceBatches(data, pairs=4, weights=(1, 8), order=order, seed=0)
        assert Counter(i for step in range(5) for i in served_at(batches, step))[12] == 8
        assert all(batches.batch_at(step).tokens.shape in shapes_of(batches) for step in range(10))


def served_at(batches, step):
    side = batches.batch_at(step).sides["chosen"]
    return side.example_index[side.valid].tolist()


def shapes_of(batches):
    return {(shape.rows, shape.tokens) for shape in batches.shapes}
