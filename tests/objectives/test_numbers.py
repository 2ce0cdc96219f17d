"""Values that independent float64 code gives for these objectives, and what each owes besides its value."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.objectives import losses, running
from rpo_jax.objectives.matrix import WholeMatrix
from rpo_jax.objectives.methods import OBJECTIVES
from rpo_jax.objectives.methods.ada_dpo import scale
from rpo_jax.objectives.methods.ld_dpo import desensitised
from rpo_jax.objectives.scores import Responses, Scores, Tokens
from tests.objectives import laws

CHOSEN, REJECTED = (3.0, -0.5), (-1.0, 0.2)  # log-ratios of two pairs
PRECISIONS = {"float32": 1e-5, "float64": 1e-9}


@pytest.fixture(params=PRECISIONS)
def precision(request):
    """The relative error that is allowed; everything under it is of this dtype."""
    with jax.enable_x64(request.param == "float64"):
        yield PRECISIONS[request.param]


def value(objective, chosen=CHOSEN, rejected=REJECTED, weights=None, **values):
    """What is minimised, of pairs with these log-ratios, or on all entries of a matrix with these weights."""
    chosen, rejected = jnp.array(chosen), jnp.array(rejected)
    mask = jnp.eye(len(chosen), dtype=bool) if weights is None else None
    matrix = jnp.eye(len(chosen)) if weights is None else jnp.array(weights)

    @jax.jit  # one program compiles sooner than its operations one by one
    def found(chosen, rejected, values):
        return objective.total_loss(laws.scores_of(chosen, rejected, matrix, mask, **values))

    return found(chosen, rejected, values)


PAIRS = {
    "nca_pair": 1.35400962931,
    "sppo_hard": 38.645,
    "apo_zero": 0.959037762767,
    "apo_down": 0.990375158941,
    "aot_unpaired": 0.615687490787,
    "discopop": 0.733512932926,
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name, precision):
    np.testing.assert_allclose(value(OBJECTIVES[name]), PAIRS[name], rtol=precision)


def test_bco_pair_without_and_with_its_shift(precision):
    np.testing.assert_allclose(value(laws.named("bco_pair", beta=0.1, bco_shift="none")), 1.31020436614, rtol=precision)
    shift = 0.1 * sum(CHOSEN + REJECTED) / 4
    chosen, rejected = (
        [math.log1p(math.exp(sign * (shift - 0.1 * x))) for x in side] for sign, side in ((1, CHOSEN), (-1, REJECTED))
    )
    np.testing.assert_allclose(value(OBJECTIVES["bco_pair"]), sum(chosen + rejected) / 2, rtol=precision)


def test_bco_pair_s_shift_is_the_mean_reward_of_all_batches_so_far(precision):
    """Two before, of mean reward 0.5; a mean that is fixed does not move. The batch is the one of the numbers."""
    before, batch = {"mean": jnp.array(0.5), "count": jnp.array(2.0)}, 0.1 * sum(CHOSEN + REJECTED)
    objective = OBJECTIVES["bco_pair"]
    scores = laws.scores_of(jnp.array(CHOSEN), jnp.array(REJECTED), jnp.eye(2), jnp.eye(2, dtype=bool))
    scores = replace(scores, before=before)
    np.testing.assert_allclose(objective.shift(scores), (1.0 + batch) / 6, rtol=precision)
    now = running.joined(before, *objective.kept(scores))
    np.testing.assert_allclose([now["mean"], now["count"]], [(1.0 + batch) / 6, 6], rtol=precision)
    scores = replace(scores, before=running.fixed(before))
    assert objective.shift(scores) == 0.5
    chosen, rejected = (
        [math.log1p(math.exp(sign * (0.5 - 0.1 * x))) for x in side] for sign, side in ((1, CHOSEN), (-1, REJECTED))
    )
    np.testing.assert_allclose(objective.total_loss(scores), sum(chosen + rejected) / 2, rtol=precision)


ADA_DPO = [  # log-ratios; tau, loss, its derivative by the chosen one; tau and loss with the quadratic price
    ((3, -4), 0.741965991952, 0.243950243709, -0.0280205720834, 0.643300085962, 0.186756013572),
    ((0.5, 0.2), 0.1, 0.0554353503652, -0.0425556742371, 0.1, 0.0554353503652),
    ((-2, 3), 0.529976025319, 0.674249206889, -0.0719791207352, 0.519037282094, 0.66778155807),
    ((40, -30), 5, 1.10208081661, -0.0197815864845, 2.42879512777, 0.132378796396),
]


@pytest.mark.parametrize(("ratios", "tau", "loss", "slope", "quadratic_tau", "quadratic_loss"), ADA_DPO)
def test_ada_dpo(ratios, tau, loss, slope, quadratic_tau, quadratic_loss, precision):
    chosen, rejected = jnp.array([float(ratios[0])]), jnp.array([float(ratios[1])])
    for quadratic, expected in ((False, tau), (True, quadratic_tau)):
        np.testing.assert_allclose(scale(0.1 * (chosen - rejected), 0.1, quadratic=quadratic), expected, rtol=precision)
    got, gradient = jax.value_and_grad(lambda x: value(OBJECTIVES["ada_dpo"], x, rejected))(chosen)
    np.testing.assert_allclose(got, loss, rtol=precision)
    np.testing.assert_allclose(gradient, [slope], rtol=precision)
    quadratic = laws.named("ada_dpo", beta=0.1, ada_dpo_price="quadratic")
    np.testing.assert_allclose(value(quadratic, chosen, rejected), quadratic_loss, rtol=precision)


DIVERGENCES = {"forward_kl": 0.568597237867, "js": 0.631911384316, "alpha": 0.560715385934}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_f_dpo(divergence, precision):
    objective = laws.named("f_dpo", beta=0.1, f_dpo_divergence=divergence)
    np.testing.assert_allclose(value(objective, [3.0], [-1.0]), DIVERGENCES[divergence], rtol=precision)


def test_the_limits_of_the_alpha_divergence_are_the_kl_divergences():
    for alpha, limit in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        of_alpha = laws.named("f_dpo", f_dpo_divergence="alpha", f_dpo_alpha=alpha)
        np.testing.assert_allclose(value(of_alpha), value(laws.named("f_dpo", f_dpo_divergence=limit)), rtol=1e-6)
    np.testing.assert_array_equal(value(laws.named("f_dpo", f_dpo_divergence="reverse_kl")), value(laws.named("dpo")))


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_log_ratios_that_no_exponential_holds_have_finite_derivatives(divergence):
    objective = laws.named("f_dpo", f_dpo_divergence=divergence)
    for ratios in ((-900.0, 900.0), (900.0, -900.0)):
        both = jax.value_and_grad(lambda x, of=ratios: value(objective, x[:1], x[1:]))(jnp.array(ratios))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(both))


NCE = {
    "chosen": (3.0, -1.0, 0.5),
    "rejected": (-1.0, 0.2, 2.0),
    "weights": ((0.7, 0.2, 0.1), (0.2, 0.6, 0.2), (0.1, 0.3, 0.6)),
}


def test_rpo_with_the_link_on_the_row(precision):
    np.testing.assert_allclose(value(OBJECTIVES["rpo_nce"], **NCE), 0.676816514575, rtol=precision)
    np.testing.assert_allclose(value(OBJECTIVES["rpo"], **NCE), 0.686293936394, rtol=precision)
    on_losses = losses.pairwise_loss(*map(jnp.array, NCE.values()), weights_on="loss")
    np.testing.assert_allclose(on_losses, 0.675583130573, rtol=precision)


def test_a_row_of_one_entry_is_a_pair():
    np.testing.assert_allclose(value(OBJECTIVES["rpo_nce"]), value(OBJECTIVES["dpo"]), rtol=1e-6)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def apo_down(chosen, rejected, weights, mask, _):
    entries = [
        sigmoid(0.2 * chosen[0][i]) + 1 - sigmoid(0.2 * weights[i, j] * (chosen[0][i] - rejected[0][j]))
        for i, j in zip(*np.nonzero(mask), strict=True)
    ]
    return sum(entries) / len(entries)


def discopop(chosen, rejected, weights, mask, _):
    total = 0.0
    for i, j in zip(*np.nonzero(mask), strict=True):
        s = 0.2 * weights[i, j] * (chosen[0][i] - rejected[0][j])
        m = sigmoid(s / 0.5)
        total += (1 - m) * math.log1p(math.exp(-s)) + m * math.exp(-s)
    return total / mask.sum()


def ada_dpo(chosen, rejected, weights, mask, frozen):
    total = 0.0
    for i, j in zip(*np.nonzero(mask), strict=True):
        d, tau = 0.2 * weights[i, j] * (frozen[0][0][i] - frozen[1][0][j]), 1.0
        for _ in range(5):
            s = sigmoid(d / tau)
            g, h = -math.log(2 * s + 1e-6) + (1 - s) * d / tau + 0.1, d * d / tau**3 * s * (1 - s)
            tau = min(5.0, max(0.1, tau - g / max(h, 1e-6)))
        margin = 0.2 * weights[i, j] * (chosen[0][i] - rejected[0][j])
        total -= tau * math.log(sigmoid(margin / tau) + 1e-6)
    return total / mask.sum()


def f_dpo(chosen, rejected, weights, mask, _):
    phi = [[math.log(sigmoid(x)) for x in side[0]] for side in (chosen, rejected)]
    entries = [
        math.log1p(math.exp(-0.2 * weights[i, j] * (phi[0][i] - phi[1][j])))
        for i, j in zip(*np.nonzero(mask), strict=True)
    ]
    return sum(entries) / len(entries)


def rpo_nce(chosen, rejected, weights, mask, _):
    rows = [
        math.log(
            1 + sum(weights[i, j] * math.exp(-0.2 * (chosen[0][i] - rejected[0][j])) for j in np.nonzero(mask[i])[0])
        )
        for i in np.nonzero(mask.any(axis=1))[0]
    ]
    return sum(rows) / len(rows)


EQUATIONS = {
    "apo_down": (apo_down, {}),
    "discopop": (discopop, {"discopop_tau": 0.5}),
    "ada_dpo": (ada_dpo, {}),
    "f_dpo": (f_dpo, {}),
    "rpo_nce": (rpo_nce, {}),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_on_the_matrix_each_is_its_equation_and_has_its_derivatives(name):
    equation, options = EQUATIONS[name]

    def loss(chosen, rejected, weights, mask):
        return laws.named(name, **options).loss(laws.scores_of(chosen[0], rejected[0], weights, mask))

    laws.check_law(loss, equation, lambda rng, size: (rng.normal(0, 5, size),))


def against(scores, chosen, rejected):
    """The scores with a reference's log-probs."""
    reference = {"chosen": chosen, "rejected": rejected}
    responses = {kind: scores[kind]._replace(reference_log_prob=jnp.asarray(x)) for kind, x in reference.items()}
    return Scores(responses, scores.matrix)


