"""Mixtures of experts: balance against transformers, experts shared by devices, files in MXFP4, and refusals."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from rpo_jax import models
from rpo_jax.config import Config, LoraConfig, MeshConfig, PolicyConfig
from rpo_jax.hosts import sharding
from rpo_jax.models import recompute
from rpo_jax.models.huggingface.mxfp4 import GROUP
from rpo_jax.objectives.load_balance import expert_metrics, load_balancing_loss
from rpo_jax.sampling import kv_cache
from rpo_jax.training.step import build_steps, check_policy, put_batch
from tests.test_step import batches_for, configured
from tests.worlds import quantized, small_model

from .conftest import SIZES, torch_model

BALANCE = 0.5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_load_balancing_loss_and_its_gradient_are_those_of_transformers(name, hf_folder):
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (3, 20))
    real = np.arange(20) < np.array([[20], [13], [6]])
    torch_one = torch_model(name)
    mask = torch.tensor(real)
    expected = torch_one(torch.tensor(tokens), attention_mask=mask, output_router_logits=True).aux_loss
    expected.backward()
    routers = [
        value.grad for key, value in torch_one.named_parameters() if key.endswith(("gate.weight", "router.weight"))
    ]
    torch_one.zero_grad()

    model_config, params = models.load_pretrained(hf_folder(name))
    rows = {"tokens": tokens, "positions": np.broadcast_to(np.arange(20), tokens.shape), "segment_ids": real * 1}
    rows = {key: jnp.array(value) for key, value in {**rows, "branch_ids": 0 * tokens}.items()}

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def balance(params):
        routing = models.Policy(model_config).outputs(params, rows, models.Execution()).routing
        return load_balancing_loss(*routing), routing

    (found, routing), gradient = balance(params)
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5)
    of_routers = np.stack([router.numpy().T for router in routers])
    assert np.abs(of_routers).max() > 1e-4
    np.testing.assert_allclose(gradient["layers"]["mlp"]["router"], of_routers, atol=1e-5 * np.abs(of_routers).max())
    experts = model_config.parts.experts
    np.testing.assert_array_equal(routing.tokens, [real.sum()] * 3)
    np.testing.assert_array_equal(routing.chosen.sum(-1), [real.sum() * experts.per_token] * 3)


def test_what_is_told_of_the_use_of_experts():
    even, one = jnp.full((2, 4), 6.0), jnp.array([[12.0, 0, 0, 0], [0, 12.0, 0, 0]])
    tokens = jnp.array([12.0, 12.0])
    told = {name: mean.total / mean.count for name, mean in expert_metrics(even, even / 2, tokens).items()}
    np.testing.assert_allclose(told["aux_loss"], 2.0, rtol=1e-6)
    np.testing.assert_allclose(told["experts/entropy"], np.log(4), rtol=1e-6)
    assert told["experts/largest_share"] == told["experts/smallest_share"] == 0.25
    told = {name: mean.total / mean.count for name, mean in expert_metrics(one, one, tokens).items()}
    assert (told["experts/largest_share"], told["experts/smallest_share"], told["experts/entropy"]) == (1, 0, 0)
    assert told["aux_loss"] == 2.0, "over both layers together, as transformers counts"


def gradient_of(model_config, mesh, **changes):
    config = configured(objective="dpo", **changes)
    config = replace(config, model=replace(config.model, router_aux_loss_coef=BALANCE))
    batch = batches_for(config, rows_multiple=16).batch_at(0)
    with jax.set_mesh(mesh):
        built = build_steps(config, model_config, mesh, total_steps=1)
        init = jax.jit(models.init_params, static_argnums=0, out_shardings=built.state_shardings.params)
        found = jax.jit(built.gradient)(init(model_config, jax.random.key(0)), put_batch(mesh, batch), None)
        return jax.tree.map(np.asarray, (found.loss, dict(found.means), found.gradient))


MORE = [pytest.param(family, marks=pytest.mark.slow) for family in ("mixtral", "qwen3_moe", "olmoe")]


@pytest.mark.parametrize("family", ["gpt_oss", *MORE])
def test_experts_shared_by_devices_and_micro_batches_give_the_gradient_of_one(family, monkeypatch):
    """Whole on one device; on eight, four of which share the experts, in micro-batches and the MLP in chunks."""
    model_config = replace(small_model(family=family), initializer_range=0.1)
    whole = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    loss, means, expected = gradient_of(model_config, whole)
    monkeypatch.setattr(recompute, "MLP_TOKENS", 32)
    shared = sharding.make_mesh(MeshConfig(data=1, fsdp=1, expert=4, tensor=2))
    got, told, gradient = gradient_of(model_config, shared, micro_rows=8, remat="full")
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    assert {"aux_loss", "experts/largest_share", "experts/smallest_share", "experts/entropy"} < told.keys()
    for name in ("aux_loss", "experts/largest_share", "experts/entropy"):
        np.testing.assert_allclose(
            told[name].total / told[name].count, means[name].total / means[name].count, rtol=1e-5
        )
    for (path, got), want in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(expected), strict=True):
        scale = np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))
    # The balance is in it: its gradient by the router is not small beside the objective's.
    assert loss > np.log(2) + 0.9 * BALANCE * 2


@pytest.mark.slow
@pytest.mark.parametrize("base_dtype", ["float32", "nf4"])
def test_adapters_and_experts_in_few_bits_are_shared_too(base_dtype):
    """Hidden states and the adapters' gradient on a mesh, where columns in 4 bits are not divided, as on one device."""
    model_config = replace(small_model(family="gpt_oss", hidden_size=64, intermediate_size=64), initializer_range=0.1)
    lora = LoraConfig(rank=2, targets=("gate_up_proj", "down_proj"), base_dtype=base_dtype)
    policy, rng = models.Policy(model_config, lora), np.random.default_rng(0)
    params = jax.tree.map(np.asarray, models.init_params(model_config, jax.random.key(0)))
    base = params if base_dtype == "float32" else quantized(model_config, params, base_dtype)
    adapters = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), policy.trained.shapes)
    tokens = rng.integers(0, 96, (4, 8))
    rows = {"tokens": tokens, "positions": tokens * 0 + np.arange(8), "segment_ids": tokens * 0 + 1}
    rows = {key: jnp.array(value) for key, value in {**rows, "branch_ids": tokens * 0}.items()}

    def found(mesh):
        at = sharding.Placement(mesh)
        how = models.Execution(split=models.Split(at.shards, at.per_shard, at.gather, at.mesh_axes))
        place = partial(sharding.parameter_shardings, mesh)
        weights, trained = (
            jax.tree.map(jax.device_put, tree, place(*of))
            for tree, of in ((base, policy.weights), (adapters, policy.trained))
        )

        @jax.jit
        @jax.value_and_grad
        def total(trained, weights, rows):
            hidden = policy.outputs(policy.combine(trained, weights), rows, how).hidden
            return jnp.sum(jnp.square(jnp.tanh(hidden)))  # all of one sign: nothing cancels

        with jax.set_mesh(mesh):
            return total(trained, weights, rows)

    one, gradient = found(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    many, shared = found(sharding.make_mesh(MeshConfig(data=1, expert=4, tensor=2)))
    np.testing.assert_allclose(many, one, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(shared), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_the_sampler_reads_experts_with_adapters():
    """On a CPU, where matrices of other layers are transposed for it."""
    model_config, rng = small_model(family="mixtral"), np.random.default_rng(0)
    policy = models.Policy(model_config, LoraConfig(rank=2, targets=("q_proj", "w1", "w2", "w3")))
    adapters = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), policy.trained.shapes)
    params = policy.combine(adapters, models.init_params(model_config, jax.random.key(0)))
    tokens = rng.integers(0, 96, (2, 8)).astype(np.int32)
    prompts = np.pad(tokens, ((0, 0), (kv_cache.SLICE - 8, 0)))
    readable = kv_cache.to_decode_layout(params, "float32", "cpu")
    hidden, _ = kv_cache.prefill(model_config, readable, prompts, jnp.full(2, kv_cache.SLICE - 8))
    got = kv_cache.next_token_logits(model_config, readable, hidden)
    np.testing.assert_allclose(got, models.apply(model_config, params, tokens)[:, -1], atol=1e-5)


