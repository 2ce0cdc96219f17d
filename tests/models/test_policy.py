"""The narrow interface: whatever is trained, the same calls give a start, a forward pass and a folder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax import models
from rpo_jax.config import LoraConfig, MeshConfig, PolicyConfig
from rpo_jax.hosts import sharding
from rpo_jax.models import Execution, Policy, check_choices
from tests.worlds import small_model

MODEL = small_model(tie_embeddings=True, hidden_size=64, intermediate_size=64)
WHOLE = Policy(MODEL)
BASES = ["float32", "bfloat16", "int8", "nf4"]
ROWS = {name: np.ones((2, 9), np.int32) for name in ("tokens", "segment_ids")}
ROWS |= {"positions": np.tile(np.arange(9, dtype=np.int32), (2, 1)), "branch_ids": np.zeros((2, 9), np.int32)}


def lora(base_dtype="float32"):
    return Policy(MODEL, LoraConfig(rank=2, base_dtype=base_dtype))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("policy") / "model"
    return models.save_pretrained(made, MODEL, WHOLE.init(jax.random.key(0)))


@pytest.mark.parametrize("policy", [WHOLE, *map(lora, BASES)], ids=["whole", *BASES])
def test_what_is_loaded_and_begun_is_as_described_and_gives_the_weights_own_outputs(policy, folder):
    place = functools.partial(sharding.parameter_shardings, sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    weights = policy.load(folder, place(*policy.weights))
    trained, frozen = policy.begin(weights, jax.random.key(1), place(*policy.trained))
    for found, described in ((weights, policy.weights), (trained, policy.trained), (frozen, policy.frozen)):
        kinds = [jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype)), x) for x in (found, described.shapes)]
        assert kinds[0] == kinds[1]
        assert jax.tree.map(lambda leaf: leaf.sharding, found) == place(*described)
    assert (frozen == {}) == (not policy.trains_adapters)
    hidden = (policy.outputs(x, ROWS, Execution()).hidden for x in (policy.combine(trained, frozen), weights))
    np.testing.assert_array_equal(*hidden)


def test_outputs_are_what_logits_are_made_of(folder):
    _, params = models.load_pretrained(folder)
    found = WHOLE.outputs(params, ROWS, Execution(remat="full"))
    logits = models.apply(MODEL, params, **ROWS)
    np.testing.assert_allclose(found.hidden @ found.head, logits, atol=1e-5)


@pytest.mark.parametrize("policy", [WHOLE, lora()], ids=["whole", "lora"])
def test_a_saved_policy_is_the_trained_one(policy, folder, tmp_path):
    _, weights = models.load_pretrained(folder)
    shapes = policy.trained.shapes
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(shapes))))
    trained = jax.tree.map(lambda leaf: 0.1 * jax.random.normal(next(keys), leaf.shape), shapes)
    _, saved = models.load_pretrained(policy.save(tmp_path / "out", trained, folder))
    params = policy.combine(trained, weights)
    expected, got = (policy.outputs(tree, ROWS, Execution()).hidden for tree in (params, saved))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(got - policy.outputs(weights, ROWS, Execution()).hidden)) > 1e-3


def test_the_summary_counts_what_is_trained():
    count = models.count_params(MODEL)
    assert WHOLE.summary == f"{count:,} parameters, llama"
    trained = sum(leaf.size for leaf in jax.tree.leaves(lora().trained.shapes))
    assert lora("int8").summary == f"{count:,} parameters frozen in int8, {trained:,} trained, llama"


def test_blocks_must_divide_what_a_matrix_reads():
    narrow = small_model(hidden_size=64, intermediate_size=96)
    with pytest.raises(ValueError, match=r"blocks of 64 inputs, and model\.layers\.0\.mlp\.down_proj has 96;"):
        Policy(narrow, LoraConfig(rank=2, base_dtype="nf4"))
    Policy(narrow, LoraConfig(rank=2, base_dtype="int8"))


def test_a_policy_is_static_under_jit():
    init = jax.jit(Policy.init, static_argnums=0)
    assert jax.tree.structure(init(lora(), jax.random.key(0))) == jax.tree.structure(lora().trained.shapes)
    assert hash(lora()) == hash(lora())


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (
            {"attention": "flash"},
            (),
            "model.attention=flash is not known; use auto or one of blockwise, cudnn, dense, fused",
        ),
        ({"family": "gpt2"}, (), "model.family=gpt2 is not supported; known families: .* llama, .* qwen3"),
        ({"family": "granite_swa"}, (), "model.family=granite_swa is not supported: it has attention sinks; known"),
        ({}, ("q_proj", "w_proj"), r"lora.targets=\['q_proj', 'w_proj'\] must be some of q_proj, k_proj, .*down_proj,"),
        ({}, ("q_proj", "q_proj"), "each at most once"),
    ],
)
def test_a_name_that_no_registry_has_is_answered_with_those_there_are(model, targets, message):
    settings = LoraConfig(rank=1, targets=targets) if targets else LoraConfig()
    with pytest.raises(ValueError, match=message):
        check_choices(PolicyConfig(**model), settings)
    if targets:
        with pytest.raises(ValueError, match=message):
            Policy(MODEL, settings)
