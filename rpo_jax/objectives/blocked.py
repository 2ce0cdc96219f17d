"""The contrast matrix a block of rows at a time, for matrices that no device should hold.

Whatever a matrix is reduced to (loss, derivatives, statistics) is a sum over its rows, and a row's weights need no
other row. So a block is a few whole rows, small enough that it holds at most block^2 entries: every weighting,
calibrated temperatures included, is computed in it exactly as in a matrix that is held whole. Devices share the rows.
Memory is O(M E + block^2) for embeddings of width E; time is that of the matrix, with its cosines computed twice, once
for the statistics and temperatures and once for the loss.

Letters: M chosen and N rejected responses of a contrast group, G groups, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from rpo_jax.core.records import Side
from rpo_jax.objectives.contrast import ContrastWeights
from rpo_jax.objectives.matrix import ContrastMatrix, RowsLoss, WeightsOn

# Entries of a matrix that is still held whole, 4,096 by 4,096: up to there a float32 array of it takes 64 MiB.
DENSE_ENTRIES = 4096**2
BLOCK = 1024  # a float32 array of such a block takes 4 MiB: on a CPU it stays in the cache, and larger ones are slower


class FillRows(Protocol):
    """Some rows of a matrix and their statistics, which add up over rows; in float32 or as Means of it.

    is_own_pair: which entries are a row's own pair. temperature: each row's tau where it is known already.
    """

    def __call__(
        self, chosen: Side, rejected: Side, is_own_pair: Bool[Array, "B N"], temperature: Float[Array, "B"] | None
    ) -> tuple[ContrastWeights, Any]: ...


@dataclass(frozen=True)
class RowBlocks:
    """What fills the matrix, the edge of its blocks, and the devices that share its rows; none: one does it all."""

    fill: FillRows
    block: int
    mesh: Mesh | None

    def cut(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Devices, blocks for each of them, rows of a block; all of one size, with as few rows too many as can be."""
        shards = 1 if self.mesh is None else self.mesh.size
        per_shard = max(1, -(-rows // shards))
        count = -(-per_shard // max(1, self.block**2 // max(1, columns)))
        return shards, count, -(-per_shard // count)


@dataclass(frozen=True)
class BlockedMatrix(ContrastMatrix):
    """A contrast matrix as the recipe of its rows.

    temperature: each row's tau, where the weights have one. entries: valid entries in all, float32 because there may
    be more than int32 counts. valid_rows: rows with a valid entry.
    """

    blocks: RowBlocks
    chosen: Side
    rejected: Side
    temperature: Float[Array, "*G M"] | None
    entries: Float[Array, ""]
    valid_rows: Float[Array, ""]

    def valid(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        return self.entries, self.valid_rows

    def sum(self, rows_loss: RowsLoss, chosen: Any, rejected: Any) -> Float[Array, ""]:
        sides = self.chosen, self.rejected, self.temperature
        return _sum_over_blocks((self.blocks, rows_loss), chosen, rejected, *sides)


def needs_blocks(entries: int, block: str | int) -> bool:
    """Whether a matrix of so many entries is to be taken in blocks; `block` is auto, dense or a block's edge."""
    return entries > DENSE_ENTRIES if block == "auto" else block != "dense"


def scan_rows(
    fill: FillRows,
    chosen: Side,
    rejected: Side,
    block: str | int = "auto",
    mesh: Mesh | None = None,
    weights_on: WeightsOn = "score",
) -> tuple[BlockedMatrix, Any]:
    """The matrix of these responses in blocks, and its statistics, summed over all rows.

    Args:
        fill: makes some rows of the matrix.
        chosen, rejected: all responses, [M] and [N], or [G, M] and [G, N] in groups.
        block: edge of a block, whose entries are at most its square (but a row at least); auto for BLOCK.
        mesh: devices to share the rows among, all of them evenly; none: on one device.
        weights_on: as ContrastMatrix.weights_on.
    """
    blocks = RowBlocks(fill, BLOCK if isinstance(block, str) else block, mesh)

    def look(rows: tuple[Side], columns: tuple[Side], is_own_pair: Bool[Array, "B N"]) -> tuple[Any, Any]:
        matrix, statistics = fill(*rows, *columns, is_own_pair, None)
        counts = (jnp.sum(matrix.mask, dtype=jnp.float32), jnp.sum(jnp.any(matrix.mask, axis=-1), dtype=jnp.float32))
        return (statistics, counts), matrix.temperature

    sums, temperature = _over_rows(blocks, look, (chosen,), (rejected,))
    statistics, counts = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
    temperature = None if temperature is None else temperature.reshape(chosen.valid.shape)
    return BlockedMatrix(blocks, chosen, rejected, temperature, *counts, weights_on=weights_on), statistics


def _evaluated(settings: tuple[RowBlocks, RowsLoss], inputs: tuple[Any, ...], function: Callable[..., Any]) -> Any:
    """`function`, of the loss and what it takes, over all rows."""
    blocks, rows_loss = settings
    chosen, rejected, chosen_side, rejected_side, temperature = inputs

    def body(
        rows: tuple[Side, Any, Any], columns: tuple[Side, Any], is_own_pair: Bool[Array, "B N"]
    ) -> tuple[Any, Any]:
        matrix, _ = blocks.fill(rows[0], columns[0], is_own_pair, rows[2])
        return function(rows_loss, rows[1], columns[1], matrix.weights, matrix.mask)

    return _over_rows(blocks, body, (chosen_side, chosen, temperature), (rejected_side, rejected))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over_blocks(settings: tuple[RowBlocks, RowsLoss], *inputs: Any) -> Float[Array, ""]:
    """Inputs are the chosen and rejected scores, the two sides, and the rows' temperatures."""
    return jnp.sum(_evaluated(settings, inputs, lambda rows_loss, *block: (rows_loss(*block), None))[0])


def _forward(settings: tuple[RowBlocks, RowsLoss], *inputs: Any) -> tuple[Array, tuple[Any, Any]]:
    """Value and derivatives in one pass, so that the backward pass has no block to compute again."""

    def both(rows_loss: RowsLoss, *block: Any) -> tuple[Any, Any]:
        value, (by_chosen, by_rejected) = jax.value_and_grad(rows_loss, (0, 1))(*block)
        return (value, by_rejected), by_chosen

    (values, by_rejected), by_chosen = _evaluated(settings, inputs, both)
    return jnp.sum(values), jax.tree.map(lambda x, like: x.reshape(like.shape), (by_chosen, by_rejected), inputs[:2])


def _backward(settings: tuple[RowBlocks, RowsLoss], derivatives: tuple[Any, Any], cotangent: Array) -> tuple[Any, ...]:
    # Embeddings, masks and temperatures are data.
    return *jax.tree.map(lambda derivative: cotangent * derivative, derivatives), None, None, None


_sum_over_blocks.defvjp(_forward, _backward)


def _over_rows(row_blocks: RowBlocks, body: Callable[..., tuple[Any, Any]], rows: Any, columns: Any) -> tuple[Any, Any]:
    """Run body(a block's rows, all columns, is_own_pair) -> (sums, values per row) over all rows of all groups.

    Args:
        rows, columns: tuples of a Side and arrays beside it, [M, ...] and [N, ...] or with groups in front.

    Returns:
        The sums over the rows of each group, [G, ...], and the values of all rows, [G, M, ...].
    """
    if rows[0].valid.ndim == 1:  # one group
        rows, columns = jax.tree.map(lambda x: x[None], (rows, columns))
    num_rows = rows[0].valid.shape[1]
    shards, count, size = row_blocks.cut(num_rows, columns[0].valid.shape[1])
    padding = shards * count * size - num_rows  # of rows that are not valid
    rows = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))), rows)

    def share(rows: Any, index: Array, columns: Any) -> tuple[Any, Any]:
        """What one device does: its rows, of one group after another."""

        def group(parts: tuple[Any, Any]) -> tuple[Any, Any]:
            blocks = jax.tree.map(lambda x: x.reshape(count, size, *x.shape[1:]), (parts[0], index))
            sums, values = _over_blocks(body, blocks, parts[1])
            return sums, jax.tree.map(lambda x: x.reshape(count * size, *x.shape[2:]), values)

        sums, values = lax.map(group, (rows, columns))
        return (sums if row_blocks.mesh is None else lax.psum(sums, row_blocks.mesh.axis_names)), values

    if row_blocks.mesh is not None:
        whole, of_index = PartitionSpec(), PartitionSpec(row_blocks.mesh.axis_names)
        of_rows = PartitionSpec(None, row_blocks.mesh.axis_names)
        specs = {"in_specs": (of_rows, of_index, whole), "out_specs": (whole, of_rows)}
        share = jax.shard_map(share, mesh=row_blocks.mesh, check_vma=False, **specs)
    sums, values = share(rows, jnp.arange(num_rows + padding), columns)
    return sums, jax.tree.map(lambda x: x[:, :num_rows], values)


def _over_blocks(body: Callable[..., tuple[Any, Any]], blocks: tuple[Any, Array], columns: Any) -> tuple[Any, Any]:
    """Sums over a group's blocks, and the values of each; a block is its rows and their numbers in the group."""
    number = jnp.arange(columns[0].valid.shape[0])

    def of(block: tuple[Any, Array]) -> tuple[Any, Any]:
        return body(block[0], columns, block[1][:, None] == number)

    def turn(total: Any, block: tuple[Any, Array]) -> tuple[Any, Any]:
        sums, values = of(block)
        return jax.tree.map(jnp.add, total, sums), values

    shapes, _ = jax.eval_shape(of, jax.tree.map(lambda x: x[0], blocks))
    return lax.scan(turn, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), blocks)
