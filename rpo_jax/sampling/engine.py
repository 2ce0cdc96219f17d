"""Sampling from the decoder with a cache of keys and values, as jitted functions on the mesh.

Prompts are read a few at a time, those of one length together, into free rows of the batch; all rows then sample a
slice of tokens, and rows whose answers have ended take new prompts. An answer is a function of its prompt, its seed and
the settings: rows never mix, every row has a random stream of its own, and shapes and sums follow from its own tokens.
Letters: B rows, P prompt slots, V vocabulary, S tokens of a slice.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from rpo_jax import models
from rpo_jax.hosts import sharding
from rpo_jax.models import ModelConfig
from rpo_jax.sampling import kv_cache

Params = Any
SLICE_TOKENS = kv_cache.SLICE  # sampled between two looks of the host, which finds stop strings and fills free rows
READ_ROWS = 8  # prompts read at a time
SMALLEST_CACHE = 2  # blocks
GROUPS = 256  # of the vocabulary, or as many as divide it: a shard has whole ones
NOTHING = -1  # what a finished row samples


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only from the k likeliest tokens, and those that tie with the last of them.
        top_p: only from the fewest likeliest tokens whose probabilities, after top_k, add up to this.
        principle_weight: r of Linear Alignment (arXiv 2401.11458): every prompt is read with a principle and without,
            and the logits are (1 + r) times those with it minus r times those without; top_k and top_p go by the
            probabilities with it. 0 reads prompts once.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    principle_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or greater.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; leave it out to sample from all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be greater than 0 and at most 1.")
        if not 0 <= self.principle_weight < float("inf"):
            raise ValueError(f"principle_weight={self.principle_weight} must be 0 or greater.")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError(
                f"temperature=0 takes the likeliest token, so top_k={self.top_k} and top_p={self.top_p} would mean "
                "nothing; leave them out, or set a temperature."
            )


class State(NamedTuple):
    """A batch between two slices."""

    cache: kv_cache.Cache
    last: Int[Array, "B"]  # sampled, not yet read
    count: Int[Array, "B"]  # tokens sampled so far
    done: Bool[Array, "B"]
    limits: Int[Array, "B"]  # tokens that a row may have
    seeds: UInt32[Array, "B"]


class Prompts(NamedTuple):
    """Some prompts of one bucket, and the rows that they are for."""

    tokens: Int[Any, "R P"]  # each prompt ends in the last column
    starts: Int[Any, "R"]
    seeds: UInt32[Any, "R"]
    limits: Int[Any, "R"]
    rows: Int[Any, "R"]  # beyond the batch for what is there to fill the shape


def bucket(tokens: int) -> int:
    """Slots for a prompt of so many tokens: 32, 64, 96, 128, 192, 256, 384, ..."""
    size = kv_cache.SLICE
    while size < tokens:
        size += max(kv_cache.SLICE, 1 << (size.bit_length() - 2))
    return size


def cache_blocks(slices: int) -> int:
    """Blocks of a cache whose rows have so many slices: 2, 4, 8, ..."""
    blocks = -(-slices // kv_cache.BLOCK_SLICES)
    return max(SMALLEST_CACHE, 1 << (blocks - 1).bit_length())


def make_prompts(
    prompts: Sequence[Int[np.ndarray, "_"]],
    seeds: Sequence[int],
    limits: Sequence[int],
    rows: Sequence[int],
    size: int,
    slots: int,
) -> Prompts:
    """`size` prompts of so many slots from as many or fewer, for these rows."""
    fill = [0] * (size - len(prompts))
    tokens = np.zeros((size, slots), np.int32)
    starts = np.full(size, slots - 1, np.int32)
    for number, ids in enumerate(prompts):
        tokens[number, slots - len(ids) :] = ids
        starts[number] = slots - len(ids)
    nowhere = [np.iinfo(np.int32).max] * len(fill)
    return Prompts(
        tokens,
        starts,
        np.array([*seeds, *fill], np.uint32),
        np.array([*limits, *fill], np.int32),
        np.array([*rows, *nowhere], np.int32),
    )


def choose(
    logits: Float[Array, "B V"],
    seeds: UInt32[Array, "B"],
    count: Int[Array, "B"],
    sampling: Sampling,
) -> Int[Array, "B"]:
    """The next token of every row; `count` says how many it has, and with its seed which random number it draws."""
    if sampling.principle_weight:
        return jnp.tile(_aligned(logits, seeds, count, sampling), 2)
    if sampling.temperature == 0:
        return _likeliest_token(logits)
    return _drawn(_allowed(jax.nn.softmax(logits / sampling.temperature, axis=-1), sampling), seeds, count)


def aligned_logits(
    with_principle: Float[Array, "B V"], without: Float[Array, "B V"], weight: float
) -> Float[Array, "B V"]:
    """Linear Alignment's logits: z = (1 + r) z(x with principle) - r z(x). Source: arXiv 2401.11458."""
    return (1 + weight) * with_principle - weight * without


