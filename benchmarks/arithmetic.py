"""The arithmetic that a preference step cannot do without, whatever the layout.

Matrix products only; a product of [a, b] and [b, c] counts 2abc operations.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.spec import ModelSizes


def body_parameters(sizes: ModelSizes) -> int:
    """N_body: entries of the layers' matrices.

    Per layer: query and output D x HK each, key and value D x GK each, gate, up and down D x F each, with hidden size
    D, H heads, G key-value heads of dimension K, and MLP width F.
    """
    attention = 2 * sizes.num_heads + 2 * sizes.num_kv_heads
    layer = sizes.hidden_size * (attention * sizes.head_dim + 3 * sizes.intermediate_size)
    return sizes.num_layers * layer


def head_parameters(sizes: ModelSizes) -> int:
    """N_head: entries of the output head, D x V."""
    return sizes.hidden_size * sizes.vocab_size


def visible_pairs(prompt_tokens: int, response_tokens: Sequence[int]) -> int:
    """(query, key) pairs of one prompt and its responses.

    A prompt token sees the prompt's tokens up to itself: P (P + 1) / 2 pairs. A response token sees the whole prompt
    and its own response up to itself: R P + R (R + 1) / 2 pairs a response. No response sees another.
    """
    own = prompt_tokens * (prompt_tokens + 1) // 2
    return own + sum(count * prompt_tokens + count * (count + 1) // 2 for count in response_tokens)


def necessary_flops(sizes: ModelSizes, prompt_tokens: int, response_tokens: Sequence[int]) -> int:
    """Operations of forward and backward for one prompt and its responses.

    6 N_body (P + sum R) + 6 N_head sum R + 12 L H K pairs

    A matrix entry costs a multiplication and an addition per token forward, and as much again for each of the
    gradients with respect to input and matrix: 6. A visible pair costs, per layer and head, a dot product of length K
    for the score and one for the weighted sum of values, 4K forward, and twice that backward: 12K. The output head
    runs where a response token is scored. The reference's forward pass is not in it: it needs to run once per data
    set, not per step. Nor are norms, softmax, the embedding and the optimizer.
    """
    responses = sum(response_tokens)
    matrices = 6 * body_parameters(sizes) * (prompt_tokens + responses) + 6 * head_parameters(sizes) * responses
    per_pair = 12 * sizes.num_layers * sizes.num_heads * sizes.head_dim
    return matrices + per_pair * visible_pairs(prompt_tokens, response_tokens)
