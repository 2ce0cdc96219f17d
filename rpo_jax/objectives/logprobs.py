"""From hidden states to one log-prob per response, without ever holding all logits.

Letters: R rows and T tokens of a packed batch, t tokens of a chunk, D hidden width, V vocabulary, P responses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Constrain = Callable[[jax.Array, tuple[str, ...]], jax.Array]


def _chunk_log_probs(
    head: Float[Array, "D V"], hidden: Float[Array, "R t D"], targets: Int[Array, "R t"], constrain: Constrain
) -> Float[Array, "R t"]:
    """log softmax(hidden @ head)[target], float32."""
    # Cast here, not before the scan: the head's gradient then accumulates over chunks in its own dtype.
    logits = jnp.einsum("rtd,dv->rtv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = constrain(logits, ("rows", "tokens", "vocab"))
    # A sum over a comparison, not a gather: it stays local where the vocabulary is split over devices.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def response_log_probs(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "R T"],
    previous: Int[Array, "R T"],
    response_ids: Int[Array, "R T"],
    num_responses: int,
    *,
    chunk_tokens: int = 64,
    constrain: Constrain | None = None,
) -> tuple[Float[Array, "P"], Int[Array, "P"]]:
    """Summed log-prob (nats, float32) and number of scored tokens of every response of the batch.

    log pi(y_p) = sum over scored tokens k of p of log softmax(hidden[r, previous[r, k]] @ head)[tokens[r, k]]

    The head runs on `chunk_tokens` scored tokens of every row at a time, and again in the backward pass, so that
    logits of R x chunk_tokens x V are the most that exist at once; chunks without a scored token are skipped. Rows
    stay a dimension throughout: they may be split over devices, and the vocabulary too; the sum by response is then
    the gather.

    Args:
        hidden: final hidden states; their dtype is that of the head's product, which accumulates in float32.
        head: output projection; give the float32 master, so that its gradient accumulates in float32.
        previous: index in the row of each token's predictor.
        response_ids: 0 to num_responses - 1 for scored tokens, -1 elsewhere.
        num_responses: P, static.
        chunk_tokens: tokens of a row per chunk; T need not be a multiple.
        constrain: applied to each chunk's logits with the names of their axes, ("rows", "tokens", "vocab").

    Raises:
        ValueError: chunk_tokens below 1.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1.")
    num_rows, num_tokens = tokens.shape
    chunk_tokens = min(chunk_tokens, num_tokens)
    num_chunks = -(-num_tokens // chunk_tokens)

    # Scored tokens first in every row: whatever lies behind those of the fullest row costs nothing.
    order = jnp.argsort(response_ids < 0, axis=1, stable=True)
    tokens, previous, response_ids = (jnp.take_along_axis(x, order, axis=1) for x in (tokens, previous, response_ids))
    scored = response_ids >= 0
    predictor = jnp.take_along_axis(hidden, previous[..., None], axis=1)
    # Garbage at unscored positions must not reach a gradient through 0 * nan.
    predictor = jnp.where(scored[..., None], predictor, 0)

    def in_chunks(x: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, num_chunks * chunk_tokens - num_tokens)] + [(0, 0)] * (x.ndim - 2)
        return jnp.moveaxis(jnp.pad(x, padding).reshape(num_rows, num_chunks, chunk_tokens, *x.shape[2:]), 1, 0)

    constrain = constrain or (lambda x, _: x)

    # Recomputed as a whole, the condition included: what it saved for the backward pass would be saved per chunk.
    @partial(jax.checkpoint, prevent_cse=False)  # inside a scan nothing can be merged with the forward pass
    def chunk_log_probs(head: jax.Array, chunk: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        any_scored, hidden, targets = chunk
        return jax.lax.cond(
            any_scored,
            lambda: _chunk_log_probs(head, hidden, targets, constrain),
            lambda: jnp.zeros(targets.shape, jnp.float32),
        )

    any_scored = jnp.any(in_chunks(scored), axis=(1, 2))
    _, chunks = jax.lax.scan(
        lambda carry, chunk: (carry, chunk_log_probs(head, chunk)),
        None,
        (any_scored, in_chunks(predictor), in_chunks(tokens)),
    )
    token_log_probs = jnp.moveaxis(chunks, 0, 1).reshape(num_rows, -1)[:, :num_tokens]

    slot = jnp.where(scored, response_ids, num_responses)  # one slot more, for what is not scored
    log_prob = jnp.zeros(num_responses + 1, jnp.float32).at[slot].add(jnp.where(scored, token_log_probs, 0.0))
    count = jnp.zeros(num_responses + 1, jnp.int32).at[slot].add(1)
    return log_prob[:num_responses], count[:num_responses]