RESPONSES_ALONE = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "aot", "aot_unpaired")


@pytest.mark.parametrize("name", RESPONSES_ALONE)
def test_slots_that_hold_nothing_reach_neither_value_nor_gradient(name):
    """Log-probs of 3 pairs, and of the same with a fourth slot of NaN."""
    rng = np.random.default_rng(0)
    log_probs = rng.normal(0, 5, (4, 3)).astype(np.float32)

    def found(sides, valid):
        def loss(policy):
            scores = laws.scores_of(*policy, jnp.eye(len(valid)), jnp.diag(jnp.array(valid)))
            reference = {
                k: scores[k]._replace(reference_log_prob=x) for k, x in zip(scores.responses, sides[2:], strict=True)
            }
            return laws.named(name).total_loss(type(scores)(reference, scores.matrix))

        return jax.jit(jax.value_and_grad(loss))(tuple(map(jnp.asarray, sides[:2])))

    whole = found(log_probs, [True] * 3)
    padded = found(np.concatenate([log_probs, np.full((4, 1), np.nan, np.float32)], axis=1), [True] * 3 + [False])
    np.testing.assert_allclose(padded[0], whole[0], rtol=1e-6)
    assert float(jnp.max(jnp.abs(whole[1][0]))) > 0
    for got, expected in zip(padded[1], whole[1], strict=True):
        np.testing.assert_allclose(got, [*expected, 0.0], rtol=1e-5)
    empty = found(np.full((4, 2), np.nan, np.float32), [False, False])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(empty))
    wrong = found(np.where(np.arange(3) == 1, np.nan, log_probs), [True] * 3)
    assert np.isnan(wrong[0])


