"""How far a trained policy has gone from what it started from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rpo_jax import models
from rpo_jax.config import MeshConfig
from rpo_jax.core.records import Message
from rpo_jax.data.tokenize import PromptEncoder
from rpo_jax.hosts import sharding
from rpo_jax.models import ModelConfig
from rpo_jax.objectives.logprobs import response_log_probs
from rpo_jax.sampling.policy import find_policy

ROWS = 32  # scored at a time
TOKENS = 32  # widths are multiples of this, so that few programs are compiled


def divergences(
    policy: Path, reference: Path, answers: Sequence[tuple[str | tuple[Message, ...], str, bool]]
) -> Float[np.ndarray, "n"]:
    """log policy(y | x) - log reference(y | x) of whole answers, nats, the end token included.

    Their mean over x and y ~ policy(. | x) is an unbiased estimate of KL(policy || reference) for answers sampled at
    temperature 1, as far as their texts have the tokens again that were sampled.

    Args:
        answers: prompts, the policy's answers to them, and whether they ended rather than ran out of tokens.
    """
    trained, mesh = find_policy(str(policy)), sharding.make_mesh(MeshConfig())
    start = find_policy(str(reference))
    encoder = PromptEncoder(trained.tokenizer, "auto", {}, None, "keep_end")
    end = [trained.tokenizer.eos_token_id]
    texts = encoder.template.encoder.encode([text for _, text, _ in answers])
    rows = [
        (encoder.encode(prompt).tolist(), ids.tolist() + end * ended)
        for (prompt, _, ended), ids in zip(answers, texts, strict=True)
    ]
    # Those of about one length together, in equal batches, so that little is padded and few programs are compiled.
    order = sorted(range(len(rows)), key=lambda number: sum(map(len, rows[number])))
    size = -(-len(rows) // -(-len(rows) // ROWS))
    totals = np.zeros(len(rows))
    log_probs = jax.jit(_log_probs, static_argnums=0)
    # An accelerator may multiply float32 at less than its precision unless told otherwise, and differences are small.
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        both = [trained.load(mesh), start.load(mesh)]
        for first in range(0, len(rows), size):
            numbers = order[first : first + size]
            tokens, scored = _padded([rows[number] for number in numbers], size)
            own, before = (np.asarray(log_probs(trained.model_config, params, tokens, scored)) for params in both)
            totals[numbers] = (own - before)[: len(numbers)]
    return totals


def _padded(
    rows: Sequence[tuple[list[int], list[int]]], size: int
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    width = -(-max(len(prompt) + len(answer) for prompt, answer in rows) // TOKENS) * TOKENS
    tokens, scored = np.zeros((size, width), np.int32), np.zeros((size, width), bool)
    for i, (prompt, answer) in enumerate(rows):
        tokens[i, : len(prompt) + len(answer)] = prompt + answer
        scored[i, len(prompt) : len(prompt) + len(answer)] = True
    return tokens, scored


def _log_probs(
    model_config: ModelConfig, params: Any, tokens: Int[np.ndarray, "B T"], scored: Bool[np.ndarray, "B T"]
) -> Float[Array, "B"]:
    """Summed log-prob of the scored tokens of each row."""
    rows, width = tokens.shape
    ids = jnp.asarray(tokens)
    hidden = models.hidden_states(model_config, params, ids)
    previous = jnp.broadcast_to(jnp.arange(width) - 1, tokens.shape)
    row_ids = jnp.where(scored, jnp.arange(rows)[:, None], -1)
    head, softcap = models.output_head(model_config, params), model_config.parts.logit_softcap
    return response_log_probs(hidden, head, ids, previous, row_ids, rows, softcap=softcap)[0]
