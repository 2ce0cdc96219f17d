"""From parameters and packed rows to what a loss sees of the model: log-probs, and what heads predict beside them."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from rpo_jax import models
from rpo_jax.config import Config
from rpo_jax.hosts import sharding
from rpo_jax.models import ModelConfig
from rpo_jax.objectives import partition, reward, value
from rpo_jax.objectives.logprobs import by_response, response_log_probs, token_log_probs
from rpo_jax.training.micro_batches import Forward, LogProbs, Params, TokenScores


def keeps_logits(micro_rows: int | None, remat: str, platform: str | None) -> bool:
    """Whether the backward pass finds the first logits of the head: on CPUs, where the head is much of a small model.

    Not in micro-batches, whose forward pass with a backward one is their second: it has no other need of logits.
    """
    return platform == "cpu" and micro_rows is None and remat in ("none", "dots")


def make_log_probs(
    config: Config,
    model_config: ModelConfig,
    mesh: Mesh,
    *,
    tokens: bool = False,
    collisions: bool = False,
    pad_id: int | None = None,
) -> Forward:
    """Function from parameters and packed rows to the log-probs of the responses that these rows hold.

    With the head of a learned log Z as a fourth argument, to their prompts' log Z too. With `tokens`, to the log-prob
    of every scored token besides, and with a value head as a fifth argument to its value. With `collisions` instead, to
    how likely two tokens drawn at each place are the same. With a reward head as a sixth argument its scores of the
    responses stand in the place of log-probs; `pad_id` is the tokenizer's padding token.
    """
    placement, policy = sharding.Placement(mesh), models.Policy(model_config)
    how = models.Execution(
        compute_dtype=config.model.compute_dtype,
        remat=config.model.remat,
        attention=config.model.attention,
        platform=mesh.devices.flat[0].platform,
        constrain=placement.constrain,
        split=models.Split(placement.shards, placement.per_shard, placement.gather, placement.mesh_axes),
    )
    policy.check(how, config.batch.row_tokens)
    shards = sharding.shards_of(mesh)
    chunks: Any = {
        "shards": shards,
        "constrain": placement.constrain,
        "softcap": model_config.parts.logit_softcap,
        "keeps": keeps_logits(config.batch.micro_rows, config.model.remat, how.platform),
    }

    def log_probs(
        params: Params,
        rows: dict[str, Array],
        num_responses: int,
        log_z: Array | None = None,
        value_head: dict[str, Array] | None = None,
        reward_head: dict[str, Array] | None = None,
    ) -> LogProbs:
        read = {name: placement.constrain(shards.striped(rows[name]), ("rows", "tokens")) for name in models.ROW_IDS}
        if config.mesh.reduce_dtype == "float32":
            params = policy.with_wide_gradients(params)
        outputs = policy.outputs(params, read, how)
        hidden, head, routing = outputs.hidden, outputs.head, outputs.routing
        ids = (rows["tokens"], rows["previous"], rows["response_ids"])
        if log_z is not None:
            log_z = partition.log_partition(
                hidden, placement.gather(log_z, ("embed",)), *ids[1:], num_responses, shards
            )
        if reward_head is not None:
            kernel = placement.gather(reward_head["kernel"], ("embed",))
            rewards = reward.response_rewards(hidden, kernel, *ids, num_responses, pad_id, shards)
            return LogProbs(*rewards, routing=routing)
        if not tokens:
            sums = response_log_probs(hidden, head, *ids, num_responses, collides=collisions, **chunks)
            return LogProbs(*sums[:2], log_z, collision=sums[2], routing=routing)
        by_token = token_log_probs(hidden, head, *ids, **chunks)
        values = None
        if value_head is not None:
            whole = jax.tree.map(placement.gather, value_head, value.AXES[value.NAME])
            values = value.token_values(hidden, whole, *ids[1:], shards)
        sums = by_response(by_token, ids[2], num_responses)
        return LogProbs(*sums, log_z, TokenScores(by_token, values), routing=routing)

    return log_probs