def test_aot_sorts_the_policys_and_the_references_margins_apart():
    chosen, rejected, of_chosen, of_rejected = np.random.default_rng(1).normal(-20, 5, (4, 5))
    margins = np.sort(chosen - rejected) - np.sort(of_chosen - of_rejected)
    scores = laws.scores_of(*map(jnp.float32, (chosen, rejected)), jnp.eye(5), None)
    scores = against(scores, *map(jnp.float32, (of_chosen, of_rejected)))
    for epsilon in (0.0, 0.3):
        expected = np.mean((1 - epsilon) * np.logaddexp(0, -0.2 * margins) + epsilon * np.logaddexp(0, 0.2 * margins))
        got = laws.named("aot", label_smoothing=epsilon).loss(scores)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_more_chosen_responses_than_rejected_ones_are_compared_by_their_share():
    """Six against three: every rejected one is compared with two."""
    chosen, rejected = np.arange(6.0), np.array([2.0, 0.0, 1.0])
    scores = laws.scores_of(jnp.float32(chosen[::-1].copy()), jnp.float32(rejected), jnp.ones((6, 3)), None)
    expected = np.mean(np.logaddexp(0, -0.2 * (chosen - np.repeat(np.sort(rejected), 2))))
    objective = laws.named("aot_unpaired")
    np.testing.assert_allclose(objective.loss(scores), expected, rtol=1e-6)
    assert objective.count(scores) == 6