def test_a_device_holds_its_own_experts_alone():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    model_config = small_model(family="mixtral")
    places = sharding.parameter_shardings(mesh, *models.Policy(model_config).weights)
    mlp, attention = places["layers"]["mlp"], places["layers"]["attention"]
    assert tuple(mlp["gate"].spec) == (None, "expert", "fsdp", "tensor")
    assert tuple(mlp["down"].spec) == (None, "expert", "tensor", "fsdp")
    assert tuple(attention["query"]["kernel"].spec)[:3] == (None, ("fsdp", "expert"), "tensor")
    assert sharding.row_shards(mesh) == 4


def test_what_does_not_go_with_experts_is_refused_by_name():
    mesh = sharding.make_mesh(MeshConfig(data=1, expert=8))
    olmoe = small_model(family="olmoe")
    parts = replace(olmoe.parts, experts=replace(olmoe.parts.experts, count=60))
    with pytest.raises(
        ValueError, match=r"mesh.expert=8 does not divide the 60 experts of the olmoe model; use one of 1"
    ):
        check_policy(0.0, replace(olmoe, variant=parts), mesh)
    with pytest.raises(ValueError, match=r"mesh.expert=8 shares the experts of a layer, and the llama model has none"):
        build_steps(Config(), small_model(), mesh, total_steps=1)
    one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0.1 weighs .* and the llama model has no experts"):
        check_policy(0.1, small_model(), one)
    with pytest.raises(ValueError, match=r"model.router_aux_loss_coef=-1.0 must be a number of at least 0"):
        PolicyConfig(router_aux_loss_coef=-1.0)


