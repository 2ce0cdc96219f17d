"""From hidden states to one log-prob per response, without ever holding all logits.

Letters: R rows and T tokens of a packed batch, D hidden width, V vocabulary, P responses; S shards, each with so many
rows or, where devices share these, a part of their tokens; m hidden states of a shard, n tokens of its rows, c tokens
of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.core.shards import ONE, Shards

Constrain = Callable[[jax.Array, tuple[str, ...]], jax.Array]

# Scored tokens of a shard whose logits exist at once. Every chunk reads and writes the head's whole gradient, so they
# should be large; the rest of the tokens goes into smaller ones, so that little is computed for nothing.
CHUNK_TOKENS = 1024
REST_SHARE = 8
HALVES = (1, 2, 4, 8)  # shares of a chunk in fewer turns, each of which is one more loop to compile


class Settings(NamedTuple):
    """How the head runs; arguments of `response_log_probs`."""

    chunk_tokens: int
    constrain: Constrain
    softcap: float | None = None
    collides: bool = False
    keeps: bool = False

    @property
    def shares(self) -> tuple[int, ...]:
        return HALVES if self.keeps else (1, REST_SHARE)


class Kept(NamedTuple):
    """What the backward pass finds of the first chunk."""

    logits: Float[Array, "S c V"]
    normaliser: Float[Array, "S c"]  # log of the sum of their exponentials


def response_log_probs(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "R T"],
    previous: Int[Array, "R T"],
    response_ids: Int[Array, "R T"],
    num_responses: int,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    shards: Shards = ONE,
    constrain: Constrain | None = None,
    softcap: float | None = None,
    collides: bool = False,
    keeps: bool = False,
) -> tuple[Float[Array, "P"], Int[Array, "P"], Float[Array, "P"] | None]:
    """Summed log-prob (nats, float32) and number of scored tokens of every response of the batch.

    log pi(y_p) = sum over scored tokens k of p of log softmax(hidden[r, previous[r, k]] @ head)[tokens[r, k]]

    The head runs on scored tokens alone, `chunk_tokens` of every shard at a time, and again in the backward pass, so
    that logits of shards x chunk_tokens x V are the most that exist at once. Shards stay a dimension throughout: they
    may lie on different devices, and the vocabulary may be split too; the sum by response is then the gather. A token
    is scored where its predictor is, so that no hidden state is sent.

    Args:
        hidden: final hidden states; their dtype is that of the head's product, which accumulates in float32. Striped
            where devices share a row's tokens, alone of all these arrays.
        head: output projection; give the float32 master, so that its gradient accumulates in float32.
        previous: index in the row of each token's predictor.
        response_ids: 0 to num_responses - 1 for scored tokens, -1 elsewhere.
        num_responses: P, static.
        chunk_tokens: scored tokens of a shard per chunk.
        shards: among how many devices the rows are split, which divides R, and the tokens of each.
        constrain: applied to each chunk's logits with the names of their axes, ("shards", "chunk", "vocab"), and to
            what they are made from.
        softcap: c, where the model's logits are c tanh(hidden @ head / c).
        collides: give also the sum over a response's tokens of log sum_v p_v^2, nats, without gradient: the log of the
            probability that two tokens drawn there are the same. None otherwise.
        keeps: keep the first chunk's logits for the backward pass, which then does not multiply them again.

    Raises:
        ValueError: chunk_tokens below 1.
    """
    settings = Settings(chunk_tokens, constrain or _anywhere, softcap, collides, keeps)
    log_probs, collision, _, response_ids = _scored_first(
        hidden, head, tokens, previous, response_ids, settings, shards
    )
    if collision is not None:
        collision, _ = by_response(collision, response_ids, num_responses)
    return *by_response(log_probs, response_ids, num_responses), collision


def by_response(
    log_probs: Float[Array, "S n"], response_ids: Int[Array, "S n"], num_responses: int
) -> tuple[Float[Array, "P"], Int[Array, "P"]]:
    """Sum and number of every response's tokens; what is not scored counts for none."""
    scored = response_ids >= 0
    slot = jnp.where(scored, response_ids, num_responses)  # one slot more, for what is not scored
    log_prob = jnp.zeros(num_responses + 1, log_probs.dtype).at[slot].add(jnp.where(scored, log_probs, 0.0))
    count = jnp.zeros(num_responses + 1, jnp.int32).at[slot].add(1)
    return log_prob[:num_responses], count[:num_responses]