def test_the_likelihood_beside_a_loss_is_a_mean_over_responses_or_over_tokens():
    scores = laws.draw_scores(6, fill=np.nan)
    chosen = scores["chosen"]
    valid = np.asarray(chosen.valid)
    log_prob, num_tokens = (np.asarray(x, np.float64)[valid] for x in (chosen.log_prob, chosen.num_tokens))
    alone = laws.named("dpo").total_loss(scores)
    for mean, expected in (
        ("responses", np.mean(-log_prob / num_tokens)),
        ("tokens", -log_prob.sum() / num_tokens.sum()),
    ):
        got = laws.named("dpo", nll_weight=0.5, nll_mean=mean).total_loss(scores)
        np.testing.assert_allclose(got, alone + 0.5 * expected, rtol=1e-6)


def test_wpo_weighs_a_pair_by_how_likely_the_policy_is_to_say_it(precision):
    """Means of log p - log sum p^2 of -0.4 and -0.7, over responses of one token."""
    collisions = jnp.array([3.4]), jnp.array([-0.3])
    got = value(OBJECTIVES["wpo"], [3.0], [-1.0], log_collision=collisions)
    np.testing.assert_allclose(got, 0.17076794302, rtol=precision)
    surer = jnp.array([1.0]), jnp.array([-2.0])  # a weight of e^3
    dpo = value(OBJECTIVES["dpo"], [3.0], [-1.0])
    for most, weight in ((0.0, math.exp(3)), (1.0, 1.0)):
        got = value(laws.named("wpo", beta=0.1, wpo_most=most), [3.0], [-1.0], log_collision=surer)
        np.testing.assert_allclose(got, weight * dpo, rtol=precision)


def wpo(chosen, rejected, weights, mask, frozen):
    log_w = [side[0] - side[1] for side in frozen]
    entries = [
        math.exp(log_w[0][i] + log_w[1][j])
        * math.log1p(math.exp(-0.2 * weights[i, j] * (chosen[0][i] - rejected[0][j])))
        for i, j in zip(*np.nonzero(mask), strict=True)
    ]
    return sum(entries) / len(entries)


