"""How the tokens of packed rows are dealt to devices: rows whole, or each row's stripes in turn.

With a context of C devices, stripe n of a row, STRIPE tokens, belongs to device n mod C. What a causal row has to
compute grows along it, and segments end anywhere: of stripes every device has some of everything. An array is *striped*
where the stripes of the first device come first, then those of the second, so that equal parts of it are the devices'.
Source: arXiv 2311.09431 (striped attention), with stripes as long as the blocks that attention visits.

Letters: R rows of T tokens, C devices of a context, S shards in all, n tokens of a shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

# No block of queries that an attention works on is longer, but for splash's, which need no order.
STRIPE = 128
ROW_TOKENS_MULTIPLE = 64  # of rows whose length nobody gives


def row_multiple(context: int) -> int:
    """What divides the length of rows whose tokens so many devices share, each of them whole stripes."""
    return ROW_TOKENS_MULTIPLE if context == 1 else STRIPE * context


class Shards(NamedTuple):
    """Among how many devices rows are split, and among how many the tokens of each.

    Arrays are NumPy's or JAX's.
    """

    rows: int = 1
    context: int = 1

    @property
    def count(self) -> int:
        """S: rows' parts, and for each of them those of its tokens."""
        return self.rows * self.context

    def split(self, x: Any) -> Any:
        """[R, T, ...], striped, to [S, n, ...]."""
        rows, tokens, *rest = x.shape
        parts = x.reshape(self.rows, rows // self.rows, self.context, tokens // self.context, *rest)
        return parts.swapaxes(1, 2).reshape(self.count, -1, *rest)

    def join(self, x: Any, shape: tuple[int, ...]) -> Any:
        """What `split` gave, in this shape again."""
        rows, tokens, *rest = shape
        parts = x.reshape(self.rows, self.context, rows // self.rows, tokens // self.context, *rest)
        return parts.swapaxes(1, 2).reshape(shape)

    @property
    def shares_tokens(self) -> bool:
        """Whether what works on each token alone has to have shards as an axis, as `split` makes it.

        A matrix product merges the axes before the last one. Those of rows and of tokens that devices share would then
        be one that cannot be split as they are, and XLA gathers it.
        """
        return self.context > 1

    def each(self, function: Callable[[Any], Any], x: Any) -> Any:
        """function(x), which works on each token of [R, T, ...] alone."""
        if not self.shares_tokens:
            return function(x)
        done = function(self.split(x))
        return self.join(done, (*x.shape[:2], *done.shape[2:]))

    def striped(self, x: Any) -> Any:
        """[R, T, ...] from the row's order to the devices'."""
        return self._turned(x, (-1, self.context, STRIPE))

    def in_order(self, x: Any) -> Any:
        """[R, T, ...] from the devices' order to the row's."""
        return self._turned(x, (self.context, -1, STRIPE))

    def _turned(self, x: Any, shape: tuple[int, ...]) -> Any:
        if self.context == 1:
            return x
        return x.reshape(len(x), *shape, *x.shape[2:]).swapaxes(1, 2).reshape(x.shape)

    def place(self, index: Any, tokens: int) -> Any:
        """Where a token is in a striped row, from its index in the row of T tokens."""
        if self.context == 1:
            return index
        device, place = index // STRIPE % self.context, index // (STRIPE * self.context) * STRIPE + index % STRIPE
        return device * (tokens // self.context) + place


ONE = Shards()
