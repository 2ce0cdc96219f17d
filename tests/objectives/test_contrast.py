from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.objectives import contrast, losses
from tests.objectives import oracle


def related_embeddings(rng, topics, rows, width=32, spread=0.6):
    """Unit vectors around a few topics, as prompts of a real data set lie."""
    centres = rng.normal(size=(topics, width))
    emb = centres[rng.integers(topics, size=rows)] + spread * rng.normal(size=(rows, width))
    return (emb / np.linalg.norm(emb, axis=1, keepdims=True)).astype(np.float32)


def draw(seed, m=6, n=9, masked=0.3):
    rng = np.random.default_rng(seed)
    mask = rng.random((m, n)) > masked
    mask[1] = False  # a padded chosen response
    mask[:, 2] = False
    return related_embeddings(rng, 3, m), related_embeddings(rng, 3, n), jnp.asarray(mask)


def test_cosine_agrees_with_the_oracle_at_any_length():
    chosen, rejected, _ = draw(0)
    expected = oracle.cosine(chosen, rejected)
    np.testing.assert_allclose(contrast.cosine(1e3 * chosen, 1e-3 * rejected), expected, atol=1e-6)
    np.testing.assert_allclose(contrast.cosine_distance(chosen, rejected), 1 - expected, atol=1e-6)
    assert float(contrast.cosine_distance(chosen, chosen).min()) >= 0
    assert contrast.cosine(jnp.asarray(chosen, jnp.bfloat16), rejected).dtype == jnp.float32


def test_a_zero_vector_is_related_to_nothing_and_has_a_finite_gradient():
    chosen, rejected, mask = draw(1)
    chosen[0] = 0
    np.testing.assert_array_equal(contrast.cosine(chosen, rejected)[0], 0)
    gradient = jax.grad(lambda c: jnp.sum(contrast.embedding_weights(c, rejected, mask=mask) ** 2))(chosen)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("temperature", [0.01, 0.5, 0.75, 10.0])
def test_embedding_weights_agree_with_the_oracle(temperature):
    for seed in range(3):
        chosen, rejected, mask = draw(seed)
        got = contrast.embedding_weights(chosen, rejected, temperature, mask)
        expected = oracle.embedding_weights(chosen, rejected, temperature, np.asarray(mask))
        np.testing.assert_allclose(got, expected, rtol=1e-5 if temperature >= 0.5 else 2e-4)
        np.testing.assert_allclose(got.sum(axis=1), np.any(mask, axis=1), rtol=1e-6)


def test_a_temperature_per_row_is_that_rows_temperature():
    chosen, rejected, mask = draw(2)
    rows = np.linspace(0.2, 2.0, len(chosen)).astype(np.float32)
    expected = oracle.embedding_weights(chosen, rejected, rows, np.asarray(mask))
    for temperature in (rows, rows[:, None]):
        got = contrast.embedding_weights(chosen, rejected, jnp.asarray(temperature), mask)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_high_temperature_is_uniform_and_a_low_one_the_nearest():
    chosen, rejected, mask = draw(3)
    flat = contrast.embedding_weights(chosen, rejected, 1e6, mask)
    np.testing.assert_allclose(flat, contrast.uniform_weights(mask), rtol=1e-5)
    sharp = contrast.embedding_weights(chosen, rejected, 1e-6, mask)
    nearest = jnp.argmax(jnp.where(mask, contrast.cosine(chosen, rejected), -2), axis=1)
    expected = jax.nn.one_hot(nearest, mask.shape[1]) * jnp.any(mask, axis=1, keepdims=True)
    np.testing.assert_allclose(sharp, expected, atol=1e-6)


def test_masked_garbage_changes_no_weight():
    chosen, rejected, mask = draw(4)
    clean = contrast.embedding_weights(chosen, rejected, mask=mask)
    chosen[1], rejected[2] = np.nan, np.inf
    np.testing.assert_array_equal(contrast.embedding_weights(chosen, rejected, mask=mask), clean)


@pytest.mark.parametrize("perplexity", [1.5, 6.0, 40.0])
@pytest.mark.parametrize("topics", [4, 1000])
def test_a_calibrated_temperature_gives_the_perplexity(perplexity, topics):
    rng = np.random.default_rng(topics)
    chosen, rejected = (related_embeddings(rng, topics, size) for size in (24, 96))
    mask = jnp.asarray(rng.random((24, 96)) > 0.2)
    distance = contrast.cosine_distance(chosen, rejected)
    temperature = jax.jit(contrast.calibrated_temperature, static_argnums=2)(distance, mask, perplexity)
    weights = contrast.embedding_weights(chosen, rejected, temperature, mask)

    def exact_perplexity(temperature):
        weights = oracle.embedding_weights(chosen, rejected, temperature, np.asarray(mask))
        return np.array([oracle.row_perplexity(row) for row in weights])

    reachable = exact_perplexity(contrast.TEMPERATURE_BOUNDS[0]) < perplexity - 0.1
    assert reachable.sum() >= 23  # two neighbours as good as tied are rare
    np.testing.assert_allclose(contrast.row_perplexity(weights, mask)[reachable], perplexity, atol=1e-3)
    np.testing.assert_allclose(exact_perplexity(np.asarray(temperature))[reachable], perplexity, atol=1e-3)