def test_on_the_matrix_the_weights_of_wpo_are_a_rows_and_a_columns():
    def loss(chosen, rejected, weights, mask):
        scores = laws.scores_of(chosen[0], rejected[0], weights, mask, log_collision=(chosen[1], rejected[1]))
        return laws.named("wpo").loss(scores)

    laws.check_law(loss, wpo, lambda rng, size: (rng.normal(0, 1, size), rng.normal(0, 0.5, size)))


def test_ld_dpo_counts_what_is_beyond_the_shorter_response_for_less(precision):
    """A prompt's tokens, two responses of 3 and 2 tokens, whose first two sum to -10 and the third to -4."""
    ids = jnp.array([[-1, 0, 0, 0, -1, 1, 1, -1]])
    log_prob = jnp.array([[jnp.nan, -6.0, -4.0, -4.0, jnp.nan, -1.0, -2.0, jnp.inf]])
    for alpha, expected in ((0.5, -12.0), (1.0, -14.0), (0.0, -10.0)):
        got = desensitised(log_prob, ids, jnp.array([2, 2]), alpha)
        np.testing.assert_allclose(got, [expected, -3.0], rtol=precision)


def test_ld_dpo_is_dpo_of_such_log_ratios():
    """Two pairs in one row and an empty slot; the reference's tokens are half the policy's."""
    ids = jnp.array([[0, 0, 0, 3, 1, 1, 4, 4, 4, -1]])
    log_prob = -jnp.arange(1.0, 11.0)[None]
    tokens = Tokens(log_prob, None, log_prob / 2, ids)
    num_tokens, valid = jnp.array([3, 2, 0]), jnp.array([True, True, False])
    chosen = Responses(jnp.zeros(3), jnp.zeros(3), num_tokens, valid)
    rejected = chosen._replace(num_tokens=jnp.array([1, 3, 0]))
    matrix = WholeMatrix(jnp.eye(3), jnp.diag(valid))
    got = laws.named("ld_dpo", ld_dpo_alpha=0.5).loss(Scores({"chosen": chosen, "rejected": rejected}, matrix, tokens))
    of_chosen, of_rejected = (-1 - 0.5 * (2 + 3), -5 - 6), (-4, -7 - 8 - 0.5 * 9)
    margins = [(c - r) / 2 for c, r in zip(of_chosen, of_rejected, strict=True)]
    np.testing.assert_allclose(got, np.mean(np.logaddexp(0, -0.2 * np.array(margins))), rtol=1e-6)


SMOOTHED = {"chosen": (3.0, 0.5, -2.0), "rejected": (-4.0, 0.2, 3.0)}
EPSILON = (0.1, 0.4, 0.25)


def smoothing_of(objective, k=slice(None), **more):
    column = {"label_smoothing": jnp.array(EPSILON[k])}
    chosen, rejected = (side[k] for side in SMOOTHED.values())
    return value(objective, chosen, rejected, row_values=(column, column), **more)


def test_every_pair_has_its_own_label_smoothing(precision):
    objective = OBJECTIVES["cdpo"]
    for k, expected in enumerate((0.473186048885, 0.690259676341, 0.84907698418)):
        np.testing.assert_allclose(smoothing_of(objective, slice(k, k + 1)), expected, rtol=precision)
    np.testing.assert_allclose(smoothing_of(objective), 0.670840903136, rtol=precision)


def test_wpo_reads_it_too(precision):
    alike = tuple(jnp.array(side) for side in SMOOTHED.values())  # as likely as the policy's own: every weight is 1
    got = smoothing_of(laws.named("wpo", link="smoothed", beta=0.1), log_collision=alike)
    np.testing.assert_allclose(got, smoothing_of(OBJECTIVES["cdpo"]), rtol=precision)