def token_log_probs(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "R T"],
    previous: Int[Array, "R T"],
    response_ids: Int[Array, "R T"],
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    shards: Shards = ONE,
    constrain: Constrain | None = None,
    softcap: float | None = None,
    keeps: bool = False,
) -> Float[Array, "R T"]:
    """Log-prob of every scored token (nats, float32) at its place, 0 elsewhere; as `response_log_probs`."""
    settings = Settings(chunk_tokens, constrain or _anywhere, softcap, keeps=keeps)
    log_probs, _, order, response_ids_first = _scored_first(
        hidden, head, tokens, previous, response_ids, settings, shards
    )
    log_probs = jnp.where(response_ids_first >= 0, log_probs, 0.0)
    by_place = jnp.take_along_axis(log_probs, jnp.argsort(order, axis=1), axis=1)
    # Every token is scored by one of the devices that share its row.
    return jnp.sum(by_place.reshape(shards.rows, shards.context, -1), axis=1).reshape(tokens.shape)


@jax.named_scope("head")
def _scored_first(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "R T"],
    previous: Int[Array, "R T"],
    response_ids: Int[Array, "R T"],
    settings: Settings,
    shards: Shards,
) -> tuple[Float[Array, "S n"], Float[Array, "S n"] | None, Int[Array, "S n"], Int[Array, "S n"]]:
    """Log-probs of every shard's tokens with its scored ones first, where each of them was, and its response.

    After the log-probs come, where they are asked for, those that two tokens drawn there are the same.
    """
    chunk_tokens = settings.chunk_tokens
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1.")
    num_rows, num_tokens = tokens.shape
    assert num_rows % shards.rows == 0
    own_tokens = num_tokens // shards.context
    device, previous = jnp.divmod(shards.place(previous, num_tokens), own_tokens)
    # Index of the predictor in the shard, no longer in the row.
    predictor = previous + jnp.arange(num_rows)[:, None] % (num_rows // shards.rows) * own_tokens

    def of_shards(x: Array) -> Array:
        """[R, T] to [S, n]: all devices that share a row have all of its tokens' ids."""
        return settings.constrain(jnp.repeat(x.reshape(shards.rows, -1), shards.context, axis=0), ("shards", "chunk"))

    flat_tokens, predictor, response_ids, device = map(of_shards, (tokens, predictor, response_ids, device))
    own = device == jnp.arange(shards.count)[:, None] % shards.context
    response_ids = jnp.where(own, response_ids, -1)
    # Scored tokens first: what lies behind those of the fullest shard costs nothing.
    order = jnp.argsort(response_ids < 0, axis=1, stable=True)
    flat_tokens, predictor, response_ids = (
        jnp.take_along_axis(x, order, axis=1) for x in (flat_tokens, predictor, response_ids)
    )
    scored = response_ids >= 0
    both: Any = _token_log_probs(
        settings._replace(chunk_tokens=min(chunk_tokens, flat_tokens.shape[1])),
        settings.constrain(shards.split(hidden), ("shards", "chunk", "hidden")),
        head,
        flat_tokens,
        predictor,
        scored,
    )
    return *both, order, response_ids


def _anywhere(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return x


Chunk = Callable[[jax.Array], jax.Array]  # [S, n, ...] to the chunk's [S, c, ...]


def _over_chunks(
    settings: Settings, begin: Any, end: jax.Array, body: Callable[[Chunk, jax.Array, Any], Any], carry: Any
) -> Any:
    """Run body(chunk, its first token, carry) over the tokens from `begin` on: large chunks, then smaller ones."""
    for share in settings.shares:
        size = -(-settings.chunk_tokens // share)
        left = jnp.maximum(end - begin, 0)
        count = (left + size - 1) // size if share == settings.shares[-1] else left // size

        def turn(number: jax.Array, carry: Any, size: int = size, begin: Any = begin) -> Any:
            start = begin + number * size
            return body(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1), start, carry)

        carry = lax.fori_loop(0, count, turn, carry)
        begin += count * size
    return carry


def _most(scored: Bool[Array, "S n"]) -> Int[Array, ""]:
    return jnp.max(jnp.sum(scored, axis=1))


def _padded(settings: Settings, *arrays: jax.Array) -> list[jax.Array]:
    """The last chunk may reach past the end: a slice that started earlier instead would count tokens twice."""
    return [jnp.pad(x, ((0, 0), (0, settings.chunk_tokens))) for x in arrays]


def _read(hidden: Float[Array, "S m D"], predictor: Array, scored: Array) -> Float[Array, "S c D"]:
    """Hidden states of a chunk's predictors."""
    at = jnp.take_along_axis(hidden, predictor[..., None], axis=1)
    # Garbage at unscored positions must not reach a gradient through 0 * nan.
    return jnp.where(scored[..., None], at, 0)


def _logits(settings: Settings, at: Float[Array, "S c D"], head: Float[Array, "D V"]) -> Float[Array, "S c V"]:
    """In float32."""
    logits = jnp.einsum("scd,dv->scv", at, head.astype(at.dtype), preferred_element_type=jnp.float32)
    if settings.softcap is not None:
        logits = settings.softcap * jnp.tanh(logits / settings.softcap)
    return settings.constrain(logits, ("shards", "chunk", "vocab"))


def _is_target(logits: Float[Array, "S c V"], targets: Int[Array, "S c"]) -> Bool[Array, "S c V"]:
    # A comparison, not an index: it stays local where the vocabulary is split over devices.
    return jnp.arange(logits.shape[-1]) == targets[..., None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_log_probs(settings: Settings, *inputs: jax.Array) -> tuple[Any, Any]:
    """log softmax(hidden[s, predictor] @ head)[target] where scored, which comes first in every shard.

    And where it is asked for, log sum_v softmax_v^2, which has no gradient.
    """
    return _run(settings, False, *inputs)[0]


def _run(
    settings: Settings,
    keeps: bool,
    hidden: Float[Array, "S m D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "S n"],
    predictor: Int[Array, "S n"],
    scored: Bool[Array, "S n"],
) -> tuple[tuple[Any, Any], Kept | None]:
    ids = _padded(settings, targets, predictor, scored)
    shape, most = ids[0].shape, _most(scored)

    def body(chunk: Chunk, start: jax.Array, carry: tuple[Any, Kept | None]) -> tuple[Any, Kept | None]:
        targets, predictor, scored = map(chunk, ids)
        logits = _logits(settings, _read(hidden, predictor, scored), head)
        target = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        new: Any = [target - normaliser]
        if settings.collides:
            new.append(jax.nn.logsumexp(2 * logits, axis=-1) - 2 * normaliser)
        kept = None if carry[1] is None else Kept(logits, normaliser)
        return jax.tree.map(lambda of, x: lax.dynamic_update_slice_in_dim(of, x, start, axis=1), carry, (new, kept))

    empty: Any = [jnp.zeros(shape, jnp.float32)] * (1 + settings.collides)
    kept, begin = None, 0
    if keeps:
        begin = settings.chunk_tokens
        # The last and smallest turn may reach past the chunk's end.
        room = begin + -(-begin // settings.shares[-1])
        first = jnp.zeros((len(hidden), room, head.shape[-1]), jnp.float32)
        kept = Kept(first, jnp.zeros(first.shape[:2], jnp.float32))
        empty, kept = _over_chunks(settings, 0, jnp.minimum(most, begin), body, (empty, kept))
    padded, _ = _over_chunks(settings, begin, most, body, (empty, None))
    log_probs, *collision = (x[:, : targets.shape[1]] for x in padded)
    return (log_probs, collision[0] if collision else None), kept


def _forward(settings: Settings, *inputs: jax.Array) -> tuple[Any, tuple[Any, ...]]:
    # Without `keeps` nothing of the forward pass is kept: where only the gradient is asked for, it need not run at all.
    results, kept = _run(settings, settings.keeps, *inputs)
    return results, (*inputs, kept)


def _backward(settings: Settings, saved: tuple[Any, ...], cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
    """d log p[target] / d logits = onehot(target) - softmax(logits); a cap c multiplies by 1 - (logits / c)^2."""
    cotangent, _ = cotangents
    hidden, head, targets, predictor, scored, kept = saved
    ids = _padded(settings, targets, predictor, scored, jnp.where(scored, cotangent, 0.0))
    most = _most(scored)

    def body(
        kept: Kept | None, chunk: Chunk, _: jax.Array, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        targets, predictor, scored, weight = map(chunk, ids)
        at = _read(hidden, predictor, scored)
        if kept is None:
            logits = _logits(settings, at, head)
            share = jax.nn.softmax(logits, axis=-1)
        else:
            logits, normaliser = map(chunk, kept)
            share = jnp.exp(logits - normaliser[..., None])
        difference = _is_target(logits, targets) - share
        if settings.softcap is not None:
            difference *= 1 - jnp.square(logits / settings.softcap)
        difference = (weight[..., None] * difference).astype(hidden.dtype)
        wide = partial(jnp.einsum, preferred_element_type=jnp.float32)
        # One token may predict several: the first ones of all responses to a prompt.
        part = wide("scv,dv->scd", difference, head.astype(hidden.dtype))
        to_hidden = jax.vmap(lambda x, index, values: x.at[index].add(values))(carry[0], predictor, part)
        return to_hidden, carry[1] + wide("scd,scv->sdv", at, difference)

    # The head's gradient stays apart for each shard, and is summed once: not over all devices for every chunk.
    of_shards = settings.constrain(jnp.zeros((len(hidden), *head.shape), jnp.float32), ("shards", "hidden", "vocab"))
    carry, begin = (jnp.zeros(hidden.shape, jnp.float32), of_shards), 0
    if kept is not None:
        begin = settings.chunk_tokens
        carry = _over_chunks(settings, 0, jnp.minimum(most, begin), partial(body, kept), carry)
    to_hidden, to_head = _over_chunks(settings, begin, most, partial(body, None), carry)
    return to_hidden.astype(hidden.dtype), jnp.sum(to_head, axis=0).astype(head.dtype), None, None, None


_token_log_probs.defvjp(_forward, _backward)
