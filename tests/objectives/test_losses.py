from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.config import Config, ContrastConfig, ObjectiveConfig
from rpo_jax.objectives import contrast, losses
from tests.data.ragged import RESPONSES
from tests.objectives import laws, oracle

M, N = 5, 5
SCALES = {"small": 3.0, "large": 500.0, "extreme": 1e4}


def draw(seed, scale=3.0, masked=0.3):
    rng = np.random.default_rng(seed)
    chosen, rejected = (rng.uniform(-scale, scale, size).astype(np.float32) for size in (M, N))
    if scale > 100:
        chosen[:2], rejected[:2] = (scale, -scale), (-scale, scale)
    mask = rng.random((M, N)) > masked
    mask[np.diag_indices(M)] = True
    mask[-1] = False  # a padded chosen response
    mask[:, -1] = False
    return chosen, rejected, mask, rng.normal(size=(2, M, 8)).astype(np.float32)


WEIGHTINGS = {
    "embedding": lambda emb, mask: (oracle.embedding_weights(*emb, 0.5, mask), mask),
    "uniform": lambda emb, mask: (oracle.uniform_weights(mask), mask),
    "diagonal": lambda emb, mask: (oracle.diagonal_weights(mask, 0.8), mask),
    "pair": lambda emb, mask: (np.eye(M) * mask, mask & np.eye(M, dtype=bool)),
}


@partial(jax.jit, static_argnames=("link", "weights_on"))
def value_and_gradients(chosen, rejected, weights, mask, link, weights_on="score"):
    def loss(c, r):
        return losses.pairwise_loss(c, r, weights, 0.1, link, mask, label_smoothing=0.2, weights_on=weights_on)

    value, gradients = jax.value_and_grad(loss, (0, 1))(chosen, rejected)
    return value, *gradients


def assert_agree(ours, expected, rtol=1e-5):
    """Relative to each value; where terms of both signs cancel, to the largest of its array; down to subnormals."""
    for got, want in zip(ours, expected, strict=True):
        smallest = max(1e-7 * np.max(np.abs(want)), np.finfo(np.float32).tiny)
        np.testing.assert_allclose(got, want, rtol=rtol, atol=smallest)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("weights_on", ["score", "loss"])
@pytest.mark.parametrize("link", losses.LINKS)
def test_every_link_on_every_weighting_agrees_with_the_oracle(link, weights_on, weighting, scale):
    for seed in range(3):
        chosen, rejected, mask, emb = draw(seed, SCALES[scale])
        expected_weights, mask = WEIGHTINGS[weighting](emb, mask)
        kwargs = {"temperature": 0.5, "perplexity": None, "alpha": 0.8}
        weights, valid = contrast.make_weights(weighting, *emb, jnp.asarray(mask), **kwargs)[:2]
        np.testing.assert_array_equal(valid, mask)
        expected = oracle.pairwise(chosen, rejected, expected_weights, mask, 0.1, link, 0.2, weights_on)
        assert_agree(value_and_gradients(chosen, rejected, weights, valid, link, weights_on), expected)


def test_the_oracles_gradients_are_those_of_its_losses():
    chosen, rejected, mask, _ = draw(0)
    chosen, rejected = chosen.astype(np.float64), rejected.astype(np.float64)
    num_tokens, weights, step = np.arange(3, 3 + M), oracle.uniform_weights(mask), 1e-6
    masks = (mask.any(1), mask.any(0), np.zeros(0, bool))
    functions = [
        *(
            partial(oracle.pairwise, weights=weights, mask=mask, beta=0.1, link=link, weights_on=on)
            for link in losses.LINKS
            for on in ("score", "loss")
        ),
        lambda c, r: oracle.slic(c, r, num_tokens, weights, mask, 1.0, 0.5),
        lambda c, r: oracle.kto(c, r, [], 0.1, masks, 1.0, 2.0),
    ]
    for function in functions:
        _, by_chosen, by_rejected = function(chosen, rejected)
        for k in range(M):
            bump = step * (np.arange(M) == k)
            slope = (function(chosen + bump, rejected)[0] - function(chosen - bump, rejected)[0]) / (2 * step)
            assert slope == pytest.approx(by_chosen[k], abs=1e-7)
            slope = (function(chosen, rejected + bump)[0] - function(chosen, rejected - bump)[0]) / (2 * step)
            assert slope == pytest.approx(by_rejected[k], abs=1e-7)


