import numpy as np
import pytest

from rpo_jax.data import reference_pass as module
from rpo_jax.data.reference_pass import ReferencePass

from .ragged import RESPONSES, changed, data_of, examples_of_lengths, sequence


def made(sizes, **arguments):
    data = data_of(examples_of_lengths(sizes))
    return data, ReferencePass(data, **{"kinds": RESPONSES, "batch_pairs": 8, **arguments})


def ragged(count=100, seed=0):
    return np.random.default_rng(seed).integers(1, 20, size=(count, 4)).tolist()


@pytest.mark.parametrize("responses", [("chosen",), ("chosen", "rejected"), ("mismatched",), RESPONSES])
def test_every_response_once(responses):
    data, sweep = made(ragged(), kinds=responses)
    reached = []
    for number in range(len(sweep)):
        batch, found = sweep.batch(number)
        assert batch.tokens.shape == sweep.shape
        assert batch.sides["chosen"].valid.sum() == len(found) == batch.response_ids.max() + 1
        for slot, index in enumerate(found):
            assert sequence(batch, slot) == (
                data.example_of(index).prompt_ids.tolist(),
                data.response(index).ids.tolist(),
            )
        reached += [(int(data.example_index[index]), data.response(index).kind) for index in found]
    assert sorted(reached) == sorted((i, name) for i in range(100) for name in responses)


def test_calls_have_one_shape_and_full_rows():
    _, sweep = made(ragged(2000), batch_pairs=32, row_tokens=128, rows_multiple=4)
    calls = [sweep.batch(number)[0] for number in range(len(sweep))]
    assert len({tuple(np.shape(part) for part in (*call[:6], *call.sides["chosen"])) for call in calls}) == 1
    assert sweep.shape.rows % 4 == 0
    full = [np.mean(call.segment_ids > 0) for call in calls[:-1]]
    assert np.mean(full) > 0.97
    assert 0.8 < sweep.shape.size / (32 * np.mean(np.sum(ragged(2000), axis=1))) < 1.3, "as many tokens as 32 examples"


def test_windows_are_packed_on_their_own(monkeypatch):
    data, whole = made(ragged())
    monkeypatch.setattr(module, "WINDOW", 30)
    _, windowed = made(ragged())
    examples = [data.example_index[sweep.batch(0)[1]] for sweep in (whole, windowed)]
    assert max(examples[1]) < 60 < max(examples[0])
    reached = np.concatenate([windowed.batch(number)[1] for number in range(len(windowed))])
    assert sorted(reached) == list(range(300))


def test_a_prompt_is_shared_by_all_its_examples():
    examples = examples_of_lengths([(30, 2, 2, None)] * 12)
    shared = [changed(e, prompt=examples[i % 2].prompt_ids) for i, e in enumerate(examples)]
    sweep = ReferencePass(data_of(shared), ("chosen", "rejected"), batch_pairs=12)
    assert len(sweep) == 1
    batch = sweep.batch(0)[0]
    assert (batch.segment_ids > 0).sum() == 2 * 30 + 12 * 4


def test_missing_responses_are_not_reached():
    data, sweep = made([(3, 2, None, None), (3, None, 4, None), (2, None, None, 3)], kinds=("chosen", "rejected"))
    assert [(data.example_index[i], data.response(i).kind) for i in sorted(sweep.batch(0)[1])] == [
        (0, "chosen"),
        (1, "rejected"),
    ]
    assert len(ReferencePass(data, ("mismatched",), batch_pairs=1)) == 1


def test_nothing_to_reach_is_no_call():
    assert len(made([(3, 2, None, None)], kinds=("rejected",))[1]) == 0


def test_an_example_longer_than_a_row_is_reached_response_by_response():
    """Responses trained apart only need rows that hold a prompt and one of them."""
    sizes = [(20, 30, 35, None)] * 10
    data, sweep = made(sizes, kinds=("chosen", "rejected"), row_tokens=64)
    reached = []
    for number in range(len(sweep)):
        batch, found = sweep.batch(number)
        for slot, index in enumerate(found):
            assert sequence(batch, slot)[1] == data.response(index).ids.tolist()
        reached += found.tolist()
    assert sorted(reached) == list(range(20))