def test_across_pairs_it_is_the_mean_of_both():
    got = smoothing_of(OBJECTIVES["cdpo"], weights=np.full((3, 3), 1 / 3))
    entries = [
        (1 - eps) * math.log1p(math.exp(-0.1 / 3 * (c - r))) + eps * math.log1p(math.exp(0.1 / 3 * (c - r)))
        for (c, one) in zip(SMOOTHED["chosen"], EPSILON, strict=True)
        for (r, other) in zip(SMOOTHED["rejected"], EPSILON, strict=True)
        for eps in [(one + other) / 2]
    ]
    np.testing.assert_allclose(got, np.mean(entries), rtol=1e-5)


@pytest.mark.parametrize("weights_on", ["score", "loss"])
def test_sample_weights_multiply_a_pairs_entries_and_the_mean_is_over_them(weights_on):
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(size=(2, 4))
    weights = rng.dirichlet(np.ones(4), 4)
    sample = np.array([0.0, 2.0, 0.5, 1.0])
    counted = np.sqrt(sample[:, None] * sample[None, :])
    difference = chosen[:, None] - rejected[None, :]
    if weights_on == "score":
        expected = np.sum(counted * np.logaddexp(0, -0.2 * weights * difference)) / counted.sum()
    else:
        expected = np.sum(weights * counted * np.logaddexp(0, -0.2 * difference)) / (weights * counted).sum()
    column = jnp.float32(sample)
    matrix = WholeMatrix(
        jnp.float32(weights), jnp.ones((4, 4), bool), weights_on=weights_on, sample_weights=(column, column)
    )
    scores = laws.scores_of(jnp.float32(chosen), jnp.float32(rejected), weights, None)
    got = laws.named("dpo").loss(Scores(scores.responses, matrix))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    pairs = replace(matrix, weights=jnp.eye(4), mask=jnp.eye(4, dtype=bool))
    own = np.sum(sample * np.logaddexp(0, -0.2 * (chosen - rejected))) / sample.sum()
    np.testing.assert_allclose(laws.named("dpo").loss(Scores(scores.responses, pairs)), own, rtol=1e-5)


def test_upo(precision):
    """Two chosen and two rejected responses, their scores, and values of their prompts."""
    sides = ((1.0, -0.5), (0.3, -2.0))
    log_prob, score, prompt_value = ((-12.0, -7.0), (-20.0, -9.0)), ((0.8, 0.1), (0.5, 0.3)), ((0.4, 0.4), (0.6, 0.2))

    def terms(values):
        responses = {}
        for k, kind in enumerate(("chosen", "rejected")):
            policy = jnp.array(log_prob[k])
            reference, ones = policy - jnp.array(sides[k]), jnp.ones(2, bool)
            found = Responses(policy, reference, jnp.ones(2, int), ones, values[k], jnp.array(score[k]))
            responses[kind] = found
        kl = jnp.array([0.2])
        responses["mismatched"] = Responses(kl, jnp.zeros(1), jnp.ones(1, int), jnp.ones(1, bool))
        return OBJECTIVES["upo"].terms(Scores(responses))

    values = tuple(jnp.array(side) for side in prompt_value)
    kto, likelihood, expectile = (term.mean for term in terms(values))
    np.testing.assert_allclose(kto, 0.486306065393, rtol=precision)
    np.testing.assert_allclose(likelihood, 0.1 * 14.4788531199, rtol=precision)
    np.testing.assert_allclose(kto + likelihood, 1.93419137738, rtol=precision)
    np.testing.assert_allclose(expectile, 0.03725, rtol=precision)
    of_chosen, of_rejected = jax.grad(lambda x: sum(term.mean for term in terms(x)))(values)
    np.testing.assert_allclose([*of_chosen, *of_rejected], [-0.14, 0.045, 0.015, -0.035], rtol=precision)
    weights = OBJECTIVES["upo"].weights_of(*(jnp.array(x).ravel() for x in (score, prompt_value)), jnp.ones(4, bool))
    np.testing.assert_allclose(weights, [2.22554092849, 0.548811636094, 0.818730753078, 1.22140275816], rtol=precision)
    bounded = laws.named("upo", upo_most=1.0)
    assert jnp.max(bounded.weights_of(jnp.array([9.0]), jnp.array([0.0]), jnp.ones(1, bool))) == 1
