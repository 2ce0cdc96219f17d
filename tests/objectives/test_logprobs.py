import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.core.shards import Shards
from rpo_jax.objectives.logprobs import response_log_probs, token_log_probs
from tests.objectives import oracle

R, T, D, V, P = 3, 11, 6, 37, 7


def draw(seed=0, dtype=jnp.float32):
    """Three rows in the branched layout: a prompt, then two responses that both continue from its last token."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(R, T, D)), dtype)
    head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    tokens = rng.integers(V, size=(R, T))
    previous, response_ids = np.zeros((R, T), int), np.full((R, T), -1)
    for row, (prompt, first, second) in enumerate(((3, 4, 4), (2, 1, 6), (4, 5, 0))):
        previous[row] = np.maximum(np.arange(T) - 1, 0)
        previous[row, min(prompt + first, T - 1)] = prompt - 1
        response_ids[row, prompt : prompt + first] = 2 * row
        response_ids[row, prompt + first : prompt + first + second] = 2 * row + 1
    return hidden, head, *map(jnp.asarray, (tokens, previous, response_ids))


def dense(hidden, head, tokens, previous, response_ids):
    """All logits at once."""
    predictor = jnp.take_along_axis(hidden, previous[..., None], axis=1)
    logits = jnp.matmul(predictor, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
    return jnp.stack([jnp.sum(jnp.where(response_ids == p, log_probs, 0)) for p in range(P)])


@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 128])
def test_log_probs_agree_with_the_oracle_in_any_chunks(chunk_tokens):
    batch = draw()
    log_prob, num_tokens, _ = response_log_probs(*batch, P, chunk_tokens=chunk_tokens)
    expected, count = oracle.response_log_probs(*map(np.asarray, batch), P)
    assert (log_prob.dtype, num_tokens.dtype) == (jnp.float32, jnp.int32)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5)
    np.testing.assert_array_equal(num_tokens, count)
    assert list(count) == [4, 4, 1, 6, 5, 0, 0]  # the last two responses have no token


@pytest.mark.parametrize("chunk_tokens", [1, 4, 128])
def test_collisions_are_sums_of_squared_probabilities_and_move_no_gradient(chunk_tokens):
    hidden, head, tokens, previous, response_ids = batch = draw(5)
    found = response_log_probs(*batch, P, chunk_tokens=chunk_tokens, collides=True)
    np.testing.assert_array_equal(found[0], response_log_probs(*batch, P, chunk_tokens=chunk_tokens)[0])
    logits = np.asarray(jnp.take_along_axis(hidden, previous[..., None], axis=1), np.float64) @ np.asarray(head)
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    collision = np.log(np.sum(share**2, axis=-1))
    expected = [np.sum(np.where(np.asarray(response_ids) == p, collision, 0)) for p in range(P)]
    np.testing.assert_allclose(found[2], expected, rtol=1e-5, atol=1e-6)

    def loss(head, collides):
        sums = response_log_probs(hidden, head, tokens, previous, response_ids, P, chunk_tokens=4, collides=True)
        return jnp.sum(jnp.square(sums[0])) + collides * jnp.sum(sums[2])

    gradients = [jax.grad(loss)(head, collides) for collides in (0.0, 1.0)]
    np.testing.assert_array_equal(*gradients)


def test_bfloat16_hidden_states_lose_nothing_after_the_product():
    hidden, head, *ids = draw(1, jnp.bfloat16)
    log_prob, _, _ = response_log_probs(hidden, head, *ids, P, chunk_tokens=4)
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    expected, _ = oracle.response_log_probs(np.asarray(hidden, np.float32), rounded, *map(np.asarray, ids), P)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5)


@pytest.mark.parametrize(("chunk_tokens", "keeps"), [(4, False), *((chunk, True) for chunk in (1, 4, 13, 22, 128))])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_gradients_are_those_of_all_logits_at_once(dtype, rtol, chunk_tokens, keeps):
    """Of 20 scored tokens: in chunks, of which the first may be kept."""
    hidden, head, *ids = draw(2, dtype)
    coefficients, how = jnp.arange(1.0, P + 1), {"chunk_tokens": chunk_tokens, "keeps": keeps}

    def chunked(hidden, head):
        return jnp.sum(coefficients * response_log_probs(hidden, head, *ids, P, **how)[0])

    got = jax.jit(jax.grad(chunked, (0, 1)))(hidden, head)
    expected = jax.grad(lambda *x: jnp.sum(coefficients * dense(*x, *ids)), (0, 1))(hidden, head)
    for ours, reference in zip(got, expected, strict=True):
        assert ours.dtype == reference.dtype
        ours, reference = np.asarray(ours, np.float32), np.asarray(reference, np.float32)
        np.testing.assert_allclose(ours, reference, rtol=rtol, atol=rtol * np.abs(reference).max())


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("name", ["response_log_probs", "token_log_probs"])
def test_capped_logits_are_exact_in_values_and_gradients(name, keeps):
    """Gemma 2's head: logits c tanh(z / c)."""
    hidden, head, *ids = draw(2)
    coefficients, cap = jnp.arange(1.0, P + 1), 1.5

    def chunked(hidden, head):
        if name == "response_log_probs":
            found = response_log_probs(hidden, head, *ids, P, chunk_tokens=4, softcap=cap, keeps=keeps)[0]
            return jnp.sum(coefficients * found)
        found = token_log_probs(hidden, head, *ids, chunk_tokens=4, softcap=cap, keeps=keeps)
        return jnp.sum(jnp.where(ids[2] >= 0, coefficients[ids[2]], 0) * found)

    def at_once(hidden, head):
        logits = jnp.take_along_axis(hidden, ids[1][..., None], axis=1) @ head
        log_probs = jax.nn.log_softmax(cap * jnp.tanh(logits / cap))
        log_probs = jnp.take_along_axis(log_probs, ids[0][..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(ids[2] >= 0, coefficients[ids[2]], 0) * log_probs)

    got, expected = (jax.value_and_grad(f, (0, 1))(hidden, head) for f in (chunked, at_once))
    for ours, reference in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5 * np.abs(reference).max())


