"""Where a batch's numbers first stop being finite: looked for once, when a run gives up.

Letters: P response slots of a batch, L layers.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from rpo_jax import models
from rpo_jax.config import Config
from rpo_jax.core.records import Batch, PreferenceData
from rpo_jax.hosts import sharding
from rpo_jax.models import ModelConfig
from rpo_jax.objectives import heads
from rpo_jax.training.hooks.guard import some
from rpo_jax.training.micro_batches import all_log_probs
from rpo_jax.training.step import Params, Steps, make_log_probs

SHOWN = 6  # of a kind


class _Finite(NamedTuple):
    loss: Bool[Array, ""]
    reference: Bool[Array, "P"]
    gradient: Params  # of every array whether it is finite, of a stacked one for every layer


class Diagnosis:
    """Finds the first numbers of a batch that are not finite, and says what they are.

    Args:
        steps: before any frozen weights are given to them.
        frozen: the policy's frozen weights; an empty tree where all are trained.
    """

    def __init__(self, config: Config, model_config: ModelConfig, mesh: Mesh, steps: Steps, frozen: Params) -> None:
        self._layers, self._frozen, whole = model_config.num_layers, frozen, sharding.replicated(mesh)
        policy = models.Policy(model_config, config.lora)
        forward, micro_rows = make_log_probs(config, model_config, mesh), config.batch.micro_rows

        def log_probs(params: Params, batch: Batch, frozen: Params, depth: Int[Array, ""]) -> Bool[Array, "P"]:
            model = policy.combine(heads.split(params)[0], frozen)
            return jnp.isfinite(all_log_probs(forward, micro_rows, _cut(model, self._layers, depth), batch).log_prob)

        def differentiate(params: Params, batch: Batch, reference: Params | None, frozen: Params) -> _Finite:
            loss, _, gradient, batch = steps.gradient(params, batch, reference, frozen)
            known, valid = (jnp.concatenate(batch.joined(name)) for name in ("reference_log_prob", "valid"))
            return _Finite(jnp.isfinite(loss), jnp.isfinite(known) | ~valid, _finite(gradient))

        self._log_probs = jax.jit(log_probs, out_shardings=whole)
        self._differentiate = jax.jit(differentiate, out_shardings=whole)
        self._finite = jax.jit(_finite, out_shardings=whole)

    def parameters(self, params: Params) -> list[str]:
        """Names of the parameters that are not finite, a layer's with its number; empty where all are."""
        return _names(jax.device_get(self._finite(params)))

    def explain(self, params: Params, reference: Params | None, batch: Batch, data: PreferenceData) -> list[str]:
        """What is not finite where this batch, which is on the devices, is trained on; a line for each finding."""
        finite: _Finite = jax.device_get(self._differentiate(params, batch, reference, self._frozen))
        index, valid = (np.concatenate(jax.device_get(batch.joined(name))) for name in ("example_index", "valid"))
        rows = [data.examples[number].row_id if used else "" for number, used in zip(index, valid, strict=True)]

        lines = []
        if names := self.parameters(params):
            lines.append(f"parameters that are not finite: {some(names, SHOWN)}")
        if names := self.parameters(self._frozen):
            lines.append(f"parameters of the base that are not finite: {some(names, SHOWN)}")
        if not finite.reference.all():
            lines.append(f"reference log-probs that are not finite: those of {_rows(rows, valid & ~finite.reference)}")
        embedded = np.concatenate([np.isfinite(x).all(axis=-1) for x in jax.device_get(batch.joined("embedding"))])
        if not embedded.all():
            lines.append(f"embeddings that are not finite: those of {_rows(rows, ~embedded)}")

        depth, wrong = self._first_depth(params, batch, valid)
        if depth is not None:
            lines.append(
                f"first not finite in the forward pass: {_place(depth, self._layers)}, of {_rows(rows, wrong)}"
            )
        elif not finite.loss:
            lines.append("every log-prob of the policy is finite, the loss of them is not")
        elif names := _names(finite.gradient):
            lines.append(
                f"the loss is finite, its gradient is not; the first, backwards: {some(_backwards(names), SHOWN)}"
            )
        return lines or ["on the parameters as they are now, every number of this batch is finite"]

    def _first_depth(self, params: Params, batch: Batch, valid: np.ndarray) -> tuple[int | None, np.ndarray]:
        """The least depth at which a response's log-prob is not finite, and which are not there; None if all are.

        Halving finds it: what is not finite stays so through the sums of the residual stream.
        """

        @functools.cache
        def wrong(depth: int) -> np.ndarray:
            return valid & ~jax.device_get(self._log_probs(params, batch, self._frozen, np.int32(depth)))

        deepest = 2 * self._layers + 2
        if not wrong(deepest).any():
            return None, wrong(deepest)
        first = bisect.bisect_left(range(deepest), True, key=lambda depth: wrong(depth).any())
        return first, wrong(first)


