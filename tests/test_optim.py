import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from rpo_jax.config import OptimConfig
from rpo_jax.training.optimizer import learning_rate_schedule, make_optimizer

STEPS = 20


def _trajectories(config: OptimConfig, torch_optimizer, scale: float = 1.0):
    """The same 20 random gradients through ours and through torch's optimizer, constant learning rate."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(7, 5)).astype(np.float32)
    gradients = (scale * rng.normal(size=(STEPS, 7, 5))).astype(np.float32)

    weight = torch.nn.Parameter(torch.tensor(start))
    theirs = torch_optimizer([weight])
    optimizer = make_optimizer(config, learning_rate_schedule(config, STEPS))
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
    optimizer = make_optimizer(config, learning_rate_schedule(config, STEPS))
    params = jnp.array([1.0, 1.0])
    updates, _ = optimizer.update(jnp.array([3.0, -1e-3]), optimizer.init(params), params)
    np.testing.assert_allclose(updates, [-0.5, 0.5])


def test_clipping_uses_the_global_norm():
    config = OptimConfig(name="lion", learning_rate=1.0, warmup_steps=0, max_grad_norm=1.0)
    optimizer = make_optimizer(config, learning_rate_schedule(config, STEPS))
    gradients = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clip_state = optimizer.init(gradients)
    _, state = optimizer.update(gradients, clip_state, gradients)
    momentum = next(s for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu")).mu
    # Lion's first moment after one step is (1 - b2) times the clipped gradient.
    np.testing.assert_allclose(momentum["a"] / (1 - config.b2), 0.6, rtol=1e-5)
    np.testing.assert_allclose(momentum["b"] / (1 - config.b2), 0.8, rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "half", "end"), [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0)]
)
def test_schedule(schedule, half, end):
    config = OptimConfig(learning_rate=2.0, warmup_steps=3, schedule=schedule)
    rate = learning_rate_schedule(config, total_steps=103)
    np.testing.assert_allclose([rate(0), rate(1), rate(2), rate(3)], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rate(53), 2.0 * half, atol=1e-6)
    np.testing.assert_allclose(rate(103), 2.0 * end, atol=1e-6)
