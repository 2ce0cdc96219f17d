from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict

from rpo_jax import models
from rpo_jax.config import LoraConfig, OptimConfig
from rpo_jax.objectives import heads
from rpo_jax.training.optimizer import learning_rate_schedule, learning_rates, make_optimizer
from tests.worlds import small_model

STEPS = 20


def _trajectories(config: OptimConfig, torch_optimizer, scale: float = 1.0):
    """The same 20 random gradients through ours and through torch's optimizer, constant learning rate."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(7, 5)).astype(np.float32)
    gradients = (scale * rng.normal(size=(STEPS, 7, 5))).astype(np.float32)

    weight = torch.nn.Parameter(torch.tensor(start))
    theirs = torch_optimizer([weight])
    optimizer = make_optimizer(config, learning_rate_schedule(config, STEPS), decayed=True)
    params = jnp.asarray(start)
    state = optimizer.init(params)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        theirs.step()
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        yield np.asarray(params), weight.detach().numpy()


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_rmsprop_is_torchs(scale):
    # The small gradients tell eps outside the square root from eps inside it.
    config = OptimConfig(name="rmsprop", learning_rate=1e-2, warmup_steps=0, max_grad_norm=1e9)
    for ours, theirs in _trajectories(config, lambda p: torch.optim.RMSprop(p, lr=1e-2), scale):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_adamw_is_torchs():
    config = OptimConfig(
        name="adamw", learning_rate=1e-2, warmup_steps=0, max_grad_norm=1e9, weight_decay=0.1, b1=0.9, b2=0.95
    )
    theirs = lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)  # noqa: E731
    for ours, expected in _trajectories(config, theirs):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


def test_lion_moves_by_the_sign():
    config = OptimConfig(name="lion", learning_rate=0.5, warmup_steps=0, max_grad_norm=1e9)
    optimizer = make_optimizer(config, learning_rate_schedule(config, STEPS), decayed=True)
    params = jnp.array([1.0, 1.0])
    updates, _ = optimizer.update(jnp.array([3.0, -1e-3]), optimizer.init(params), params)
    np.testing.assert_allclose(updates, [-0.5, 0.5])


def test_clipping_uses_the_global_norm():
    config = OptimConfig(name="lion", learning_rate=1.0, warmup_steps=0, max_grad_norm=1.0)
    optimizer = make_optimizer(config, learning_rate_schedule(config, STEPS), decayed=True)
    gradients = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clip_state = optimizer.init(gradients)
    _, state = optimizer.update(gradients, clip_state, gradients)
    momentum = next(s for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu")).mu
    # Lion's first moment after one step is (1 - b2) times the clipped gradient.
    np.testing.assert_allclose(momentum["a"] / (1 - config.b2), 0.6, rtol=1e-5)
    np.testing.assert_allclose(momentum["b"] / (1 - config.b2), 0.8, rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "half", "end"),
    [
        ("constant", 1.0, 1.0),
        ("linear", 0.5, 0.0),
        ("cosine", 0.5, 0.0),
        ("wsd", 1.0, 0.0),
        ("inverse_sqrt", (3 / 53) ** 0.5, (3 / 103) ** 0.5),
    ],
)
def test_schedule(schedule, half, end):
    config = OptimConfig(learning_rate=2.0, warmup_steps=3, schedule=schedule)
    rate = learning_rate_schedule(config, total_steps=103)
    np.testing.assert_allclose([rate(0), rate(1), rate(2), rate(3)], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rate(53), 2.0 * half, atol=1e-6)
    np.testing.assert_allclose(rate(103), 2.0 * end, atol=1e-6)


def test_wsd_decays_in_its_share_of_the_steps():
    config = OptimConfig(learning_rate=2.0, warmup_steps=0, schedule="wsd", decay_share=0.4)
    rates = learning_rates(config, 100)
    np.testing.assert_allclose(rates[:61], 2.0)
    np.testing.assert_allclose(rates[80], 1.0)
    assert (np.diff(rates[60:]) < 0).all()
    np.testing.assert_allclose(
        [learning_rate_schedule(config, 100)(step) for step in (60, 80, 99)], rates[[60, 80, 99]]
    )


def test_adafactor_is_the_papers():
    """Algorithm 4 of arXiv 1804.04235 without scaling by the parameters, on a matrix that is large enough to factor."""
    config = OptimConfig(name="adafactor", learning_rate=0.1, warmup_steps=0, max_grad_norm=1e9)
    rng = np.random.default_rng(0)
    optimizer = make_optimizer(config, learning_rate_schedule(config, STEPS), decayed=True)
    params = jnp.asarray(rng.normal(size=(128, 130)), jnp.float32)
    state, rows, columns = optimizer.init(params), np.zeros(128), np.zeros(130)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 300, "moments of rows and columns alone"
    for step in range(1, 6):
        gradient = rng.normal(size=params.shape) * 10.0**step
        decay = 1 - step**-0.8
        rows = decay * rows + (1 - decay) * np.mean(gradient**2 + 1e-30, axis=1)
        columns = decay * columns + (1 - decay) * np.mean(gradient**2 + 1e-30, axis=0)
        direction = gradient / np.sqrt(np.outer(rows, columns) / rows.mean())
        direction /= max(1.0, np.sqrt(np.mean(direction**2)))
        updates, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, params)
        np.testing.assert_allclose(updates, -0.1 * direction, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen2", "lora"])
def test_muon_orthogonalises_every_matrix_of_the_layers_and_nothing_else(name):
    policy = TRAINED[name]
    config = OptimConfig(name="muon", learning_rate=0.5, warmup_steps=0, max_grad_norm=1e9)
    axes, rng = policy.trained.axes, np.random.default_rng(0)
    optimizer = make_optimizer(config, learning_rate_schedule(config, STEPS), policy.decayed, axes)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), policy.trained.shapes)
    gradient = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    updates = flatten_dict(jax.jit(optimizer.update)(gradient, optimizer.init(params), params)[0])
    adam = flatten_dict(jax.tree.map(lambda g: -0.5 * np.sign(g), gradient))  # its first step
    matrices = 0
    for path, of in flatten_dict(axes).items():
        update = np.asarray(updates[path])
        if path[-1] not in ("kernel", "lora_a", "lora_b"):
            np.testing.assert_allclose(update, adam[path], rtol=1e-3, err_msg="/".join(path))
            continue
        # Inputs and outputs: what comes before and after the one axis that is no head's.
        alone = next(axis for axis in range(1, update.ndim) if of[axis] not in ("heads", "kv_heads", "head_dim"))
        inputs = update.shape[alone] if alone == 1 else int(np.prod(update.shape[1:alone]))
        matrix = update.reshape(len(update), inputs, -1)
        values = np.linalg.svd(matrix, compute_uv=False) / (0.5 * 0.2 * max(matrix.shape[1:]) ** 0.5)
        assert 0.5 < values.min() <= values.max() < 1.5, path
        matrices += 1
    assert matrices == (14 if name == "lora" else 7)


MODELS = {
    "llama": replace(small_model(), qkv_bias=True, output_bias=True, mlp_bias=True),
    "qwen2": small_model(family="qwen2", tie_embeddings=True),
    "qwen3": small_model(family="qwen3"),
}
TRAINED = {
    **{name: models.Policy(config) for name, config in MODELS.items()},
    "lora": models.Policy(MODELS["llama"], LoraConfig(rank=2)),
}


def decayed_for_ten_steps(policy: models.Policy, heads_too: dict):
    """Every parameter, which begins as ones, after ten steps without a gradient."""
    config = OptimConfig(name="adamw", learning_rate=0.1, warmup_steps=0, weight_decay=0.1)
    decayed = {**policy.decayed, **heads.decayed(tuple(heads_too))}
    optimizer = make_optimizer(config, learning_rate_schedule(config, 10), decayed)
    params = {**jax.tree.map(lambda leaf: jnp.ones(leaf.shape), policy.trained.shapes), **heads_too}
    state, nothing = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    # The same state as with no weight decay's mask: checkpoints of earlier runs are restored into it.
    assert jax.tree.structure(state[2]) == jax.tree.structure(optax.add_decayed_weights(0.1).init(params))
    for _ in range(10):
        updates, state = optimizer.update(nothing, state, params)
        params = optax.apply_updates(params, updates)
    return flatten_dict(params)


@pytest.mark.parametrize("name", TRAINED)
def test_weight_decay_leaves_norms_and_biases_alone(name):
    """As transformers' Trainer does, whose AdamW decays what is a matrix, embeddings and LoRA's factors included."""
    value_head = jax.tree.map(jnp.ones_like, heads.init(("value",), 32))
    found = decayed_for_ten_steps(TRAINED[name], value_head)
    for path, values in found.items():
        expected = 1.0 if path[-1] in ("scale", "bias") else (1 - 0.1 * 0.1) ** 10
        np.testing.assert_allclose(values, expected, rtol=1e-6, err_msg="/".join(path))
    kinds = {path[-1] for path in found}
    assert kinds >= ({"lora_a", "lora_b"} if name == "lora" else {"scale", "kernel", "bias", "embed"})