def _aligned(
    logits: Float[Array, "B V"], seeds: UInt32[Array, "B"], count: Int[Array, "B"], sampling: Sampling
) -> Array:
    """The next tokens of the first half of the rows, which read the principle; the second half does without."""
    half = len(logits) // 2
    aligned = aligned_logits(logits[:half], logits[half:], sampling.principle_weight)
    if sampling.temperature == 0:
        return _likeliest_token(aligned)
    own = jax.nn.softmax(logits[:half] / sampling.temperature, axis=-1)
    allowed = _allowed(own, sampling) > 0
    probabilities = jax.nn.softmax(aligned / sampling.temperature, axis=-1, where=allowed)
    return _drawn(jnp.where(allowed, probabilities, 0.0), seeds[:half], count[:half])


def _allowed(probabilities: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Probabilities, 0 where top_k or top_p leaves the token out."""
    if sampling.top_k is not None:
        ones = jnp.ones_like(probabilities)
        probabilities = _likeliest(probabilities, ones, jnp.full(len(probabilities), float(sampling.top_k)))
    if sampling.top_p is not None:
        enough = sampling.top_p * jnp.sum(probabilities, axis=-1)
        probabilities = _likeliest(probabilities, probabilities, enough)
    return probabilities


def _drawn(probabilities: Float[Array, "B V"], seeds: UInt32[Array, "B"], count: Int[Array, "B"]) -> Int[Array, "B"]:
    # One number a row and the inverse of the distribution function: noise for a whole vocabulary would cost more than
    # the layers of a small model.
    draw = jax.vmap(lambda seed, count: jax.random.uniform(jax.random.fold_in(jax.random.key(seed), count)))
    uniform = draw(seeds, count)
    # Only of tokens that may be drawn: in float32 the sum goes up and down a little between them.
    below = jnp.where(probabilities > 0, jnp.cumsum(probabilities, axis=-1), 0.0)
    return jnp.argmax(below > (uniform * jnp.max(below, axis=-1))[:, None], axis=-1).astype(jnp.int32)


def _likeliest_token(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """As argmax, which XLA's CPU compiler turns into a slow loop.

    The first group of tokens that has the greatest logit, and the first token with it in the group: so all logits are
    read once, and only a group of them twice.
    """
    count = math.gcd(logits.shape[1], GROUPS)
    groups = logits.T.reshape(count, -1, len(logits))  # logits lie with tokens first

    def first(values: Float[Array, "N B"]) -> Int[Array, "B"]:
        numbers = jnp.arange(len(values), dtype=jnp.int32)[:, None]
        greatest = values == jnp.max(values, axis=0)
        return jnp.min(jnp.where(greatest, numbers, len(values) - 1), axis=0)

    group = first(jnp.max(groups, axis=1))
    return group * groups.shape[1] + first(jnp.take_along_axis(groups, group[None, None], axis=0)[0])


def _likeliest(
    probabilities: Float[Array, "B V"], amounts: Float[Array, "B V"], enough: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Probabilities, 0 but for the fewest likeliest whose amounts add up to enough.

    By bisection over the threshold, whose bits, read as an integer, are in the same order: exact in 31 steps, and
    twenty times as fast as sorting 32,000 probabilities.
    """
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        reached = jnp.sum(jnp.where(bits >= middle[:, None], amounts, 0), axis=-1) >= enough
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    low = jnp.zeros(len(probabilities), jnp.int32)
    high = jnp.full(len(probabilities), np.float32(2.0).view(np.int32).item(), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jnp.where(bits >= low[:, None], probabilities, 0)


class Engine:
    """The compiled functions of one model, one way of sampling and one mesh.

    Args:
        end_ids: tokens that end an answer.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        mesh: Mesh,
        *,
        sampling: Sampling,
        end_ids: Sequence[int],
        compute_dtype: str = "float32",
    ) -> None:
        self.mesh, self.end_ids = mesh, frozenset(end_ids)
        self._reads = 2 if sampling.principle_weight else 1  # rows of the arrays for each of a batch's
        placement = sharding.Placement(mesh, shares_tokens=False)  # of answers that grow token by token
        self._placement, self._platform = placement, mesh.devices.flat[0].platform
        self._by_row = sharding.by_rows(mesh)
        constrain = placement.constrain
        ends = jnp.array(sorted(self.end_ids) or [NOTHING], jnp.int32)
        split = models.Split(placement.shards, placement.per_shard, mesh_axes=placement.mesh_axes)
        settings: dict[str, Any] = {"compute_dtype": compute_dtype, "constrain": constrain, "split": split}
        apart = kv_cache.APART if self._platform == "cpu" else 0

        def sample(params: Params, hidden: Array, seeds: Array, count: Array) -> Array:
            return choose(kv_cache.next_token_logits(model_config, params, hidden, constrain), seeds, count, sampling)

        def empty(rows: int, blocks: int) -> State:
            cache = kv_cache.placed(kv_cache.empty_cache(model_config, rows, blocks, compute_dtype, apart), constrain)
            zeros = constrain(jnp.zeros(rows, jnp.int32), ("rows",))
            return State(cache, zeros, zeros, zeros == 0, zeros, zeros.astype(jnp.uint32))

        def read(params: Params, prompts: Prompts) -> tuple[Array, kv_cache.Cache]:
            hidden, cache = kv_cache.prefill(
                model_config, params, prompts.tokens, prompts.starts, platform=self._platform, **settings
            )
            return sample(params, hidden, prompts.seeds, jnp.zeros_like(prompts.starts)), cache

        def admit(state: State, prompts: Prompts, first: Array, cache: kv_cache.Cache) -> State:
            done = jnp.isin(first, ends) | (prompts.limits <= 1)
            new = (first, jnp.ones_like(first), done, prompts.limits, prompts.seeds)
            others = (x.at[prompts.rows].set(y, mode="drop") for x, y in zip(state[1:], new, strict=True))
            return State(kv_cache.placed(state.cache.with_rows(prompts.rows, cache), constrain), *others)

        def go_on(params: Params, state: State, used: Array) -> tuple[State, Array]:
            # Accelerators would ask the host about the end of a loop in every turn, unless it is known beforehand.
            looked_at = used if self._platform == "cpu" else None

            def going(carried: _Slice) -> Array:
                return (carried.number < SLICE_TOKENS) & ~jnp.all(carried.done)

            def step(carried: _Slice) -> _Slice:
                recent, last, count, done, emitted, number = carried
                hidden, recent = kv_cache.extend(
                    model_config, params, state.cache, recent, last, number, looked_at, **settings
                )
                last = sample(params, hidden, state.seeds, count)
                emitted = emitted.at[:, number].set(jnp.where(done, NOTHING, last))
                done = done | jnp.isin(last, ends) | (count + 1 >= state.limits)
                return _Slice(recent, last, count + 1, done, emitted, number + 1)

            emitted = jnp.full((len(state.last), SLICE_TOKENS), NOTHING, jnp.int32)
            recent = kv_cache.no_tokens(model_config, state.cache)
            begun = _Slice(recent, state.last, state.count, state.done, emitted, jnp.zeros((), jnp.int32))
            ended = jax.lax.while_loop(going, step, begun)
            cache = kv_cache.placed(state.cache.followed_by(ended.recent), constrain)
            return State(cache, ended.last, ended.count, ended.done, state.limits, state.seeds), ended.emitted

        def grow(state: State, blocks: int) -> State:
            return state._replace(cache=kv_cache.placed(state.cache.grown(blocks, apart), constrain))

        self.empty = jax.jit(empty, static_argnums=(0, 1))
        self.read = jax.jit(read)
        self.admit = jax.jit(admit, donate_argnums=0)
        self.go_on = jax.jit(go_on, donate_argnums=1)
        self.grow = jax.jit(grow, static_argnums=1)

    def answers(
        self,
        params: Params,
        prompts: Sequence[Int[np.ndarray, "_"]],
        seeds: Sequence[int],
        limits: Sequence[int],
        rows: int,
        stopped: Callable[[list[int]], bool] | None = None,
        without: Sequence[Int[np.ndarray, "_"]] | None = None,
    ) -> Iterator[list[tuple[int, list[int]]]]:
        """Numbers of prompts and token ids of their answers, some at a time as they end; an end token is included.

        Args:
            params: as to_decode_layout gives them, on the mesh.
            limits: most tokens of every answer.
            rows: of the batch.
            stopped: called with an answer so far after every slice; says whether it need not go on.
            without: the prompts without the principle; with a principle_weight alone.
        """
        versions = [prompts] if without is None else [prompts, without]
        assert len(versions) == self._reads, "prompts are read twice where there is a principle, and only there"
        slots = [bucket(max(map(len, both))) for both in zip(*versions, strict=True)]
        if nothing := [number for number in range(len(prompts)) if limits[number] <= 0]:
            yield [(number, []) for number in nothing]
        # The longest first: they need most memory.
        waiting = deque(sorted(set(range(len(prompts))) - set(nothing), key=lambda i: (-slots[i], i)))
        batch, state = _Rows(rows), self.empty(rows * self._reads, SMALLEST_CACHE)

        def over(number: int, ids: list[int]) -> bool:
            return ids[-1] in self.end_ids or len(ids) >= limits[number] or (stopped is not None and stopped(ids))

        while waiting or batch.taken:
            while chosen := _next(waiting, slots, batch, self._read_rows(rows)):
                free, size = batch.free[: len(chosen)], self._read_rows(rows)
                parts = [
                    make_prompts(
                        *([values[number] for number in chosen] for values in (version, seeds, limits)),
                        [place * rows + row for row in free],
                        size,
                        slots[chosen[0]],
                    )
                    for place, version in enumerate(versions)
                ]
                some = Prompts(*(np.concatenate(values) for values in zip(*parts, strict=True)))
                state, first = self._admitted(params, state, some)
                batch.take(chosen, first, some.tokens.shape[1] // kv_cache.SLICE)
            if not (ended := batch.ended(over)):
                used = max(batch.filled[row] for row in batch.taken)
                state = self._with_room(state, used + 1)
                state, emitted = self.go_on(params, state, np.int32(-(-used // kv_cache.BLOCK_SLICES)))
                batch.add(np.asarray(emitted)[:rows])
                ended = batch.ended(over)
            if ended:
                yield ended
                if stopped is not None:
                    free = np.tile(np.isin(np.arange(rows), batch.free), self._reads)
                    state = state._replace(done=state.done | jax.device_put(free, self._by_row))

    def _read_rows(self, rows: int) -> int:
        """How many prompts are read at a time, for a batch of so many rows; the same for every one of them."""
        shards = self._placement.shards("rows")
        return min(rows, -(-READ_ROWS // shards) * shards)

    def _admitted(self, params: Params, state: State, prompts: Prompts) -> tuple[State, np.ndarray]:
        """The batch with these prompts in their rows, and their first tokens."""
        placed = Prompts(*(jax.device_put(np.asarray(value), self._by_row) for value in prompts))
        first, cache = self.read(params, placed)
        state = self._with_room(state, prompts.tokens.shape[1] // kv_cache.SLICE + 1)
        return self.admit(state, placed, first, cache), np.asarray(first)

    def _with_room(self, state: State, slices: int) -> State:
        blocks = cache_blocks(slices)
        return state if blocks <= state.cache.blocks else self.grow(state, blocks)


class _Slice(NamedTuple):
    """What changes from token to token."""

    recent: kv_cache.Recent
    last: Int[Array, "B"]
    count: Int[Array, "B"]
    done: Bool[Array, "B"]
    emitted: Int[Array, "B S"]
    number: Int[Array, ""]


class _Rows:
    """What the host knows of a batch's rows: whose answer each holds, how much of it, and how many slices it has."""

    def __init__(self, count: int) -> None:
        self._of: dict[int, int] = {}  # number of the prompt by row
        self._found: dict[int, list[int]] = {}
        self._fresh: set[int] = set()  # rows that have got tokens since they were last looked at
        self._count = count
        self.filled = [0] * count

    @property
    def taken(self) -> list[int]:
        return list(self._of)

    @property
    def free(self) -> list[int]:
        return [row for row in range(self._count) if row not in self._of]

    def take(self, numbers: Sequence[int], first: Int[np.ndarray, "_"], slices: int) -> None:
        """Give free rows to prompts of so many slices, whose first tokens are known."""
        for row, number, token in zip(self.free, numbers, first.tolist(), strict=False):
            self._of[row], self._found[row], self.filled[row] = number, [token], slices
            self._fresh.add(row)

    def add(self, emitted: Int[np.ndarray, "B S"]) -> None:
        """The tokens of a slice."""
        for row, tokens in enumerate(emitted.tolist()):
            self.filled[row] += 1
            if row in self._of:
                self._found[row] += [token for token in tokens if token != NOTHING]
                self._fresh.add(row)

    def ended(self, over: Callable[[int, list[int]], bool]) -> list[tuple[int, list[int]]]:
        """Answers that are over, whose rows are free then."""
        rows = [row for row in sorted(self._fresh) if over(self._of[row], self._found[row])]
        self._fresh.clear()
        return [(self._of.pop(row), self._found.pop(row)) for row in rows]


def _next(waiting: deque[int], slots: Sequence[int], batch: _Rows, most: int) -> list[int]:
    """The next prompts of as many slots, if all of them have a row; they wait no more then."""
    if not waiting:
        return []
    same = [number for number in islice(waiting, most) if slots[number] == slots[waiting[0]]]
    if len(same) > len(batch.free):
        return []
    for _ in same:
        waiting.popleft()
    return same
