"""The shapes that signatures promise, checked at run time, with and without leading group dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from rpo_jax.objectives import contrast, logprobs, losses, metrics

checked = jaxtyped(typechecker=beartype)
M, N, K, E = 3, 4, 2, 5


def arrays(*groups):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(*groups, *shape)), jnp.float32)

    def ids(size):
        return jnp.broadcast_to(jnp.arange(size), (*groups, size))

    return normal, ids, jnp.ones((*groups, M, N), bool)


@pytest.mark.parametrize("groups", [(), (2,), (2, 3)])
def test_contrast_and_losses_keep_their_shapes(groups):
    def call_all():
        normal, ids, mask = arrays(*groups)
        chosen_emb, rejected_emb = normal(M, E), normal(N, E)
        distance = checked(contrast.cosine_distance)(chosen_emb, rejected_emb)
        temperature = checked(contrast.calibrated_temperature)(distance, mask, 2.0)
        weights = checked(contrast.embedding_weights)(chosen_emb, rejected_emb, temperature, mask)
        checked(contrast.row_perplexity)(weights, mask)
        checked(contrast.uniform_weights)(mask)
        for square in (contrast.pair_weights, contrast.pair_mask):
            checked(square)(mask[..., :M])
        checked(contrast.diagonal_weights)(M, 0.8, mask[..., :M])
        valid = (jnp.any(mask, axis=-1), jnp.any(mask, axis=-2))
        checked(contrast.valid_entries)(*valid, ids(M), ids(N), ids(M), ids(N))
        checked(losses.pairwise_loss)(normal(M), normal(N), weights, mask=mask)
        checked(losses.sft_loss)(normal(M), ids(M))
        checked(losses.kto_loss)(normal(M), normal(N), jnp.ones(K))
        matrix = contrast.ContrastWeights(weights, mask, temperature)
        checked(metrics.contrast_metrics)(matrix, 1 - distance, ids(M), ids(N), paired=False)

    jax.eval_shape(call_all)


def test_log_probs_keep_their_shapes():
    ids = jnp.zeros((2, 7), int)
    checked(logprobs.response_log_probs)(jnp.ones((2, 7, 3)), jnp.ones((3, 5)), ids, ids, ids, 4)


def test_a_transposed_weight_matrix_is_noticed():
    normal, _, _ = arrays()
    with pytest.raises(TypeCheckError):
        checked(losses.pairwise_loss)(normal(M), normal(N), normal(N, M))