def test_saturated_gradients_keep_their_digits():
    for log_ratio in (150.0, -150.0, 400.0, -400.0):
        chosen, rejected = np.float32([log_ratio]), np.float32([-log_ratio])
        everything = np.ones((1, 1), bool)
        for link in losses.LINKS:
            got = value_and_gradients(chosen, rejected, np.ones((1, 1), np.float32), everything, link)
            assert_agree(got, oracle.pairwise(chosen, rejected, np.ones((1, 1)), everything, 0.1, link, 0.2))
        masks = (everything[0], everything[0], np.zeros(0, bool))
        value, gradients = jax.value_and_grad(losses.kto_loss, (0, 1))(chosen, rejected, np.zeros(0, np.float32), 0.1)
        assert_agree((value, *gradients), oracle.kto(chosen, rejected, [], 0.1, masks, 1.0, 1.0))


@pytest.mark.parametrize("link", losses.LINKS)
@pytest.mark.parametrize("weights_on", ["score", "loss"])
def test_garbage_in_masked_slots_changes_nothing(link, weights_on):
    chosen, rejected, mask, _ = draw(1)
    weights = oracle.uniform_weights(mask).astype(np.float32)
    clean = value_and_gradients(chosen, rejected, weights, mask, link, weights_on)
    for garbage in (np.nan, np.inf, -np.inf, 1e38):
        chosen[-1], rejected[-1] = garbage, -garbage
        dirty = value_and_gradients(
            chosen, rejected, np.where(mask, weights, np.float32(garbage)), mask, link, weights_on
        )
        for got, want in zip(dirty, clean, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("link", losses.LINKS)
def test_nothing_valid_gives_zero_and_no_gradient(link):
    nan = np.full(M, np.nan, np.float32)
    for out in value_and_gradients(nan, nan, np.ones((M, N), np.float32), np.zeros((M, N), bool), link):
        np.testing.assert_array_equal(out, 0)


def test_a_real_nan_surfaces():
    chosen, rejected, mask, _ = draw(2)
    chosen[0] = np.nan
    assert np.isnan(value_and_gradients(chosen, rejected, np.ones((M, N), np.float32), mask, "logistic")[0])


def test_pair_weights_are_dpo_and_so_is_a_group_of_one():
    chosen, rejected, _, emb = draw(3)
    dpo = np.mean([oracle.minus_log_sigmoid(0.1 * float(c - r)) for c, r in zip(chosen, rejected, strict=True)])
    everything = jnp.ones((M, N), bool)
    pairs = losses.pairwise_loss(
        chosen, rejected, contrast.pair_weights(everything), mask=contrast.pair_mask(everything)
    )
    ones = losses.pairwise_loss(
        chosen[:, None], rejected[:, None], contrast.embedding_weights(emb[0][:, None], emb[1][:, None])
    )
    np.testing.assert_allclose([pairs, ones], dpo, rtol=1e-6)


def test_at_initialisation_rows_that_sum_to_one_have_dpos_gradient_over_n():
    zeros, everything = np.zeros(M, np.float32), np.ones((M, N), bool)
    pair = value_and_gradients(zeros, zeros, np.eye(M, dtype=np.float32), np.eye(M, dtype=bool), "logistic")
    for weights in (contrast.uniform_weights(jnp.asarray(everything)), contrast.embedding_weights(*draw(4)[3])):
        _, by_chosen, by_rejected = value_and_gradients(zeros, zeros, weights, everything, "logistic")
        np.testing.assert_allclose(by_chosen, pair[1] / N, rtol=1e-6)
        np.testing.assert_allclose(jnp.mean(by_rejected), jnp.mean(pair[2]) / N, rtol=1e-6)


def test_the_order_of_responses_does_not_matter():
    chosen, rejected, mask, emb = draw(5)
    weights = oracle.embedding_weights(*emb, 0.5, mask).astype(np.float32)
    loss, by_chosen, by_rejected = value_and_gradients(chosen, rejected, weights, mask, "logistic")
    rows, columns = np.random.default_rng(0).permutation(M), np.random.default_rng(1).permutation(N)
    permuted = value_and_gradients(
        chosen[rows], rejected[columns], weights[rows][:, columns], mask[rows][:, columns], "logistic"
    )
    assert_agree(permuted, (loss, by_chosen[rows], by_rejected[columns]), rtol=1e-6)


def test_more_masked_slots_change_nothing():
    chosen, rejected, mask, emb = draw(6)
    narrow = contrast.embedding_weights(*emb, mask=jnp.asarray(mask))
    wide_mask = np.pad(mask, ((0, 3), (0, 2)))
    wide = contrast.embedding_weights(
        np.pad(emb[0], ((0, 3), (0, 0))), np.pad(emb[1], ((0, 2), (0, 0))), mask=jnp.asarray(wide_mask)
    )
    expected = value_and_gradients(chosen, rejected, narrow, mask, "logistic")
    got = value_and_gradients(np.pad(chosen, (0, 3)), np.pad(rejected, (0, 2)), wide, wide_mask, "logistic")
    assert_agree((got[0], got[1][:M], got[2][:N]), expected, rtol=1e-6)


def test_a_common_shift_of_all_log_ratios_changes_nothing():
    chosen, rejected, mask, _ = draw(7)
    weights = oracle.uniform_weights(mask).astype(np.float32)
    shifted = value_and_gradients(chosen + 2, rejected + 2, weights, mask, "logistic")
    assert_agree(shifted, value_and_gradients(chosen, rejected, weights, mask, "logistic"), rtol=1e-6)


def test_groups_are_the_blocks_of_a_masked_matrix():
    groups, size = 3, 4
    rng = np.random.default_rng(8)
    chosen, rejected = rng.normal(size=(2, groups, size)).astype(np.float32)
    emb = rng.normal(size=(2, groups, size, 8)).astype(np.float32)
    mask = jnp.asarray(rng.random((groups, size, size)) > 0.3)
    grouped = losses.pairwise_loss(chosen, rejected, contrast.embedding_weights(*emb, mask=mask), mask=mask)
    blocks = jax.scipy.linalg.block_diag(*mask).astype(bool)
    flat_weights = contrast.embedding_weights(*emb.reshape(2, groups * size, 8), mask=blocks)
    flat = losses.pairwise_loss(chosen.ravel(), rejected.ravel(), flat_weights, mask=blocks)
    np.testing.assert_allclose(grouped, flat, rtol=1e-6)
    singly = [
        losses.pairwise_loss(chosen[g], rejected[g], contrast.embedding_weights(*emb[:, g], mask=mask[g]), mask=mask[g])
        for g in range(groups)
    ]
    np.testing.assert_allclose(grouped, np.average(singly, weights=mask.sum((1, 2))), rtol=1e-6)


def test_weights_on_the_loss_are_the_releases_diagonal_weighting():
    # alpha times a pair's own loss plus (1 - alpha) times the mean over the other columns, averaged over rows.
    chosen, rejected, _, _ = draw(9)
    entry = np.logaddexp(0, -0.1 * (chosen[:, None] - rejected[None, :]).astype(np.float64))
    others = [np.mean([entry[i, j] for j in range(N) if j != i]) for i in range(M)]
    expected = np.mean(0.8 * np.diag(entry) + 0.2 * np.array(others))
    got = losses.pairwise_loss(chosen, rejected, contrast.diagonal_weights(M), weights_on="loss")
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_sft_and_slic_agree_with_the_oracle():
    for seed, scale in ((0, 3.0), (1, 500.0)):
        chosen, rejected, mask, emb = draw(seed, scale)
        num_tokens = np.arange(2, 2 + M)
        rows = mask.any(axis=1)
        expected = oracle.sft(chosen, num_tokens, rows)
        assert_agree(jax.value_and_grad(losses.sft_loss)(chosen, num_tokens, rows), expected)
        weights = oracle.embedding_weights(*emb, 0.5, mask).astype(np.float32)

        def loss(c, r, weights=weights, num_tokens=num_tokens, mask=mask):
            scores = laws.scores_of(c, r, weights, mask, num_tokens=(num_tokens, num_tokens))
            return laws.named("slic", slic_margin=1.5, slic_nll_weight=0.3).total_loss(scores)

        value, gradients = jax.value_and_grad(loss, (0, 1))(chosen, rejected)
        assert_agree((value, *gradients), oracle.slic(chosen, rejected, num_tokens, weights, mask, 1.5, 0.3))


@pytest.mark.parametrize("scale", SCALES)
def test_kto_agrees_with_the_oracle(scale):
    for seed in range(3):
        chosen, rejected, mask, _ = draw(seed, SCALES[scale])
        mismatched = np.random.default_rng(seed).normal(seed, 2, 7).astype(np.float32)
        masks = (mask.any(1), mask.any(0), np.arange(7) < 5)

        def loss(c, r, m, masks=masks):
            return losses.kto_loss(c, r, m, 0.1, *masks, desirable_weight=1.5, undesirable_weight=0.5)

        value, gradients = jax.value_and_grad(loss, (0, 1, 2))(chosen, rejected, mismatched)
        assert_agree((value, *gradients[:2]), oracle.kto(chosen, rejected, mismatched, 0.1, masks, 1.5, 0.5))
        np.testing.assert_array_equal(gradients[2], 0)
        dirty = loss(np.where(masks[0], chosen, np.nan), rejected, np.where(masks[2], mismatched, np.inf))
        assert dirty == value


def test_ktos_reference_point_is_never_negative():
    np.testing.assert_array_equal(losses.kl_estimate(jnp.array([-3.0, 1.0])), 0.0)
    np.testing.assert_array_equal(losses.kl_estimate(jnp.array([-1.0, 5.0])), 2.0)


ROW_LINKS = {
    "rpo": "logistic",
    "dpo": "logistic",
    "ipo": "squared",
    "cdpo": "smoothed",
    "rdpo": "robust",
    "exo": "exo",
    "rso": "hinge",
}


def expected_objective(name, scores, average=False, link=None):
    """Of the options that are tested: beta 0.2, and half the weight of SLiC's likelihood."""
    sides = [scores[kind] for kind in RESPONSES]
    sides = [side._replace(**{f: np.asarray(getattr(side, f)) for f in side._fields}) for side in sides]
    ratios = [s.log_prob.astype(np.float64) - s.reference_log_prob for s in sides]
    if average:
        ratios = [ratio / s.num_tokens for ratio, s in zip(ratios, sides, strict=True)]
    weights, mask = laws.matrix_of(scores)
    masks = tuple(s.valid for s in sides)
    if name in ROW_LINKS:
        link = link or ROW_LINKS[name]
        return oracle.pairwise(*ratios[:2], weights, mask, 0.2, link, 0.1)[0]
    if name == "kto":
        return oracle.kto(*ratios, 0.2, masks, 1.0, 1.0)[0]
    nll = oracle.sft(sides[0].log_prob, sides[0].num_tokens, masks[0])[0]
    if name == "sft":
        return nll
    scored = [s.log_prob / (s.num_tokens if average else 1) for s in sides]
    return oracle.slic(scored[0], scored[1], sides[0].num_tokens, weights, mask, 1.0, 0.0)[0] + 0.5 * nll


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", [*ROW_LINKS, "slic", "kto", "sft"])
def test_the_objectives_of_the_table_compute_their_losses(name, average):
    expected = expected_objective(name, laws.draw_scores(0), average)
    options = {} if name == "sft" else {"average_log_prob": average}
    objective = laws.named(name, **options, **({"slic_nll_weight": 0.5} if name == "slic" else {}))
    np.testing.assert_allclose(objective.total_loss(laws.draw_scores(0)), expected, rtol=1e-5)
    dirty = laws.draw_scores(0, fill=np.nan)

    def loss(log_prob):
        chosen = dirty["chosen"]._replace(log_prob=log_prob)
        return objective.total_loss(replace(dirty, responses={**dirty.responses, "chosen": chosen}))

    value, gradient = jax.value_and_grad(loss)(dirty["chosen"].log_prob)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.all(np.isfinite(gradient))
    assert gradient[-1] == 0
    assert np.any(gradient != 0)


def test_robust_dpo_averages_to_dpo_over_flipped_labels():
    """Its law: with labels that are flipped with probability eps, the mean loss is the logistic one of true labels."""
    chosen, rejected, mask, _ = draw(7)
    inputs = np.ones((M, N), np.float32), mask & mask.T
    kept = value_and_gradients(chosen, rejected, *inputs, "robust")[0]
    flipped = value_and_gradients(rejected, chosen, *inputs, "robust")[0]
    np.testing.assert_allclose(
        0.8 * kept + 0.2 * flipped, value_and_gradients(chosen, rejected, *inputs, "logistic")[0], rtol=1e-5
    )


def test_exo_is_least_where_the_policy_chooses_as_the_labels_do():
    rewards = jnp.linspace(-5, 5, 2001)
    found = jax.vmap(lambda r: losses.pairwise_loss(r[None], jnp.zeros(1), 1.0, 1.0, "exo", label_smoothing=0.2))(
        rewards
    )
    np.testing.assert_allclose(rewards[jnp.argmin(found)], np.log(0.8 / 0.2), atol=0.01)
    np.testing.assert_allclose(jnp.min(found), 0, atol=1e-6)


def test_a_link_from_the_settings_overrides_the_objectives_own():
    objective = ObjectiveConfig(link="hinge", beta=0.2).build()
    expected = expected_objective("rpo", laws.draw_scores(1), link="hinge")
    np.testing.assert_allclose(objective.loss(laws.draw_scores(1)), expected, rtol=1e-5)


def test_objectives_name_what_they_prepare():
    for name, objective in losses.OBJECTIVES.items():
        assert objective.weights is None or objective.weights in contrast.WEIGHTS, name
        assert objective.options().get("link") in (None, *losses.LINKS), name
    assert losses.OBJECTIVES["kto"].responses == ("chosen", "rejected", "mismatched")
    assert not losses.OBJECTIVES["sft"].uses_reference


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ObjectiveConfig(name="dop"), "did you mean 'dpo'"),
        (lambda: ObjectiveConfig(name="kto", link="hinge"), "'kto' takes no link"),
        (
            lambda: Config(objective=ObjectiveConfig(name="sft"), contrast=ContrastConfig(weights="uniform")),
            "'sft' takes no weights",
        ),
        (lambda: ObjectiveConfig(link="log"), "unknown link 'log'"),  # pyright: ignore
        (
            lambda: Config(contrast=ContrastConfig(weights="log")),  # pyright: ignore
            r"contrast\.weights=log is not known; use one of embedding, uniform, diagonal, pair\.",
        ),
        (lambda: losses.pairwise_loss(jnp.zeros(2), jnp.zeros(2), 1.0, link="log"), "unknown link 'log'"),
        (lambda: losses.pairwise_loss(jnp.zeros(2), jnp.zeros(2), 1.0, weights_on="sum"), "'score' or 'loss'"),  # pyright: ignore
    ],
)
def test_bad_names_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
