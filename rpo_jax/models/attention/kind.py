"""What an attention declares of itself, and how devices share its work.

Letters: R rows, T tokens, H query heads, G key-value heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from rpo_jax.core.shards import STRIPE, Shards
from rpo_jax.models.attention.masking import TokenIds, visible

SHORT = 128  # tokens; rows up to this are one or two blocks: nothing to skip
# What a backward pass keeps of attention under the `dots` policy: to run it again would cost more than all the rest.
ATTENTION_OUTPUT = "attention output"
# query, key, value, which of the layers' distinct windows; and sinks [H], a score of every head that has no value
Attend = Callable[..., Array]
Windows = tuple[int | None, ...]

# Names of axes, as Split.per_shard takes them.
OWN: Any = ("shards",)  # of what every device made for itself
ROW_TOKENS: Any = ("rows", "tokens")
_WHOLE_ROWS: Any = ("rows", None)
TOKEN_IDS_AXES = TokenIds(_WHOLE_ROWS, _WHOLE_ROWS, _WHOLE_ROWS)  # every device has those of all its rows' tokens


class Share(NamedTuple):
    """A device's part of the tokens of its rows, its stripes: for functions that each device runs on its own part.

    A device has the queries of its own tokens, and the keys that other devices give it. By default all are its own.
    Letters: t of a row's T tokens.

    Attributes:
        context: devices among which a row's tokens are split.
        axes: their axes of the mesh.
    """

    context: int = 1
    axes: tuple[str, ...] = ()

    @property
    def shards(self) -> Shards:
        return Shards(context=self.context)

    def device(self) -> Array:
        """Which of the context's devices this is."""
        return lax.axis_index(self.axes) if self.axes else jnp.zeros((), jnp.int32)

    def index(self, place: Array, device: Array | None = None) -> Array:
        """Index in the row of a token, from its index among the device's own."""
        if self.context == 1:
            return place
        device = self.device() if device is None else device
        return place + (lax.div(place, STRIPE) * (self.context - 1) + device) * STRIPE

    def own(self, ids: TokenIds) -> TokenIds:
        """Those of [R, T] that are of the device's tokens, [R, t]."""
        if self.context == 1:
            return ids
        return TokenIds(*(x[:, self.index(jnp.arange(x.shape[1] // self.context))] for x in ids))

    def visible(self, ids: TokenIds, window: int | Array | None) -> Bool[Array, "R t T"]:
        """What the device's tokens see of their rows: masking.visible for [R, T] ids."""
        own = self.own(ids)
        return visible(*own, window, keys=ids, places=self.index(jnp.arange(own.positions.shape[1])))

    def whole(self, x: Array) -> Array:
        """From the device's part of the rows, [R, t, ...], to all of them in their order, [R, T, ...]."""
        if self.context == 1:
            return x
        stripes = x.reshape(len(x), -1, STRIPE, *x.shape[2:])
        return lax.all_gather(stripes, self.axes, axis=2).reshape(len(x), -1, *x.shape[2:])


ALL = Share()


class Split(NamedTuple):
    """How devices share the work; by default there is one.

    Attributes:
        shards: number of devices among which an axis is split, by its name.
        per_shard: (function, axes of its inputs, axes of its outputs) to the function that each device runs on its own
            part; axes are tuples of names, one tuple per array.
        gather: (parameter, names of its axes, dtype that it is used in or nothing) to the parameter as every device
            that has rows of its own needs it.
        mesh_axes: names of the mesh's axes over which an axis is split, for what the devices of `per_shard` exchange.

    Where a row's tokens are split, arrays of activations are striped (rpo_jax.core.shards).
    """

    shards: Callable[[str], int] = lambda axis: 1
    per_shard: Callable[[Callable[..., Any], Any, Any], Callable[..., Any]] = lambda function, *axes: function
    gather: Callable[..., Array] = lambda x, axes, used_in=None: x
    mesh_axes: Callable[[str], tuple[str, ...]] = lambda axis: ()

    @property
    def share(self) -> Share:
        return Share(self.shards("tokens"), self.mesh_axes("tokens"))

    def by_window(self, function: Callable[..., Any], ids: TokenIds, windows: Windows, axes: Any) -> Any:
        """function(ids, window=...) by each device on its own rows, for each of the layers' distinct windows, stacked.

        So layers that share a window share what is made of it.

        Args:
            axes: names of the axes of what `function` gives.
        """
        made = [self.per_shard(partial(function, window=window), (TOKEN_IDS_AXES,), axes)(ids) for window in windows]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *made)

    def attend(
        self,
        function: Callable[..., Array],
        qkv: tuple[Array, Array, Array],
        more: Any,
        axes: Any,
        padding: int = 0,
        sinks: Array | None = None,
    ) -> Array:
        """function(query, key, value, *more) by each device on its own rows, queries and heads; [R, T, H, K].

        Args:
            function: grouped-query attention of [R, t, H, K] and two [R, T, G, K], t the device's tokens of a row.
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

        def of_device(query: Array, key: Array, value: Array, *more: Any) -> Array:
            return function(query, self.share.whole(key), self.share.whole(value), *more)

        run = self.per_shard(of_device, (of_query, of_key, of_key, *axes), of_query)
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
        make: (tokens' ids, distinct windows, split, softcap of the scores) to the attention of a batch. The ids are in
            the rows' order, whatever that of queries, keys and values is.
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
        shares_tokens: whether devices can share a row's tokens: it runs by Split.attend, with the mask of Split.share.
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
    shares_tokens: bool = False
