"""The law of packing: a response's log-prob does not depend on what it is packed with, or whose prompt it shares."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax import models
from rpo_jax.config import BatchConfig, Config, MeshConfig, PolicyConfig
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.hosts import sharding
from rpo_jax.training.prepare import reference_pass
from rpo_jax.training.reference import compute_log_probs
from rpo_jax.training.step import build_log_probs, put_batch
from tests.data.ragged import RESPONSES, ids_of
from tests.worlds import random_data, small_model, with_more_responses

MODEL = small_model()
PAIRS = 8


@pytest.fixture(scope="module")
def params():
    return models.init_params(MODEL, jax.random.key(0))


def packed_log_probs(params, batches, step, attention="auto"):
    """(row id, response name) -> log-prob, for the responses of one packed batch."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    batch = batches.batch_at(step)
    with jax.set_mesh(mesh):
        log_probs, _ = build_log_probs(Config(model=PolicyConfig(attention=attention)), MODEL, mesh)
        values = np.asarray(log_probs(params, put_batch(mesh, batch)).log_prob)
    found = []
    for name, slots in batch.slots().items():
        side = batch.sides[name]
        for slot in np.flatnonzero(side.valid):
            found.append((batches.data.examples[side.example_index[slot]], name, values[slots.start + slot]))
    return found, batch


def padded_log_prob(params, prompt_ids, response_ids):
    """The usual layout: one row, the prompt and one response, padded at the end; plain logits and log-softmax."""
    tokens = np.zeros((1, 64), np.int32)
    length = len(prompt_ids) + len(response_ids)
    tokens[0, :length] = np.concatenate([prompt_ids, response_ids])
    logits = models.apply(MODEL, params, tokens)
    log_softmax = jax.nn.log_softmax(logits[0].astype(jnp.float32))
    targets = np.arange(len(prompt_ids), length)
    return float(log_softmax[targets - 1, tokens[0, targets]].sum())


def data_with_shared_prompts(examples_a_prompt):
    data = random_data(24, mismatched=True)
    first = [data.examples[i - i % examples_a_prompt] for i in range(24)]
    examples = [
        dataclasses.replace(e, prompts=f.prompts, prompt_id=f.prompt_id)
        for e, f in zip(data.examples, first, strict=True)
    ]
    return dataclasses.replace(data, examples=examples)


@pytest.mark.parametrize("examples_a_prompt", [1, 4, 24], ids=["its own prompt", "four to a prompt", "one prompt"])
@pytest.mark.parametrize("responses", [("chosen", "rejected"), RESPONSES])
@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_packed_equals_padded(params, pairing, responses, examples_a_prompt):
    batches = PreferenceBatches(
        data_with_shared_prompts(examples_a_prompt), pairs=PAIRS, pairing=pairing, responses=responses, seed=0
    )
    found, batch = packed_log_probs(params, batches, 0)
    assert len(found) == PAIRS * len(responses)
    for example, name, log_prob in found:
        response_ids = ids_of(example, name)
        expected = padded_log_prob(params, example.prompt_ids, response_ids)
        assert log_prob == pytest.approx(expected, rel=0, abs=1e-5 * len(response_ids)), (example.row_id, name)
    if examples_a_prompt == 24:
        assert batch.branch_ids.max() > 3, "more responses share a prompt than one example has"


@pytest.mark.parametrize("row_tokens", [None, 32], ids=["a row for each group", "groups longer than a row"])
def test_any_number_of_responses_to_a_prompt_equal_rows_of_their_own(params, row_tokens):
    data = with_more_responses(random_data(8))
    data = dataclasses.replace(data, reference_log_probs=np.arange(data.num_responses, dtype=np.float32))
    batches = PreferenceBatches(data, pairs=4, pairing="grouped", seed=0, row_tokens=row_tokens)
    mesh, seen = sharding.make_mesh(MeshConfig(), jax.devices()[:1]), set()
    with jax.set_mesh(mesh):
        log_probs, _ = build_log_probs(Config(), MODEL, mesh)
        for step in range(batches.steps_per_epoch):
            batch = batches.batch_at(step)
            values = np.asarray(log_probs(params, put_batch(mesh, batch)).log_prob)
            for name, slots in batch.slots().items():
                side = batch.sides[name]
                for slot in np.flatnonzero(side.valid):
                    number = int(side.reference_log_prob[slot])  # as made above
                    seen.add(number)
                    response = data.response(number)
                    expected = padded_log_prob(params, data.example_of(number).prompt_ids, response.ids)
                    assert values[slots.start + slot] == pytest.approx(expected, rel=0, abs=1e-5 * len(response.ids))
    assert seen == set(range(data.num_responses))


def test_attention_by_blocks_over_long_rows_equals_padded(params):
    batches = PreferenceBatches(data_with_shared_prompts(4), pairs=PAIRS, responses=RESPONSES, seed=0, row_tokens=320)
    for example, name, log_prob in packed_log_probs(params, batches, 0, "blockwise")[0]:
        response_ids = ids_of(example, name)
        expected = padded_log_prob(params, example.prompt_ids, response_ids)
        assert log_prob == pytest.approx(expected, rel=0, abs=1e-5 * len(response_ids)), (example.row_id, name)


@pytest.mark.parametrize("examples_a_prompt", [1, 4], ids=["its own prompt", "four to a prompt"])
@pytest.mark.parametrize("micro_rows", [None, 2])
def test_the_reference_s_sweep_equals_padded(params, micro_rows, examples_a_prompt):
    data = data_with_shared_prompts(examples_a_prompt)
    config = Config(batch=BatchConfig(pairs=PAIRS, micro_rows=micro_rows, row_tokens=64))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    sweep = reference_pass(config, data, RESPONSES, row_shards=1)
    assert len(sweep) > 1
    assert sweep.shape.rows % (micro_rows or 1) == 0
    with jax.set_mesh(mesh):
        log_probs, _ = build_log_probs(config, MODEL, mesh)
        found = compute_log_probs(sweep, lambda batch: log_probs(params, put_batch(mesh, batch)), lambda *_: None)
    for number, (value, response) in enumerate(zip(found, map(data.response, range(data.num_responses)), strict=True)):
        expected = padded_log_prob(params, data.example_of(number).prompt_ids, response.ids)
        assert value == pytest.approx(expected, rel=0, abs=1e-5 * len(response.ids)), (number, response.kind)
