import subprocess
import sys

import numpy as np
import pytest

from rpo_jax.data import related
from rpo_jax.data.loader import PreferenceBatches

from .ragged import RESPONSES, data_of, embedded, examples_of_lengths

TOPICS, EACH = 16, 12


def topics(seed=0, each=EACH, width=24, spread=0.25):
    """(embeddings around topics in a mixed order, each one's topic)."""
    rng = np.random.default_rng(seed)
    topic = rng.permutation(np.repeat(np.arange(TOPICS), each))
    centres = rng.normal(size=(TOPICS, width))
    return (centres[topic] + spread * rng.normal(size=(len(topic), width))).astype(np.float32), topic


def data_with(embeddings, rejected=None, lengths=(3, 4, 5, 2)):
    data = data_of(examples_of_lengths([lengths] * len(embeddings)))
    return embedded(data.examples, embeddings, rejected)


def same_topic_share(index, topic, size):
    """Share of couples within `size` neighbouring slots that are of one topic."""
    rows = topic[np.asarray(index)[: len(index) // size * size]].reshape(-1, size)
    alike = rows[:, :, None] == rows[:, None, :]
    return float((alike.sum() - alike.shape[0] * size) / (alike.shape[0] * size * (size - 1)))


def served(batches, epoch=0, side="chosen"):
    """Example of each valid slot of an epoch, batch by batch."""
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    sides = [batches.batch_at(step).sides[side] for step in steps]
    return [found.example_index[found.valid].tolist() for found in sides]


def flat(batches):
    return [index for batch in batches for index in batch]


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
@pytest.mark.parametrize("count", [192, 187, 5])
def test_every_row_once_an_epoch(pairing, count):
    embeddings, _ = topics()
    data = data_with(embeddings[:count])
    batches = PreferenceBatches(data, pairs=12, pairing=pairing, order="related", group=4, seed=1, responses=RESPONSES)
    for epoch in range(3):
        for side in ("chosen", "rejected"):
            found = served(batches, epoch, side)
            assert sorted(flat(found)) == list(range(count))
            assert [len(batch) for batch in found] == [12] * (count // 12) + [count % 12] * (count % 12 > 0)


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_a_batch_holds_neighbours_and_so_does_a_group(pairing):
    embeddings, topic = topics()
    shares = {}
    for order in ("related", "shuffled"):
        batches = PreferenceBatches(data_with(embeddings), pairs=24, pairing=pairing, order=order, group=6, seed=0)
        shares[order] = [same_topic_share(flat(served(batches)), topic, size) for size in (24, 6)]
    # 24 slots hold two topics of 12 at best, 6 slots one.
    assert shares["related"][0] > 0.3
    assert shares["related"][1] > 0.6
    assert max(shares["shuffled"]) < 0.15
    whole = PreferenceBatches(data_with(embeddings), pairs=24, pairing=pairing, order="related", seed=0)
    assert same_topic_share(flat(served(whole)), topic, 6) < shares["related"][1], "the group is what orders a batch"


def test_unpaired_sides_are_neighbours_of_each_other():
    """Chosen and rejected responses of one batch come from the same topics, though no example has both."""
    embeddings, topic = topics()
    chosen = np.arange(len(topic)) % 2 == 0
    lengths = [(3, 4, None, None) if one else (3, None, 4, None) for one in chosen]
    data = embedded(examples_of_lengths(lengths), embeddings)
    crossed = {}
    for order in ("related", "shuffled"):
        batches = PreferenceBatches(data, pairs=12, pairing="unpaired", order=order, seed=0)
        pairs = zip(served(batches), served(batches, side="rejected"), strict=True)
        crossed[order] = np.mean([topic[one][:, None] == topic[other] for one, other in pairs if len(one) == 12])
    assert crossed["related"] > 0.25
    assert crossed["shuffled"] < 0.15


@pytest.mark.parametrize(("num_chosen", "num_rejected"), [(30, 7), (7, 30)])
def test_a_smaller_pool_comes_as_often_as_in_shuffled_order_and_every_batch_is_held(num_chosen, num_rejected):
    lengths = [(3, 40 - i, None, None) for i in range(num_chosen)] + [
        (2, None, 9 + i, None) for i in range(num_rejected)
    ]
    embeddings = np.random.default_rng(0).normal(size=(len(lengths), 8)).astype(np.float32)
    data = embedded(examples_of_lengths(lengths), embeddings)
    made = {
        order: PreferenceBatches(data, pairs=8, pairing="unpaired", order=order, seed=2)
        for order in ("related", "shuffled")
    }
    for epoch in range(4):
        for side in ("chosen", "rejected"):
            got, expected = (sorted(flat(served(made[order], epoch, side))) for order in ("related", "shuffled"))
            assert got == expected


def test_epochs_and_seeds_give_other_batches():
    embeddings, _ = topics()
    batches = PreferenceBatches(data_with(embeddings), pairs=8, order="related", seed=0)
    other = PreferenceBatches(data_with(embeddings), pairs=8, order="related", seed=1)
    epochs = [served(batches, 0), served(batches, 1), served(other)]
    sets = [{frozenset(batch) for batch in epoch} for epoch in epochs]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert len(sets[one] & sets[two]) <= len(sets[one]) // 4


def test_batches_come_in_random_order():
    """Not along the tree, which would walk through the topics."""
    embeddings, topic = topics(each=24)
    batches = served(PreferenceBatches(data_with(embeddings), pairs=24, order="related", seed=0))
    commonest = [np.bincount(topic[batch], minlength=TOPICS).argmax() for batch in batches]
    neighbours = np.mean(np.diff(commonest) == 0)
    assert neighbours < 0.3


def test_a_batch_depends_on_its_step_only():
    embeddings, _ = topics()

    def fresh():
        return PreferenceBatches(data_with(embeddings), pairs=10, order="related", group=5, seed=4)

    batches = fresh()
    forward = [batches.batch_at(step).sides["chosen"].example_index for step in range(45)]
    for step in (44, 3, 21, 0):
        np.testing.assert_array_equal(batches.batch_at(step).sides["chosen"].example_index, forward[step])
        np.testing.assert_array_equal(fresh().batch_at(step).sides["chosen"].example_index, forward[step])


def test_no_rounding_of_a_machine_can_change_the_order():
    """All sums are exact: summed in another order or in more digits they are the same numbers."""
    rng = np.random.default_rng(0)
    points = related.whole_points(rng.normal(size=(300, 384)).astype(np.float32))
    lengths = np.linalg.norm(points.astype(float), axis=1)
    assert np.all(np.abs(lengths - 1024) < 12)
    direction = related._direction(points, np.random.default_rng(1))
    np.testing.assert_array_equal(direction, np.rint(direction))
    exact = points.astype(np.int64) @ direction.astype(np.int64)
    columns = rng.permutation(384)
    for got in (points.astype(np.float32) @ direction, points[:, columns].astype(np.float32) @ direction[columns]):
        np.testing.assert_array_equal(got, exact)
    backwards = related._direction(points[:, ::-1], np.random.default_rng(1))
    np.testing.assert_array_equal(backwards[::-1], direction)


def test_other_numbers_of_threads_give_the_same_order():
    code = (
        "import numpy as np, hashlib\n"
        "from rpo_jax.data.related import related_order, whole_points\n"
        "rng = np.random.default_rng(0)\n"
        "points = whole_points(rng.normal(size=(5000, 128)).astype(np.float32))\n"
        "order = related_order([points], [rng.permutation(5000)], (64, 8), (3, 1))[0]\n"
        "print(hashlib.sha256(order.tobytes()).hexdigest())"
    )
    found = set()
    for threads in ("1", "2"):
        environment = {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "PATH": ""}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1


def test_zero_vectors_and_copies_are_placed_like_any_other():
    embeddings = np.zeros((20, 6), np.float32)
    embeddings[10:] = [1, 2, 3, 4, 5, 6]
    batches = PreferenceBatches(data_with(embeddings), pairs=5, order="related", seed=0)
    found = served(batches)
    assert sorted(flat(found)) == list(range(20))
    assert all(len({index < 10 for index in batch}) == 1 for batch in found)


def test_a_pair_is_placed_by_both_of_its_embeddings():
    """Chosen texts that tell nothing: the rejected ones decide where a pair goes."""
    embeddings, topic = topics()
    same = np.tile(embeddings[:1], (len(embeddings), 1))
    batches = PreferenceBatches(data_with(same, embeddings), pairs=12, order="related", seed=0)
    assert same_topic_share(flat(served(batches)), topic, 12) > 0.4


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"width": 0}, "the data has no embeddings"), ({"group": 3}, "group=3 does not divide the 8 pairs of a batch")],
)
def test_bad_input_is_refused(changes, message):
    data = data_with(np.ones((9, changes.pop("width", 4)), np.float32))
    with pytest.raises(ValueError, match=message):
        PreferenceBatches(data, pairs=8, order="related", seed=0, **changes)
