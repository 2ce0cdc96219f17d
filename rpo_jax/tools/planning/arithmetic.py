"""Operations and bytes of a training step, counted from the sizes of the model and of the batch.

Matrix products only; a product of [a, b] and [b, c] counts 2abc operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Sizes = Any  # of a decoder, under the names of rpo_jax.models.ModelConfig; benchmarks/ has sizes of its own


def body_parameters(sizes: Sizes, *, stored: bool = False) -> int:
    """N_body: entries of the layers' matrices that a token meets; of all that there are, where `stored`.

    Per layer: query and output D x HK each, key and value D x GK each, gate, up and down D x F each, with hidden size
    D, H heads, G key-value heads of dimension K, and MLP width F: of experts, those that a token uses, or with `stored`
    all that there are. Routers are too small to count.
    """
    name = "mlp_stored_width" if stored else "mlp_width"
    attention = 2 * sizes.num_heads + 2 * sizes.num_kv_heads
    width = getattr(sizes, name, sizes.intermediate_size)
    layer = sizes.hidden_size * (attention * sizes.head_dim + 3 * width)
    return sizes.num_layers * layer


def head_parameters(sizes: Sizes) -> int:
    """N_head: entries of the output head, D x V."""
    return sizes.hidden_size * sizes.vocab_size


def visible_pairs(prompt_tokens: int, response_tokens: Sequence[int]) -> int:
    """(query, key) pairs of one prompt and its responses.

    A prompt token sees the prompt's tokens up to itself: P (P + 1) / 2 pairs. A response token sees the whole prompt
    and its own response up to itself: R P + R (R + 1) / 2 pairs a response. No response sees another.
    """
    own = prompt_tokens * (prompt_tokens + 1) // 2
    return own + sum(count * prompt_tokens + count * (count + 1) // 2 for count in response_tokens)


def necessary_flops(sizes: Sizes, prompt_tokens: int, response_tokens: Sequence[int], *, frozen: bool = False) -> int:
    """Operations of forward and backward for one prompt and its responses.

    6 N_body (P + sum R) + 6 N_head sum R + 12 L H K pairs

    A matrix entry costs a multiplication and an addition per token forward, and as much again for each of the
    gradients with respect to input and matrix: 6; 4 where matrices are frozen, whose adapters (LoRA) are too small to
    count. A visible pair costs, per layer and head, a dot product of length K for the score and one for the weighted
    sum of values, 4K forward, and twice that backward: 12K. The output head runs where a response token is scored. The
    reference's forward pass is not in it: it needs to run once per data set, not per step. Nor are norms, softmax, the
    embedding and the optimizer.
    """
    responses = sum(response_tokens)
    used = body_parameters(sizes) * (prompt_tokens + responses) + head_parameters(sizes) * responses
    matrices = (4 if frozen else 6) * used
    per_pair = 12 * sizes.num_layers * sizes.num_heads * sizes.head_dim
    return matrices + per_pair * visible_pairs(prompt_tokens, response_tokens)


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """What a step works on, over all devices.

    Attributes:
        rows: packed rows R, padding included.
        row_tokens: their length T.
        scored_tokens: whose log-prob is taken.
        seen_pairs: (query, key) pairs whose scores are computed, in all rows.
        micro_batches: how many the rows are cut into.
        remat: none, dots, attention or full.
        fused_attention: whether the scores are never in memory.
        reference_passes: forward passes of a reference in the step: 0 where its log-probs are cached.
        frozen: whether the layers' matrices get no gradient of their own (LoRA).
        compute_bytes: of a number in the matrix products.
        stored_bytes: of a weight of the layers' matrices, as it is kept.
        backward_products: of attention in the backward pass, where the forward pass has two.
    """

    rows: int
    row_tokens: int
    scored_tokens: float
    seen_pairs: float
    micro_batches: int
    remat: str
    fused_attention: bool
    reference_passes: int = 0
    frozen: bool = False
    compute_bytes: int = 2
    stored_bytes: float = 4
    backward_products: int = 4

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens

    @property
    def forward_passes(self) -> int:
        """Of the policy: one, one more for micro-batches, and one more where each layer is computed again."""
        return 1 + (self.micro_batches > 1) + (self.remat in ("attention", "full"))


def step_flops(sizes: Sizes, step: StepSizes) -> float:
    """Operations that a step does, over all devices, padding and recomputation included.

    Forward 2 N_body R T + 4 L H K pairs, as often as the step has forward passes; backward twice that, without the
    matrices' own gradients where they are frozen, and with the scores again, 2 L H K pairs or more, where attention
    is fused. Of what experts multiply `remat: dots` keeps nothing, so their products are computed again.
    The head's logits are computed twice and their gradients once: 8 N_head for each scored token.
    """
    matrices = 2 * body_parameters(sizes) * step.tokens
    attention = 4 * sizes.num_layers * sizes.num_heads * sizes.head_dim * step.seen_pairs
    head = 2 * head_parameters(sizes) * step.scored_tokens
    forward = (step.forward_passes + step.reference_passes) * (matrices + attention)
    forward -= attention * (step.remat == "attention")  # what it gave is kept
    if step.remat == "dots" and body_parameters(sizes, stored=True) != body_parameters(sizes):
        forward += 2 * 3 * sizes.num_layers * sizes.hidden_size * sizes.mlp_width * step.tokens
    backward = matrices * (1 if step.frozen else 2) + attention * step.backward_products / 2
    return forward + backward + head * ((3 if step.frozen else 4) + step.reference_passes)


def step_bytes(
    sizes: Sizes,
    step: StepSizes,
    *,
    fsdp: int,
    tensor: int,
    row_shards: int,
    optimizer_slots: int,
    head_chunk: int,
    expert: int = 1,
    context: int = 1,
) -> float:
    """Bytes that one device moves between its memory and its arithmetic in a step, roughly.

    Matrices: each pass of each micro-batch reads its share as it is kept and writes and reads the gathered one in the
    compute dtype; the backward pass reads it once more and writes a float32 gradient. Activations: what a layer writes
    is read once, and the backward pass moves twice as much. Head: per chunk its matrix, its float32 gradient and the
    chunk's float32 logits. Optimizer: reads parameter, gradient and state, writes parameter and state, all float32.
    Experts are counted whole, some token of a batch uses each; gathered are those that a device multiplies with. So are
    keys and values where devices share a row's tokens: every pass writes and reads those of all its tokens.
    """
    number, layers = step.compute_bytes, body_parameters(sizes, stored=True)
    table, has_experts = head_parameters(sizes), layers != body_parameters(sizes)
    shards, token_shards = fsdp * expert * context * tensor, row_shards * context
    share = (layers + 2 * table) / shards
    passes = step.forward_passes + step.reference_passes
    trained = 0 if step.frozen else 1
    # The last forward pass of a micro-batch keeps nothing for the backward one under remat: full; it gathers again.
    whole = layers / (tensor * (expert if has_experts else 1))
    gathered = step.micro_batches * (passes + 1) * (step.stored_bytes * layers / shards + 2 * number * whole)
    gradient = trained * 4 * share * (step.micro_batches if step.micro_batches == 1 else 3 * step.micro_batches)
    update = trained * 4 * share * (1 + 2 + optimizer_slots + 1 + optimizer_slots)

    width = getattr(sizes, "mlp_width", sizes.intermediate_size)
    inner = 2 * (sizes.num_heads + sizes.num_kv_heads) * sizes.head_dim + 3 * width
    per_token = sizes.num_layers * (4 * sizes.hidden_size + inner / tensor) * number
    activations = 2 * per_token * step.tokens / token_shards * (passes + 2)
    if context > 1:
        of_keys = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim / tensor * number
        activations += 2 * of_keys * step.tokens / row_shards * (passes + 2)
    scores = 0.0
    if not step.fused_attention:
        scores = 4 * 4 * sizes.num_layers * sizes.num_heads / tensor * step.seen_pairs / token_shards * (passes + 2)

    scored = step.scored_tokens / token_shards
    chunks = max(1.0, scored / head_chunk)
    head = chunks * table / tensor * (3 * number + trained * 2 * 4) + 6 * 4 * scored * sizes.vocab_size / tensor
    return gathered + gradient + update + activations + scores + head
