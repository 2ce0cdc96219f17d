"""The decoder's laws: what a token may see, what recomputation and dtype may change, and the parameter tree."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax import models
from rpo_jax.models import recompute

VOCAB = 61


def _config(family: str = "mistral", **changes: Any) -> models.ModelConfig:
    config = models.new_config(
        family=family,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        tie_embeddings=False,
        rope_theta=10_000.0,
        max_position_embeddings=64,
    )
    # One layer of each kind, and weights large enough to make attention far from uniform.
    return dataclasses.replace(config, **({"sliding_windows": (None, 4), "initializer_range": 0.3} | changes))


@functools.cache
def _params(config: models.ModelConfig) -> Any:
    """Weights of init_params' kind; NumPy draws them without compiling anything."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = config.initializer_range * rng.normal(size=leaf.shape)
        return jnp.array(1 + noise if path[-1].key == "scale" else noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, models.abstract_params(config))


@functools.partial(jax.jit, static_argnames=("config", "compute_dtype", "remat"))
def _states(config, params, batch, compute_dtype="float32", remat="none"):
    return models.hidden_states(config, params, **batch, compute_dtype=compute_dtype, remat=remat)


PROMPT, RESPONSES, OTHER = [5, 9, 2, 33, 17], ([7, 8, 1], [40, 3, 22, 6]), [11, 12, 13, 14, 15, 16]


def _packed() -> dict[str, jax.Array]:
    """One row: a segment of a prompt with two responses, a second segment, and padding."""
    parts = [  # tokens, first position, segment, branch
        (PROMPT, 0, 1, 0),
        (RESPONSES[0], len(PROMPT), 1, 1),
        (RESPONSES[1], len(PROMPT), 1, 2),
        (OTHER, 0, 2, 0),
        ([0, 0, 0], 0, 0, 0),
    ]
    columns = [
        (token, first + offset if segment else 0, segment, branch)
        for tokens, first, segment, branch in parts
        for offset, token in enumerate(tokens)
    ]
    names = ("tokens", "positions", "segment_ids", "branch_ids")
    return {name: jnp.array([values]) for name, values in zip(names, zip(*columns, strict=True), strict=True)}


def _slices() -> dict[str, slice]:
    bounds = np.cumsum([0, len(PROMPT), len(RESPONSES[0]), len(RESPONSES[1]), len(OTHER), 3])
    names = ("prompt", "first", "second", "other", "padding")
    return {name: slice(int(a), int(b)) for name, a, b in zip(names, bounds[:-1], bounds[1:], strict=True)}


def test_packed_and_branched_rows_equal_separate_rows():
    config = _config()
    packed = models.apply(config, _params(config), **_packed())[0]
    where = _slices()
    rows = [PROMPT + RESPONSES[0], PROMPT + RESPONSES[1], OTHER]
    width = max(map(len, rows))
    alone = models.apply(config, _params(config), jnp.array([row + [0] * (width - len(row)) for row in rows]))
    for row, name in enumerate(("first", "second")):
        np.testing.assert_allclose(packed[where["prompt"]], alone[row, : len(PROMPT)], atol=1e-5)
        np.testing.assert_allclose(packed[where[name]], alone[row, len(PROMPT) : len(rows[row])], atol=1e-5)
    np.testing.assert_allclose(packed[where["other"]], alone[2, : len(OTHER)], atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "unchanged"),
    [
        ("first", ["prompt", "second", "other", "padding"]),
        ("second", ["prompt", "first", "other", "padding"]),
        ("other", ["prompt", "first", "second", "padding"]),
        ("padding", ["prompt", "first", "second", "other"]),
        ("prompt", ["other", "padding"]),
    ],
)
def test_other_segments_and_branches_do_not_show(changed, unchanged):
    config, batch, where = _config(), _packed(), _slices()
    before = models.apply(config, _params(config), **batch)[0]
    batch["tokens"] = batch["tokens"].at[0, where[changed]].add(20)
    after = models.apply(config, _params(config), **batch)[0]
    for name in unchanged:
        np.testing.assert_array_equal(before[where[name]], after[where[name]])
    assert np.abs(before[where[changed]] - after[where[changed]]).max() > 0.1


def test_gradient_reaches_only_what_a_token_sees():
    config, batch, where = _config(sliding_windows=(None, None)), _packed(), _slices()
    width = batch["tokens"].shape[1]
    # Every position gets an embedding row of its own, so that the gradient tells positions apart.
    batch["tokens"] = jnp.arange(width)[None]

    def readout(embedding):
        states = _states(config, _params(config) | {"embed": embedding}, batch)
        return jnp.sum(states[0, where["second"]] ** 3)  # not squares: their sum is what the last norm fixes

    size = np.abs(jax.jit(jax.grad(readout))(_params(config)["embed"])[:width]).max(axis=1)
    seen = np.zeros(width, bool)
    seen[where["prompt"]] = seen[where["second"]] = True
    assert (size[~seen] == 0).all()
    assert (size[seen] > 1e-4).all()


def test_sliding_window_counts_positions_and_not_indices():
    # Branch 2 starts where the prompt ended: the window must not be eaten by branch 1, which lies between.
    config = _config(sliding_windows=(2, 2))
    batch, where = _packed(), _slices()
    before = models.apply(config, _params(config), **batch)[0, where["second"]]
    batch["tokens"] = batch["tokens"].at[0, len(PROMPT) - 1].add(20)
    after = models.apply(config, _params(config), **batch)[0, where["second"]]
    moved = np.abs(before - after).max(axis=1)
    # Two layers with a window of 2 carry a change exactly two positions on.
    assert (moved[:2] > 1e-3).all()
    assert (moved[2:] == 0).all()