def rows_at(cosines):
    """Embeddings of one prompt a row and of others with that row's cosines to it, [G, 1, E] and [G, N, E]."""
    cosines = np.asarray(cosines, np.float64)
    chosen = np.tile([1.0, 0.0], (len(cosines), 1, 1))
    rejected = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=-1)
    return chosen.astype(np.float32), rejected.astype(np.float32)


def hard_rows(rng, size=2048):
    """Rows of cosines that make a temperature hard to find: near-copies, a far-off crowd, ties, one in front."""
    crowd = 0.2 + 0.1 * rng.normal(size=size)
    return {
        "random": rng.uniform(-1, 1, size),
        "narrow": 0.3 + 0.05 * rng.random(size),
        "copies": np.r_[np.ones(5), crowd[5:]],
        "near-copies": np.r_[1 - 1e-3 * rng.random(5), crowd[5:]],
        "one in front": np.r_[0.99, crowd[1:] / 10],
        "far crowd": np.r_[0.9, 0.8, 0.7, -0.9 - 0.05 * rng.random(size - 3)],
        "two crowds": np.r_[0.8 + 0.01 * rng.random(size // 2), -0.5 + 0.01 * rng.random(size - size // 2)],
    }


@pytest.mark.parametrize("perplexity", [5.5, 6.0, 40.0, 500.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_hard_rows_are_calibrated_to_a_thousandth(perplexity, seed):
    rows = hard_rows(np.random.default_rng(seed))
    chosen, rejected = rows_at([np.clip(row, -1, 1) for row in rows.values()])
    mask = jnp.ones((len(rows), 1, 2048), bool)

    matrix = contrast.make_weights(
        "embedding", chosen, rejected, mask, temperature=None, perplexity=perplexity, alpha=0.8
    )
    # Of the weights themselves: distances that another program computes are rounded otherwise. A float32 sum of 2,048
    # numbers one after another, as some processors' programs have it, is exact to 1e-5.
    weights = np.asarray(matrix.weights, np.float64)[:, 0]
    exact = [oracle.row_perplexity(row / row.sum()) for row in weights]
    np.testing.assert_allclose(exact, perplexity, rtol=1e-5, atol=1e-3, err_msg=str(list(rows)))
    np.testing.assert_array_equal(matrix.perplexity_error, 0)


def test_a_row_that_cannot_reach_the_perplexity_takes_the_nearest_that_it_can_and_says_by_how_much():
    tied = [0.9, 0.9, 0.9, 0.1]
    chosen, rejected = rows_at([tied, tied, tied, tied])
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)[:, None]
    low, high = contrast.TEMPERATURE_BOUNDS
    expected = {
        2.0: ([[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0], [0] * 4], [1, 1, -1, 0]),
        10.0: ([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [0] * 4], [-6, -7, -9, 0]),
    }
    for perplexity, (alike, error) in expected.items():
        matrix = contrast.make_weights(
            "embedding", chosen, rejected, mask, temperature=None, perplexity=perplexity, alpha=0.8
        )
        alike = np.array(alike)[:, None] / np.maximum(np.sum(alike, axis=1), 1)[:, None, None]
        np.testing.assert_allclose(matrix.weights, alike, atol=1e-3)
        np.testing.assert_allclose(matrix.perplexity_error[:, 0], error, atol=1e-3)
        assert np.all((matrix.temperature >= low * 0.999) & (matrix.temperature <= high * 1.001))


def test_a_row_with_just_as_many_entries_as_wanted_is_calibrated():
    chosen, rejected = rows_at([[0.9, 0.5, 0.1, -0.8], [0.3, 0.3, 0.3, 0.3]])
    matrix = contrast.make_weights(
        "embedding", chosen, rejected, jnp.ones((2, 1, 4), bool), temperature=None, perplexity=4.0, alpha=0.8
    )
    np.testing.assert_allclose(matrix.weights, 0.25, atol=1e-3)
    np.testing.assert_array_equal(matrix.perplexity_error, 0)


def test_solving_for_a_temperature_leaves_the_loss_and_its_gradient_to_the_weights_alone():
    """The gradient is that of the same weights given as numbers: none goes through the bisection."""
    chosen, rejected, mask = draw(9)
    log_ratios = np.random.default_rng(9).normal(size=(2, 9)).astype(np.float32)
    make = partial(contrast.make_weights, "embedding", temperature=None, perplexity=2.0, alpha=0.8)

    def loss(chosen_ratio, rejected_ratio, weights):
        return losses.pairwise_loss(chosen_ratio, rejected_ratio, weights, beta=0.5, link="logistic", mask=mask)

    def inside(chosen_ratio, rejected_ratio):
        return loss(chosen_ratio, rejected_ratio, make(chosen, rejected, mask).weights)

    ratios = log_ratios[0, : mask.shape[0]], log_ratios[1]
    weights = make(chosen, rejected, mask).weights
    got = jax.jit(jax.value_and_grad(inside, argnums=(0, 1)))(*ratios)
    expected = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*ratios, weights)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)
    assert float(jnp.abs(got[1][0]).max()) > 0


def test_masked_distances_do_not_move_a_temperature():
    chosen, rejected, mask = draw(5, masked=0.5)
    distance = contrast.cosine_distance(chosen, rejected)
    dirty = jnp.where(mask, distance, jnp.nan)
    expected = contrast.calibrated_temperature(distance, mask, 2.0)
    np.testing.assert_array_equal(contrast.calibrated_temperature(dirty, mask, 2.0), expected)


def test_uniform_and_diagonal_weights_agree_with_the_oracle():
    rng = np.random.default_rng(6)
    mask = rng.random((6, 6)) > 0.4
    mask[0], mask[1] = False, np.arange(6) == 1
    np.testing.assert_allclose(contrast.uniform_weights(jnp.asarray(mask)), oracle.uniform_weights(mask), rtol=1e-6)
    for alpha in (0.0, 0.8, 1.0):
        got = contrast.diagonal_weights(6, alpha, jnp.asarray(mask))
        np.testing.assert_allclose(got, oracle.diagonal_weights(mask, alpha), rtol=1e-6)
    np.testing.assert_allclose(contrast.diagonal_weights(3), [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    np.testing.assert_allclose(contrast.diagonal_weights(1), [[0.8]])


def test_only_the_same_text_to_the_same_prompt_is_no_contrast():
    valid = contrast.valid_entries(
        jnp.array([True, True, True]),
        jnp.array([True, True, False]),
        jnp.array([7, 7, 8]),
        jnp.array([7, 8, 8]),
        jnp.array([1, 2, 2]),
        jnp.array([1, 2, 3]),
    )
    np.testing.assert_array_equal(valid, [[False, True, False], [True, True, False], [True, False, False]])


def test_perplexity_counts_contrasts():
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(contrast.row_perplexity(contrast.uniform_weights(mask), mask), [4, 2, 1, 0], rtol=1e-6)
    weights = np.array([[0.5, 0.2, 0.2, 0.1]], np.float32)
    expected = oracle.row_perplexity(weights[0])
    np.testing.assert_allclose(contrast.row_perplexity(2 * weights, jnp.ones((1, 4), bool)), [expected], rtol=1e-6)


def test_leading_dimensions_are_independent_groups():
    rng = np.random.default_rng(7)
    emb = rng.normal(size=(2, 3, 4, 8)).astype(np.float32)
    mask = jnp.asarray(rng.random((3, 4, 4)) > 0.2)
    for kind in contrast.WEIGHTS:
        make = jax.jit(partial(contrast.make_weights, kind, temperature=None, perplexity=2.0, alpha=0.8))
        together = make(*emb, mask)
        for g in range(3):
            alone = make(*emb[:, g], mask[g])
            for one, other in zip(alone, together, strict=True):
                if one is not None:
                    np.testing.assert_allclose(one, other[g], rtol=1e-5)


def test_make_weights_reports_each_rows_temperature():
    chosen, rejected, mask = draw(8)
    fixed = contrast.make_weights("embedding", chosen, rejected, mask, temperature=0.5, perplexity=None, alpha=0.8)
    np.testing.assert_array_equal(fixed.temperature, np.full(6, 0.5, np.float32))
    np.testing.assert_array_equal(fixed.weights, contrast.embedding_weights(chosen, rejected, 0.5, mask))
    solved = contrast.make_weights("embedding", chosen, rejected, mask, temperature=None, perplexity=3.0, alpha=0.8)
    distance = contrast.cosine_distance(chosen, rejected)
    np.testing.assert_array_equal(solved.temperature, contrast.calibrated_temperature(distance, mask, 3.0))
    uniform = contrast.make_weights("uniform", chosen, rejected, mask, temperature=None, perplexity=3.0, alpha=0.8)
    assert uniform.temperature is None


SQUARE, WIDE = jnp.ones((2, 2), bool), jnp.ones((2, 3), bool)
SETTINGS = {"temperature": 0.5, "perplexity": None, "alpha": 0.8}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: contrast.embedding_weights(e, e, 0.0), "temperature=0.0 must be greater than 0"),
        (lambda e: contrast.calibrated_temperature(jnp.ones((2, 2)), None, 0.5), "perplexity=0.5 must be at least 1"),
        (lambda e: contrast.diagonal_weights(3, mask=SQUARE), "m=3 pairs got a mask of 2 by 2"),
        (lambda e: contrast.diagonal_weights(2, mask=WIDE), "diagonal weights need paired data"),
        (lambda e: contrast.pair_weights(WIDE), "pair weights need paired data"),
        (lambda e: contrast.make_weights("near", e, e, SQUARE, **SETTINGS), "unknown contrast weights 'near'"),
        (
            lambda e: contrast.make_weights("embedding", e, e, SQUARE, **SETTINGS | {"perplexity": 6.0}),
            "and not both",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.eye(2, dtype=np.float32))
