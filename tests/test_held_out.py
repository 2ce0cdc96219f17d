"""Held-out metrics of every objective, whatever the size of the batches that they are evaluated in."""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.config import (
    BatchConfig,
    Config,
    ContrastConfig,
    DataConfig,
    ObjectiveConfig,
    ReferenceConfig,
    resolve,
)
from rpo_jax.core.records import KINDS, Batch, Side
from rpo_jax.hosts import sharding
from rpo_jax.objectives import metrics
from rpo_jax.objectives.losses import OBJECTIVES
from rpo_jax.training.micro_batches import LogProbs
from rpo_jax.training.scoring import make_loss

PAIRS, LONGEST = 10, 60  # of 1 to 60 tokens: a mean over tokens tells batches of equal size apart
# Moments or an order of the batch's are in these losses, and KTO's reference point is the batch's too.
OF_A_BATCH = {"alpha_dpo", "bco_pair", "aot", "aot_unpaired", "upo"}
OF_TOKENS = {name for name, row in OBJECTIVES.items() if row.uses_tokens}
PAIR = ContrastConfig(weights="pair")


def batch_of(kinds, first, slots):
    """The same 10 pairs from `first` on, as many as there are slots, and what a policy says of their responses."""
    rng = np.random.default_rng(0)
    pairs = np.arange(first, first + slots)
    valid, pairs = pairs < PAIRS, np.minimum(pairs, PAIRS - 1)
    sides, log_probs, lengths, collisions = {}, [], [], []
    for number, kind in enumerate(kinds):
        log_prob, reference = rng.normal(-40, 9, (2, PAIRS)).astype(np.float32)
        sides[kind] = Side(
            valid=valid,
            reference_log_prob=reference[pairs],
            embedding=np.zeros((slots, 0), np.float32),
            prompt_id=np.where(valid, pairs, -1),
            text_id=np.where(valid, pairs + PAIRS * number, -1),
            example_index=pairs,
            score=rng.normal(size=PAIRS).astype(np.float32)[pairs],
        )
        log_probs.append(log_prob[pairs])
        lengths.append(rng.integers(1, LONGEST, PAIRS)[pairs])
        collisions.append(rng.normal(-40, 3, PAIRS).astype(np.float32)[pairs])
    rows: Any = [jnp.zeros((1, 1), jnp.int32)] * 6
    batch = Batch(*rows, jax.tree.map(jnp.asarray, sides))
    log_prob, num_tokens, collision = map(jnp.concatenate, (log_probs, lengths, collisions))
    return batch, LogProbs(log_prob, num_tokens, collision=collision)


def held_out(pairs: int, contrast: ContrastConfig, **objective: Any) -> dict[str, float]:
    """All metrics of the 10 pairs in batches of so many."""
    named = OBJECTIVES[objective["name"]]
    config = Config(
        objective=ObjectiveConfig(**objective),
        contrast=contrast if named.weights is not None else ContrastConfig(),
        data=DataConfig(pairing="grouped" if named.uses_lists else "paired"),
        reference=ReferenceConfig(others=("another",) if named.mixes_references else ()),
        batch=BatchConfig(pairs=pairs),
    )
    loss = make_loss(resolve(config), config.contrast.alpha, "dense", sharding.make_mesh(config.mesh))
    kinds = [kind for kind in KINDS if kind in {*named.responses, "rejected"}]
    batches = (batch_of(kinds, first, pairs) for first in range(0, PAIRS, pairs))
    parts = [loss(batch, None, True, log_probs)[1] for batch, log_probs in batches]
    return {name: float(value) for name, value in metrics.finalize(reduce(metrics.combine, parts)).items()}


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - OF_A_BATCH - OF_TOKENS))
def test_held_out_metrics_do_not_depend_on_the_batch(name):
    row = OBJECTIVES[name]
    options = {"nll_weight": 0.5} if "nll_weight" in row.options() and not row.uses_reward_head else {}
    whole, parts = (held_out(pairs, PAIR, name=name, **options) for pairs in (PAIRS, 3))
    assert whole.keys() == parts.keys()
    assert whole["loss"] != 0
    for metric in whole.keys() - ({"loss"} if name == "kto" else set()):
        np.testing.assert_allclose(parts[metric], whole[metric], rtol=1e-5, err_msg=metric)


@pytest.mark.parametrize("weights_on", ["score", "loss"])
@pytest.mark.parametrize("key", ["diagonal_on", "weights_on"])
def test_nor_on_how_many_groups_a_batch_has(key, weights_on):
    """The last group has two pairs: it counts by its entries, or by its rows where weights are on the losses."""
    contrast = ContrastConfig(weights="diagonal", group=4, **{key: weights_on})
    whole, parts = (held_out(pairs, contrast, name="rpo")["loss"] for pairs in (12, 4))
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