def test_a_batch_of_padding_is_finite_in_value_and_gradient():
    config = _config()
    batch = {name: jnp.zeros_like(values) for name, values in _packed().items()}
    value, gradient = jax.jit(jax.value_and_grad(lambda params: _states(config, params, batch).sum()))(_params(config))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_defaults_are_one_segment_counted_from_zero():
    config = _config()
    tokens = jnp.array([OTHER, OTHER[::-1]])
    given = models.apply(
        config,
        _params(config),
        tokens,
        jnp.broadcast_to(jnp.arange(6), (2, 6)),
        jnp.ones((2, 6), jnp.int32),
        jnp.zeros((2, 6), jnp.int32),
    )
    np.testing.assert_array_equal(models.apply(config, _params(config), tokens), given)


@functools.cache
def _gradient(remat: str) -> Any:
    config = _config()
    return jax.jit(jax.grad(lambda params: jnp.sum(_states(config, params, _packed(), remat=remat) ** 3)))(
        _params(config)
    )


@pytest.mark.parametrize("remat", ["dots", "attention", "full"])
def test_recomputation_does_not_change_the_gradient(remat, monkeypatch):
    monkeypatch.setattr(recompute, "MLP_TOKENS", 4)
    for kept, recomputed in zip(jax.tree.leaves(_gradient("none")), jax.tree.leaves(_gradient(remat)), strict=True):
        np.testing.assert_allclose(recomputed, kept, atol=1e-5 * np.abs(kept).max())


def test_recomputation_keeps_fewer_residuals():
    config = _config()

    def residual_floats(remat):
        def pullback(params):
            return jax.vjp(lambda p: models.hidden_states(config, p, **_packed(), remat=remat), params)[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pullback, _params(config))))

    assert residual_floats("full") < residual_floats("attention") < residual_floats("dots") < residual_floats("none")


def test_unknown_remat_names_the_known_ones():
    config = _config()
    with pytest.raises(ValueError, match="remat='some' is not known; use one of none, dots, attention, full"):
        models.hidden_states(config, _params(config), jnp.zeros((1, 2), jnp.int32), remat="some")


def test_bfloat16_compute_is_near_float32_and_gradients_stay_float32():
    config, batch = _config(initializer_range=0.1), _packed()

    def total(params):
        states = _states(config, params, batch, compute_dtype="bfloat16")
        return states.sum(dtype=jnp.float32), states

    gradient, narrow = jax.jit(jax.grad(total, has_aux=True))(_params(config))
    wide = _states(config, _params(config), batch)
    assert (narrow.dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
    error = np.abs(narrow.astype(jnp.float32) - wide)
    assert 0 < error.max() < 0.1
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_logits_are_float32_under_bfloat16_compute():
    config = _config()
    logits = jax.eval_shape(lambda p: models.apply(config, p, **_packed(), compute_dtype="bfloat16"), _params(config))
    assert logits.dtype == jnp.float32


def test_constrain_sees_every_kind_of_activation_under_its_axes():
    config = _config()
    seen = set()

    def constrain(x, axes):
        if axes == ("vocab", "embed"):
            assert x.shape == (VOCAB, 32)
            return x
        seen.add(axes)
        assert x.ndim == len(axes)
        sizes = {"rows": 1, "tokens": 6, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}
        assert x.shape == tuple((sizes | {"vocab": VOCAB})[axis] for axis in axes)
        return x

    jax.eval_shape(lambda p: models.apply(config, p, jnp.array([OTHER]), constrain=constrain), _params(config))
    assert {axes[2] for axes in seen} == {"embed", "heads", "kv_heads", "mlp", "vocab"}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_axes_and_count_describe_the_parameters(family):
    config = _config(family, tie_embeddings=family == "qwen3")
    params = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
    axes = models.param_axes(config)
    sizes = {"layers": 2, "vocab": VOCAB, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}
    sizes |= {"fused_heads": 8, "gate_up": 2}
    if config.parts.experts is not None:
        sizes |= {"experts": config.parts.experts.count, "mlp": config.parts.experts.intermediate_size}
        sizes["routed"] = config.parts.experts.count
    expected = jax.tree.map(lambda names: tuple(sizes[n] for n in names), axes, is_leaf=lambda x: isinstance(x, tuple))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == expected
    assert models.count_params(config) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert jax.tree.structure(models.abstract_params(config)) == jax.tree.structure(params)


def test_output_head_is_the_transposed_embedding_where_tied():
    tied, untied = _config(tie_embeddings=True), _config()
    np.testing.assert_array_equal(models.output_head(tied, _params(tied)), _params(tied)["embed"].T)
    assert "head" not in _params(tied)
    assert models.output_head(untied, _params(untied)) is _params(untied)["head"]


def test_new_weights_have_their_scale_and_differ_between_layers_and_keys():
    config = _config("qwen2", initializer_range=0.02)
    init = jax.jit(models.init_params, static_argnums=0)
    params, other = init(config, jax.random.key(0)), init(config, jax.random.key(1))
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert float(jnp.std(kernel)) == pytest.approx(0.02, rel=0.05)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01
    assert np.abs(kernel - params["layers"]["mlp"]["gate"]["kernel"]).max() > 0.01
    assert (params["layers"]["attention"]["query"]["bias"] == 0).all()
    assert (params["final_norm"]["scale"] == 1).all()
    assert np.abs(other["embed"] - params["embed"]).max() > 0.01
    assert jax.tree.structure(params) == jax.tree.structure(models.abstract_params(config))