def test_the_heads_gradient_accumulates_in_float32():
    hidden, head, *ids = draw(3, jnp.bfloat16)
    exact = jax.grad(lambda w: jnp.sum(dense(hidden.astype(jnp.float32), w, *ids)))(
        head.astype(jnp.bfloat16).astype(jnp.float32)
    )
    one_by_one = jax.grad(lambda w: jnp.sum(response_log_probs(hidden, w, *ids, P, chunk_tokens=1)[0]))(head)
    assert one_by_one.dtype == jnp.float32
    # Each of 11 chunks rounds its own part to bfloat16 (2^-9); the sum does not round again.
    assert np.abs(one_by_one - exact).max() < 2**-8 * np.abs(exact).max()


def test_garbage_at_unscored_positions_reaches_nothing():
    hidden, head, tokens, previous, response_ids = draw(4)
    used = np.zeros((R, T), bool)
    scored = np.asarray(response_ids) >= 0
    used[np.nonzero(scored)[0], np.asarray(previous)[scored]] = True
    dirty = jnp.where(jnp.asarray(used)[..., None], hidden, jnp.nan)

    def total(hidden, head):
        return jnp.sum(response_log_probs(hidden, head, tokens, previous, response_ids, P, chunk_tokens=4)[0])

    for ours, clean in zip(
        jax.tree.leaves(jax.value_and_grad(total, (0, 1))(dirty, head)),
        jax.tree.leaves(jax.value_and_grad(total, (0, 1))(hidden, head)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, clean)


def largest_array(compiled) -> int:
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_all_logits_exist_neither_forward_nor_backward():
    hidden, head, *ids = draw(5)

    def forward(hidden, head):
        return jnp.sum(response_log_probs(hidden, head, *ids, P, chunk_tokens=3)[0])

    def forward_dense(hidden, head):
        return jnp.sum(dense(hidden, head, *ids))

    for function, reference in ((forward, forward_dense), (jax.grad(forward, (0, 1)), jax.grad(forward_dense, (0, 1)))):
        assert largest_array(jax.jit(reference).lower(hidden, head).compile()) >= R * T * V
        assert largest_array(jax.jit(function).lower(hidden, head).compile()) <= R * 3 * V


def test_logits_are_constrained_by_the_names_of_their_axes():
    seen = []

    def constrain(logits, axes):
        if "vocab" in axes:
            seen.append((logits.shape, axes))
        return logits

    batch = draw(6)
    constrained, _, _ = response_log_probs(*batch, P, chunk_tokens=4, constrain=constrain)
    assert set(seen) == {((1, 4, V), ("shards", "chunk", "vocab")), ((1, 1, V), ("shards", "chunk", "vocab"))}
    np.testing.assert_array_equal(constrained, response_log_probs(*batch, P, chunk_tokens=4)[0])


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        response_log_probs(*draw(), P, chunk_tokens=0)


def test_shards_of_the_rows_change_nothing():
    hidden, head, *ids = draw(7)

    def total(hidden, head, shards):
        return response_log_probs(hidden, head, *ids, P, chunk_tokens=4, shards=Shards(shards))[0]

    for shards in (1, 3):
        got, vjp = jax.vjp(lambda *x, shards=shards: total(*x, shards), hidden, head)
        expected, dense_vjp = jax.vjp(lambda *x: dense(*x, *ids), hidden, head)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        for ours, reference in zip(vjp(jnp.arange(1.0, P + 1)), dense_vjp(jnp.arange(1.0, P + 1)), strict=True):
            np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)


def test_a_gradient_alone_computes_the_logits_once():
    """As in the second pass of a micro-batched step: nothing of the forward pass is left in the program."""
    batch = draw(8)

    def gradient(hidden, head):
        return jax.vjp(lambda *x: response_log_probs(*x, *batch[2:], P)[0], hidden, head)[1](jnp.ones(P))

    def both(hidden, head):
        value, vjp = jax.vjp(lambda *x: response_log_probs(*x, *batch[2:], P)[0], hidden, head)
        return value, vjp(jnp.ones(P))

    def dots(function):
        return jax.jit(function).lower(*batch[:2]).compile().as_text().count(" dot(")

    assert dots(gradient) < dots(both)
