"""Exact micro-batches: the gradient of a loss that sees the model through its responses' log-probs alone.

Some losses see the log-prob and the value of every scored token instead, which are scalars as well.

Letters: R rows and T tokens of a packed batch, in B micro-batches of r rows; P = M + N + K response slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rpo_jax.core.records import Batch
from rpo_jax.models.experts import Routing

Params = Any


class TokenScores(NamedTuple):
    log_prob: Float[Array, "R T"]  # of scored tokens, nats; 0 elsewhere
    value: Float[Array, "R T"] | None = None  # None without a head for it


class LogProbs(NamedTuple):
    log_prob: Float[Array, "P"]  # summed over scored tokens, nats
    num_tokens: Int[Array, "P"]
    log_partition: Float[Array, "P"] | None = None  # of each response's prompt, nats; None where none is learned
    tokens: TokenScores | None = None  # None where the loss sees sums alone
    collision: Float[Array, "P"] | None = None  # log sum_v p_v^2 summed over scored tokens; None where not asked for
    routing: Routing | None = None  # of each layer, summed over tokens; None without experts


Forward = Callable[..., LogProbs]  # of parameters, packed rows and the number of responses


ROW_FIELDS = ("tokens", "positions", "segment_ids", "branch_ids", "previous", "response_ids")


def micro_batches(batch: Batch, micro_rows: int | None) -> tuple[dict[str, Int[Array, "B r T"]], int]:
    """The row arrays split into micro-batches, and their number B.

    A micro-batch takes every B-th row, not a block of rows: each device then keeps its own rows in every one.
    """
    rows = batch.tokens.shape[0]
    micro_rows = rows if micro_rows is None else min(micro_rows, rows)
    assert rows % micro_rows == 0, "the loader pads rows to a multiple of micro_rows"
    count = rows // micro_rows
    return {name: _split(getattr(batch, name), count) for name in ROW_FIELDS}, count


def _split(rows: Array, count: int) -> Array:
    return rows.reshape(-1, count, rows.shape[-1]).swapaxes(0, 1)


def _joined(micro: Array) -> Array:
    return micro.swapaxes(0, 1).reshape(-1, micro.shape[-1])


def make_loss_and_gradient(
    forward: Forward,
    loss: Callable[[LogProbs], tuple[Array, Any]],
    params: Params,
    batch: Batch,
    micro_rows: int | None,
    keep: bool = False,
) -> tuple[Array, Any, Params]:
    """Loss, auxiliary output and gradient, with the activations of one micro-batch in memory at a time.

    The loss sees the model through P scalars, so this is exact: all log-probs first, then the loss's derivative with
    respect to each, then every micro-batch's vector-Jacobian product with its own derivatives. A learned log Z is P
    scalars more, tokens are R T; the sums over tokens of a router's probabilities, as many as its layers have experts,
    are scalars as well.

    Args:
        keep: keep what rematerialisation keeps of every micro-batch, instead of running it forward a second time.
    """
    rows, count = micro_batches(batch, micro_rows)
    num_responses = batch.num_responses
    if keep or count == 1:

        def whole(params: Params) -> tuple[Array, Any]:
            if count == 1:
                return loss(forward(params, {name: values[0] for name, values in rows.items()}, num_responses))
            return loss(accumulate_log_probs(forward, params, rows, num_responses))

        (value, aux), gradient = jax.value_and_grad(whole, has_aux=True)(params)
        return value, aux, gradient

    log_probs = accumulate_log_probs(forward, params, rows, num_responses)
    (value, aux), derivative = jax.value_and_grad(
        lambda scalars: loss(scalars._replace(num_tokens=log_probs.num_tokens)), has_aux=True
    )(_differentiable(log_probs))

    def backward(gradient: Params, micro: tuple[dict[str, Array], Any]) -> tuple[Params, None]:
        _, vjp = jax.vjp(lambda p: _differentiable(forward(p, micro[0], num_responses)), params)
        return jax.tree.map(jnp.add, gradient, vjp(derivative._replace(tokens=micro[1]))[0]), None

    of_tokens = jax.tree.map(lambda x: _split(x, count), derivative.tokens)
    gradient, _ = jax.lax.scan(backward, jax.tree.map(jnp.zeros_like, params), (rows, of_tokens))
    return value, aux, gradient


def _differentiable(log_probs: LogProbs) -> Any:
    return log_probs._replace(num_tokens=None)  # pyright: ignore[reportArgumentType]


def accumulate_log_probs(
    forward: Forward, params: Params, rows: dict[str, Int[Array, "B r T"]], num_responses: int
) -> LogProbs:
    """Log-probs of all responses, one micro-batch at a time: a response is in one row, so they add up."""

    def body(total: LogProbs, micro: dict[str, Array]) -> tuple[LogProbs, TokenScores | None]:
        log_probs = forward(params, micro, num_responses)
        return jax.tree.map(jnp.add, total, log_probs._replace(tokens=None)), log_probs.tokens

    first = jax.tree.map(lambda x: x[0], rows)
    shapes = jax.eval_shape(lambda p, micro: forward(p, micro, num_responses), params, first)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(tokens=None))
    total, tokens = jax.lax.scan(body, zero, rows)
    return total._replace(tokens=jax.tree.map(_joined, tokens))


def all_log_probs(forward: Forward, micro_rows: int | None, params: Params, batch: Batch) -> LogProbs:
    rows, _ = micro_batches(batch, micro_rows)
    return accumulate_log_probs(forward, params, rows, batch.num_responses)
