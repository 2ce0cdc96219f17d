"""What an attention declares of itself, and how devices share its work.

Letters: R rows, T tokens, H query heads, G key-value heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from rpo_jax.models.attention.masking import TokenIds

SHORT = 128  # tokens; rows up to this are one or two blocks: nothing to skip
# What a backward pass keeps of attention under the `dots` policy: to run it again would cost more than all the rest.
ATTENTION_OUTPUT = "attention output"
# query, key, value, which of the layers' distinct windows; and sinks [H], a score of every head that has no value
Attend = Callable[..., Array]
Windows = tuple[int | None, ...]

# Names of axes, as Split.per_shard takes them.
ROW: Any = ("rows",)
ROW_TOKENS: Any = ("rows", "tokens")
TOKEN_IDS_AXES = TokenIds(ROW_TOKENS, ROW_TOKENS, ROW_TOKENS)


class Split(NamedTuple):
    """How devices share the work; by default there is one.

    Attributes:
        shards: number of devices among which an axis is split, by its name.
        per_shard: (function, axes of its inputs, axes of its outputs) to the function that each device runs on its own
            part; axes are tuples of names, one tuple per array.
        gather: (parameter, names of its axes) to the parameter as every device that has rows of its own needs it.
        mesh_axes: names of the mesh's axes over which an axis is split, for what the devices of `per_shard` exchange.
    """

    shards: Callable[[str], int] = lambda axis: 1
    per_shard: Callable[[Callable[..., Any], Any, Any], Callable[..., Any]] = lambda function, *axes: function
    gather: Callable[[Array, tuple[str | None, ...]], Array] = lambda x, axes: x
    mesh_axes: Callable[[str], tuple[str, ...]] = lambda axis: ()

    def attend(
        self,
        function: Callable[..., Array],
        qkv: tuple[Array, Array, Array],
        more: Any,
        axes: Any,
        padding: int = 0,
        sinks: Array | None = None,
    ) -> Array:
        """function(query, key, value, *more) by each device on its own rows and heads; [R, T, H, K].

        Args:
            function: grouped-query attention of [R, T, H, K] and two [R, T, G, K].
            more: further inputs, a tuple.
            axes: names of their axes.
            padding: tokens that `function` needs at the end of every row; they are cut off again.
            sinks: [H], a score of every head that has no value; `function` takes them last, where there are any.
        """
        query, key, value = qkv
        tokens, heads, shards = query.shape[1], query.shape[2], self.shards("kv_heads")
        if key.shape[2] % shards and heads % shards == 0:
            # Too few to be split as the queries' heads are.
            key, value = (jnp.repeat(x, heads // key.shape[2], axis=2) for x in (key, value))
        # Heads that devices cannot share evenly are whole on each of them.
        even = key.shape[2] % shards == 0 and heads % self.shards("heads") == 0
        of_query, of_key = ((*ROW_TOKENS, name if even else None, None) for name in ("heads", "kv_heads"))
        if sinks is not None:
            more, axes = (*more, sinks), (*axes, ("heads" if even else None,))
        run = self.per_shard(function, (of_query, of_key, of_key, *axes), of_query)
        if padding:
            query, key, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query, key, value))
        return run(query, key, value, *more)[:, :tokens]


ONE_DEVICE = Split()


def capped(x: Array, softcap: float | None) -> Array:
    """c tanh(x / c), which never leaves (-c, c); x where there is no c.  Source: arXiv 2408.00118, Section 2."""
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


class AttentionKind(NamedTuple):
    """One way to compute attention; its module's name is the value of model.attention that asks for it.

    Attributes:
        make: (tokens' ids, distinct windows, split, softcap of the scores) to the attention of a batch.
        why: one line on where it is used.
        auto: platforms on which `auto` picks it.
        beyond: for rows of more than so many tokens; others are dense's.
        skips: whether keys that nothing in a block sees cost nothing: rows may then be long.
        fused: whether the scores of a whole row are never in memory at once.
        backward_products: of two blocks in the backward pass, of which the forward pass has two: four gradients, and
            the scores again, in each of its kernels, where they are not kept.
        platforms: where it runs, if not everywhere.
        needs: what it cannot do without, in words, and whether (compute dtype, head dimension, row tokens) fulfil it.
        stand_in: the kind whose memory is planned for where this one cannot be compiled; itself where empty.
        caps: whether it can cap scores.
        takes_sinks: whether its function takes sinks.
    """

    make: Callable[[TokenIds, Windows, Split, float | None], Attend]
    why: str
    auto: tuple[str, ...] = ()
    beyond: int = 0
    skips: bool = False
    fused: bool = False
    backward_products: int = 4
    platforms: tuple[str, ...] = ()
    needs: tuple[tuple[str, Callable[[str, int, int | None], bool]], ...] = ()
    stand_in: str = ""
    caps: bool = True
    takes_sinks: bool = False