def _cut(params: Params, num_layers: int, depth: Int[Array, ""]) -> Params:
    """The model up to a depth: 0 has the embedding alone, then come each layer's attention and MLP, norm and head.

    A part beyond it is made to pass on what it is given, which needs no program of its own: an attention or MLP of
    zeros adds zero, a norm has the scale 1, and a head of zeros still shows what is not finite. A head that is the
    embedding is there from the first.
    """
    number = jnp.arange(num_layers)

    def within(path: Sequence[Any], leaf: Array) -> Array:
        mlp = path[0].key in ("mlp", "mlp_norm")
        included = 2 * number + int(mlp) < depth
        return jnp.where(included.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, jnp.zeros((), leaf.dtype))

    cut = {**params, "layers": jax.tree.map_with_path(within, params["layers"])}
    norm = params["final_norm"]
    cut["final_norm"] = jax.tree.map(lambda leaf: jnp.where(depth > 2 * num_layers, leaf, jnp.ones_like(leaf)), norm)
    if "head" in params:
        cut["head"] = jnp.where(depth > 2 * num_layers + 1, params["head"], jnp.zeros_like(params["head"]))
    return cut


def _place(depth: int, num_layers: int) -> str:
    if depth == 0:
        return "the token embeddings"
    if depth > 2 * num_layers:
        return "the final norm" if depth == 2 * num_layers + 1 else "the output head"
    return f"layer {(depth - 1) // 2}, its {'attention' if depth % 2 else 'MLP'}"


def _finite(tree: Params) -> Params:
    def finite(path: Sequence[Any], leaf: Array) -> Array:
        stacked = path[0].key == "layers"  # all layers along the first axis
        return jnp.all(jnp.isfinite(leaf), axis=tuple(range(int(stacked), leaf.ndim)))

    return jax.tree.map_with_path(finite, tree)


def _names(finite: Params) -> list[str]:
    """Layer by layer, then the others."""
    by_layer = []
    for path, leaf in jax.tree.leaves_with_path(finite):
        name = ".".join(str(getattr(part, "key", getattr(part, "name", part))) for part in path)
        layers = [(layer, f"layer {layer} {name.removeprefix('layers.')}") for layer in np.flatnonzero(~leaf)]
        by_layer += layers if leaf.ndim else [(-1, name)] * int(not leaf)
    return [name for _, name in sorted(by_layer)]


def _backwards(names: list[str]) -> list[str]:
    """The backward pass comes to the head first, to the last layer next and to the embeddings last."""

    def order(name: str) -> tuple[int, int]:
        if not name.startswith("layer "):
            return (2 if name.startswith("embed") else 0), 0
        return 1, -int(name.split()[1])

    return sorted(names, key=order)


def _rows(rows: list[str], which: np.ndarray) -> str:
    """The rows of some slots; `which` may leave out the last sides' slots."""
    held = dict.fromkeys(row for row in rows if row)
    named = dict.fromkeys(rows[slot] for slot in np.flatnonzero(which) if rows[slot])
    if len(named) == len(held) > 1:
        return f"all {len(held)} rows of the batch"
    return some(list(named), SHOWN)