@pytest.fixture(scope="module")
def packed_folder(hf_folder, tmp_path_factory):
    """gpt-oss with experts in MXFP4, and what transformers makes of these: torch tensors by their names."""
    folder, rng = tmp_path_factory.mktemp("mxfp4"), np.random.default_rng(0)
    source = hf_folder("gpt_oss")
    tensors, unpacked = load_file(source / "model.safetensors"), {}
    for name in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        groups = (experts, outputs, inputs // GROUP)
        tensors[f"{name}_blocks"] = rng.integers(0, 256, (*groups, GROUP // 2), np.uint8)
        tensors[f"{name}_scales"] = rng.integers(122, 127, groups).astype(np.uint8)
        packed = (torch.tensor(tensors[name + suffix]) for suffix in ("_blocks", "_scales"))
        unpacked[name] = convert_moe_packed_tensors(*packed, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((source / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(values))
    return folder, unpacked


def test_experts_in_mxfp4_are_read_as_transformers_reads_them(packed_folder, tmp_path):
    folder, unpacked = packed_folder
    model_config, params = models.load_pretrained(folder)
    saved = models.save_pretrained(tmp_path / "whole", model_config, params, config=folder, dtype="float32")
    written = load_file(saved / "model.safetensors")
    for name, expected in unpacked.items():
        np.testing.assert_array_equal(written[name], expected.numpy(), err_msg=name)
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    theirs = type(torch_model("gpt_oss")).from_pretrained(saved, attn_implementation="eager").eval()
    tokens = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, 11))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(models.apply(model_config, params, jnp.array(tokens)), expected, atol=1e-4)
    # By parts, as devices that share experts, inputs and outputs read them: groups of 32 are cut.
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    placed = models.load_sharded(folder, sharding.parameter_shardings(mesh, *models.Policy(model_config).weights))
    jax.tree.map(np.testing.assert_array_equal, placed, params)


def test_a_folder_in_mxfp4_whose_halves_do_not_fit_is_refused_by_key(packed_folder, tmp_path):
    folder, _ = packed_folder
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors, key = load_file(folder / "model.safetensors"), "model.layers.1.mlp.experts.down_proj_scales"
    for change, message in (
        (tensors[key][:, :-1], r"down_proj_blocks in .* its scales \(6, 63, 3\) \(U8\); in MXFP4 these are \[experts"),
        (None, "the folder lacks model.layers.1.mlp.experts.down_proj and holds model.layers.1.mlp.experts.down_proj_"),
    ):
        changed = {**tensors, key: change} if change is not None else {k: v for k, v in tensors.items() if k != key}
        save_file({k: np.ascontiguousarray(v) for k, v in changed.items()}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            models.check_pretrained(tmp_path)
