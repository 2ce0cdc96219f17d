from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.objectives import contrast
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


def test_a_row_that_cannot_reach_the_perplexity_ends_at_a_bound():
    low, high = contrast.TEMPERATURE_BOUNDS
    tied = np.array([0.1, 0.1, 0.1, 0.9], np.float32)
    distance = jnp.stack([tied, tied, tied, tied])
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    below = contrast.calibrated_temperature(distance, mask, 2.0)
    np.testing.assert_allclose(below[:2], [low, low], rtol=1e-5)
    above = contrast.calibrated_temperature(distance, mask, 10.0)
    weights = contrast.embedding_weights(np.eye(4), np.eye(4), above, mask)
    np.testing.assert_allclose(contrast.row_perplexity(weights, mask), [4, 3, 1, 0], atol=1e-3)
    for temperature in (below, above):
        assert np.all((temperature >= low * 0.999) & (temperature <= high * 1.001))


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
