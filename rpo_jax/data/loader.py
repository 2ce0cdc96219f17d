"""Batches as a pure function of the step: nothing to save for a resume, the same on any number of hosts.

Letters: d draws of a pool; S slots of one kind in a batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from rpo_jax.core.records import KINDS, REFINED, Batch, PreferenceData
from rpo_jax.core.shards import ROW_TOKENS_MULTIPLE
from rpo_jax.data.packing import (
    NO_RESPONSE,
    Draws,
    PackingPlan,
    by_prompt,
    fill_batch,
    longest_of,
    pack_groups,
    plan_batch,
    segments_of,
)
from rpo_jax.data.related import Points, related_order, whole_points
from rpo_jax.data.shapes import PackedShape, choose_shapes, row_lengths

PAIRINGS = ("paired", "unpaired", "grouped")
ORDERS = ("shuffled", "related", "sequential")

# How many of a run's own batches its shapes are chosen by: as many as are packed in well under a second.
SAMPLED_BATCHES = 256
FEWEST_SAMPLED = 8
SAMPLED_PAIRS = 16_384


class _Source(NamedTuple):
    """A source's part of a pool: its first draw, how many there are, and how many places of a round it fills."""

    first: int
    size: int
    places: int


class _Pool:
    """What slots are filled from: draw d is one response of each of some kinds, all of one example.

    Args:
        draws: response of each draw, by kind, in the order of the examples.
        weights: of each source of the data, how often a round takes its draws; once where not given.

    Attributes:
        round: places that are filled before the pool starts again; with weights, draws may come several times, or not.
        tokens: for each prompt that responses follow, the tokens of every draw's segment.
        examples: of every draw.
        longest: the most tokens that a row should have room for.
    """

    def __init__(
        self, data: PreferenceData, draws: dict[str, Int[np.ndarray, "d"]], weights: Sequence[float] | None = None
    ) -> None:
        first = next(iter(draws.values()))
        self.draws, self.size, flat = draws, len(first), data.flat
        tokens: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(self.size, np.int64))
        for numbers in draws.values():
            after = flat.prompt[numbers]
            for prompt in np.unique(after).tolist():
                tokens[prompt] += np.where(after == prompt, flat.response_tokens[numbers], 0)
        self.examples = data.example_index[first]
        self.tokens = [count + flat.prompt_tokens(self.examples, prompt) for prompt, count in tokens.items()]
        self.longest = max(int(count.max()) for count in self.tokens)
        self._mix(data, weights)

    def _mix(self, data: PreferenceData, weights: Sequence[float] | None) -> None:
        self.round, self.sources = self.size, []
        if weights is not None:
            assert data.source is not None
            held = np.bincount(data.source[self.examples], minlength=len(weights)).tolist()
            self.sources = [
                _Source(int(sum(held[:number])), count, max(1, round(count * weight)))
                for number, (count, weight) in enumerate(zip(held, weights, strict=True))
                if count
            ]
            self.round = sum(source.places for source in self.sources)

    @property
    def most_repeats(self) -> int:
        """How often a round has any one draw at most."""
        return max((-(-source.places // source.size) + 1 for source in self.sources), default=1)

    def at(
        self,
        number: int,
        places: Int[np.ndarray, "_"],
        permutation: Callable[[int, int, int], Int[np.ndarray, "_"]],
    ) -> Int[np.ndarray, "_"]:
        """Draws at these places of a round: each source goes round its own, whatever share of it a round takes.

        Args:
            permutation: of a source's draws, by its number, how often it was gone round and how many they are.
        """
        if not self.sources:
            return places
        index, start = np.empty(len(places), np.int64), 0
        for which, (first, size, held) in enumerate(self.sources):
            slots = np.flatnonzero((places >= start) & (places < start + held))
            rounds, own = np.divmod(number * held + places[slots] - start, size)
            for again in np.unique(rounds):
                now = rounds == again
                index[slots[now]] = first + permutation(which, int(again), size)[own[now]]
            start += held
        return index

    def take(self, draws: Int[np.ndarray, "S"]) -> list[Draws]:
        """The responses of these draws, those together that share a segment; none where a draw is NO_RESPONSE."""
        taken = draws != NO_RESPONSE
        return [{kind: np.where(taken, responses[draws], NO_RESPONSE) for kind, responses in self.draws.items()}]

    def points(self) -> list[Int[np.ndarray, "d"]]:
        """Responses whose embeddings place a draw."""
        return [responses for kind, responses in self.draws.items() if KINDS[kind].made_by is None]


class _PromptPool(_Pool):
    """Draw d is an example with all its responses: of each kind as many slots as any example has, the rest empty.

    Every response is a segment of its own, which packing joins with those of the same prompt as far as a row holds
    them: a group that is longer than a row goes into several, its prompt into each.

    Attributes:
        draws: responses of each draw, by kind, [d, slots of a draw]; NO_RESPONSE where it has fewer.
    """

    def __init__(
        self, data: PreferenceData, kinds: Sequence[str], weights: Sequence[float] | None = None, least_slots: int = 1
    ) -> None:
        self.size, flat = len(data.examples), data.flat
        self.examples = np.arange(self.size)
        self._mix(data, weights)
        self.draws, self.tokens = {}, []
        together: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(self.size, np.int64))
        for kind in kinds:
            numbers = data.of_kind(kind)
            of = data.example_index[numbers]
            held = np.bincount(of, minlength=self.size)
            if not len(numbers):
                raise ValueError(f"None of the {self.size} examples has a {kind} response; add rows that have one.")
            table = np.full((self.size, max(least_slots, held.max())), NO_RESPONSE, np.int64)
            table[of, np.arange(len(numbers)) - (np.cumsum(held) - held)[of]] = numbers
            self.draws[kind] = table
            for column in table.T:
                there = np.where(column == NO_RESPONSE, 0, flat.response_tokens[column])
                prompts = np.where(column == NO_RESPONSE, 0, flat.prompt[column])
                self.tokens.append(np.where(there, there + flat.prompt_tokens(self.examples, prompts), 0))
                for prompt in np.unique(prompts).tolist():
                    together[prompt] += np.where(prompts == prompt, there, 0)
        whole = (count + flat.prompt_tokens(self.examples, prompt) for prompt, count in together.items())
        self.longest = max(int(count.max()) for count in whole)

    def take(self, draws: Int[np.ndarray, "S"]) -> list[Draws]:
        taken = (draws != NO_RESPONSE)[:, None]
        return [{kind: np.where(taken, table[draws], NO_RESPONSE).ravel()} for kind, table in self.draws.items()]

    def points(self) -> list[Int[np.ndarray, "d"]]:
        """The first response of each example."""
        tables = np.concatenate([table for kind, table in self.draws.items() if KINDS[kind].made_by is None], axis=1)
        return [tables[self.examples, np.argmax(tables != NO_RESPONSE, axis=1)]]


class PreferenceBatches:
    """Serves batches of a data set, each a pure function of (data, arguments, step).

    Args:
        data: the examples, with embeddings and, where computed, reference log-probs.
        pairs: slots of each side of a batch: M = pairs, N = pairs or 0, K = pairs or 0.
        pairing: `paired` gives slot i of every side to one example, of which it takes the first response of each kind;
            `unpaired` draws all chosen and all rejected responses from two pools, shuffled apart, as many of each: the
            larger pool's size is the epoch, the smaller one starts again when it is used up, shuffled in a new order;
            `grouped` draws examples, each with all of its responses: a batch has the slots of `pairs` examples with the
            most responses of each kind, those of an example side by side.
        responses: which of KINDS to load; slot i of a kind belongs to slot i of the kind that KINDS names with it. Both
            sides are refined or none.
        order: `shuffled` anew each epoch; `related`, batches of neighbours in embedding space, other ones each epoch
            and in random order; or `sequential`.
        group: with the order `related`, each so many pairs of a batch are neighbours among themselves; a divisor of
            `pairs`, and all of them where not given.
        weights: of each source of the data, how often an epoch draws each of its examples; not sequential then.
        seed: of the shuffles.
        row_tokens: length of a row; where not given, multiples of `tokens_multiple`, as packs best.
        tokens_multiple: 64, or what devices that share a row can divide.
        row_segments: how many of the longest segments the longest of those rows may hold.
        rows_multiple: the number of rows of a batch is a multiple of this.
        once: leave the smaller pool's slots empty when it is used up, so that nothing is served twice; in sequential
            order only.
        own_rows: from the number of rows of a batch to the rows that this process fills; all where not given. The
            other rows of its batches stay empty.
        least_slots: for data sets that follow one another, so that what is compiled for one serves the next: rows are
            `rows_multiple` times a power of two, and with the pairing `grouped` an example has at least so many slots
            of each kind.

    Everything is served once an epoch; the last batch of an epoch is filled with invalid slots. All batches have
    the same number of slots and one of at most seven `shapes`: those that waste least on a sample of these very
    batches, and one that is proven to hold any of them. On Anthropic-HH (harmless-base, 512 tokens), 93 % of all
    positions hold a token at 64 pairs a batch, 96 % unpaired; at 8 pairs 86 % and 88 %.

    Raises ValueError for data that lacks what the arguments ask for, naming the row and the fix.
    """

    def __init__(
        self,
        data: PreferenceData,
        *,
        pairs: int,
        pairing: Literal["paired", "unpaired", "grouped"] = "paired",
        responses: Sequence[str] = ("chosen", "rejected"),
        order: Literal["shuffled", "related", "sequential"] = "shuffled",
        group: int | None = None,
        weights: Sequence[float] | None = None,
        seed: int,
        row_tokens: int | None = None,
        tokens_multiple: int = ROW_TOKENS_MULTIPLE,
        row_segments: int = 1,
        rows_multiple: int = 1,
        once: bool = False,
        own_rows: Callable[[int], Bool[np.ndarray, "R"]] | None = None,
        least_slots: int | None = None,
    ) -> None:
        assert not once or order == "sequential"
        assert weights is None or order != "sequential"
        _check_arguments(pairs, pairing, responses, order, rows_multiple, row_segments)
        _check_related(data, pairs, order, group)
        self.data = data
        self.pairs = pairs
        self.paired, self.grouped = pairing == "paired", pairing == "grouped"
        self.responses = tuple(name for name in KINDS if name in responses)
        self.order = order
        self.seed = seed
        self.once = once
        self.sizes = (pairs,) if group in (None, pairs) else (pairs, group)
        self._weights, self._least_slots = weights, least_slots
        self._permutation = lru_cache(maxsize=8 if weights is None else 8 + 4 * len(weights))(self._new_permutation)
        self._related = lru_cache(maxsize=2)(self._new_related)
        self._pools = self._build_pools()
        self.epoch_draws = max(pool.round for pool in self._pools.values())
        self.steps_per_epoch = -(-self.epoch_draws // pairs)
        self._row_lengths = self._checked_row_lengths(row_tokens, row_segments, tokens_multiple)
        self._rows_multiple = rows_multiple
        self._own_rows = own_rows
        self.plan_at = lru_cache(maxsize=4)(self._new_plan)  # asked for a batch, then for what to log of it

    @cached_property
    def shapes(self) -> tuple[PackedShape, ...]:
        """All shapes that a batch can have, ascending in size."""
        count = max(FEWEST_SAMPLED, min(SAMPLED_BATCHES, SAMPLED_PAIRS // self.pairs))
        # Where one epoch has fewer, shuffled anew there are more kinds of batches than one epoch shows.
        last = self.steps_per_epoch if self.order == "sequential" else max(self.steps_per_epoch, count)
        sample = np.unique(np.linspace(0, last - 1, count).astype(int))
        row_tokens = self._row_lengths[-1]
        segments = [(pool, tokens) for pool in self._pools.values() for tokens in pool.tokens]
        if self._least_slots is not None:
            most = -(-self.pairs * len(segments) // self._rows_multiple)
            return tuple(
                PackedShape(self._rows_multiple << power, row_tokens) for power in range(most.bit_length() + 1)
            )
        # No two rows of a first-fit packing fit into one, so k rows hold more than (k // 2) * row_tokens tokens.
        most_tokens = sum(self._most_tokens(*segment) for segment in segments)
        return choose_shapes(
            np.array([self._rows_needed(int(step)) for step in sample]),
            self._row_lengths,
            most_rows=min(self.pairs * len(segments), 2 * -(-most_tokens // row_tokens) - 1),
            multiple=self._rows_multiple,
        )

    def _most_tokens(self, pool: _Pool, tokens: Int[np.ndarray, "d"]) -> int:
        """Tokens that such segments of this pool hold in the worst batch."""
        repeats = pool.most_repeats
        if pool.round < self.epoch_draws and not self.once:
            # The smaller pool starts again within a batch: a draw may come once in each round that it touches. Of
            # neighbours a batch has those of all rounds of the epoch.
            places = self.epoch_draws if self.order == "related" else self.pairs
            repeats *= 1 + -(-places // pool.round)
        tokens = np.tile(tokens, repeats)
        return int(np.sort(tokens)[-self.pairs :].sum())

    def ready(self, step: int) -> bool:
        """Always: no batch depends on the steps before it."""
        return True

    def batch_at(self, step: int) -> Batch:
        """The batch of this step, counted from 0 over all epochs."""
        plan = self.plan_at(step)
        own_rows = None if self._own_rows is None else self._own_rows(plan.shape.rows)
        return fill_batch(plan, self.data, self._draws(step), own_rows)

    def _new_plan(self, step: int) -> PackingPlan:
        """Which segment goes where in the batch of this step: the same on every process."""
        return plan_batch(self.data, self._draws(step), self.shapes)

    def _draws(self, step: int) -> list[Draws]:
        """The response in each slot."""
        return [drawn for name, draws in self._indices(step).items() for drawn in self._pools[name].take(draws)]

    def _indices(self, step: int) -> dict[str, Int[np.ndarray, "S"]]:
        """Pool name -> draw of each slot, NO_RESPONSE past the end of the epoch."""
        assert step >= 0
        epoch, batch = divmod(step, self.steps_per_epoch)
        first = batch * self.pairs
        count = min(self.pairs, self.epoch_draws - first)
        indices = {}
        for name, pool in self._pools.items():
            index = np.full(self.pairs, NO_RESPONSE, np.int64)
            if self.order == "sequential":
                positions = first + np.arange(count)
                # Training compares something in every step; evaluation must not count a response twice.
                index[:count] = (
                    np.where(positions < pool.size, positions, NO_RESPONSE) if self.once else positions % pool.size
                )
            elif self.order == "related":
                index[:count] = self._related(epoch)[name][first : first + count]
            else:
                index[:count] = self._shuffled(name, epoch, first + np.arange(count))
            indices[name] = index
        return indices

    def _shuffled(self, name: str, epoch: int, places: Int[np.ndarray, "_"]) -> Int[np.ndarray, "_"]:
        """Draws at these places of an epoch."""
        # Counted over all epochs: the smaller pool goes round on its own.
        pool = self._pools[name]
        rounds, places = np.divmod(epoch * self.epoch_draws + places, pool.round)
        index = np.empty(len(places), np.int64)
        for number in np.unique(rounds).tolist():
            slots = np.flatnonzero(rounds == number)
            shuffled = self._permutation(name, pool.round, number)[places[slots]]
            index[slots] = pool.at(
                number, shuffled, lambda source, again, size: self._permutation(name, size, again, source)
            )
        return index

    def _new_related(self, epoch: int) -> dict[str, Int[np.ndarray, "_"]]:
        """Pool name -> the draws that the shuffled epoch would have, in the order of this one."""
        everything = np.arange(self.epoch_draws)
        streams = [self._shuffled(name, epoch, everything) for name in self._pools]
        points = [self._points[name] for name in self._pools]
        return dict(zip(self._pools, related_order(points, streams, self.sizes, (self.seed, epoch)), strict=True))

    @cached_property
    def _points(self) -> dict[str, Points]:
        """Pool name -> where each draw is placed; a pair by its two embeddings together."""
        embeddings, row = self.data.embeddings, self.data.embedding_row
        assert embeddings is not None
        assert row is not None
        points = {}
        for name, pool in self._pools.items():
            rows = [row[responses] for responses in pool.points()]
            if not any(
                (rows[0] != other).any() and (embeddings[rows[0]] != embeddings[other]).any() for other in rows[1:]
            ):
                rows = rows[:1]  # where prompts alone are embedded
            points[name] = whole_points(embeddings, *rows)
        return points

    def _new_permutation(self, pool: str, size: int, *numbers: int) -> Int[np.ndarray, "_"]:
        """Of a round, by its number, or of a source's draws, by how often it was gone round and the source's number."""
        first, *others = numbers
        return np.random.default_rng([self.seed, first, list(KINDS).index(pool), *others]).permutation(size)

    def _build_pools(self) -> dict[str, _Pool]:
        """A pool for the pairs, or one for each kind that others go with; by the name of the first of its kinds."""
        count, pools = len(self.data.examples), {}
        if self.grouped:
            return {"chosen": _PromptPool(self.data, self.responses, self._weights, self._least_slots or 1)}
        for name in ["chosen"] if self.paired else [name for name in self.responses if KINDS[name].slot_of == name]:
            kinds = [kind for kind in self.responses if self.paired or KINDS[kind].slot_of == name]
            numbers = {kind: self.data.of_kind(kind) for kind in {name, *kinds}}
            held = {kind: np.bincount(self.data.example_index[own], minlength=count) for kind, own in numbers.items()}
            drawn = np.ones(count, np.int64) if self.paired else held[name]
            if not drawn.sum():
                raise ValueError(f"None of the {count} examples has a {name} response; add rows that have one.")
            examples = np.repeat(np.arange(count), drawn)
            rank = np.arange(len(examples)) - (np.cumsum(drawn) - drawn)[examples]
            self._check_held(kinds, {kind: held[kind][examples] for kind in kinds}, examples)
            # The example's response of this kind and rank; its last one where it has fewer.
            first = {kind: np.cumsum(held[kind]) - held[kind] for kind in kinds}
            draws = {
                kind: numbers[kind][first[kind][examples] + np.minimum(rank, held[kind][examples] - 1)]
                for kind in kinds
            }
            pools[name] = _Pool(self.data, draws, self._weights)
        return pools

    def _check_held(
        self, kinds: Sequence[str], held: Mapping[str, Int[np.ndarray, "d"]], examples: Int[np.ndarray, "d"]
    ) -> None:
        """Raises ValueError for the first draw whose example has no response of one of the kinds."""
        lacking = [(int(np.argmin(held[kind] > 0)), kind) for kind in kinds if not held[kind].all()]
        if lacking:
            draw, kind = min(lacking, key=lambda pair: pair[0])
            fix = "give it one, or train on the responses apart with data.pairing: unpaired or grouped"
            if KINDS[kind].made_by is not None:
                fix = f"{KINDS[kind].made_by} before it is loaded"
            raise ValueError(f"{self.data.flat.row_ids[examples[draw]]} has no {kind} response; {fix}.")

    def _checked_row_lengths(self, row_tokens: int | None, row_segments: int, multiple: int) -> tuple[int, ...]:
        pool, tokens = max(
            ((pool, tokens) for pool in self._pools.values() for tokens in pool.tokens),
            key=lambda pair: pair[1].max(),
        )
        longest = int(tokens.max())
        if row_tokens is None:
            longest = max(pool.longest for pool in self._pools.values())
            return row_lengths(longest * row_segments, multiple)
        if longest > row_tokens:
            example = pool.examples[int(tokens.argmax())]
            raise ValueError(
                f"{self.data.flat.row_ids[example]} needs {longest} tokens for its prompt and responses, more "
                f"than batch.row_tokens={row_tokens}; raise it to {longest}, or lower data.max_tokens."
            )
        return (row_tokens,)

    def _rows_needed(self, step: int) -> list[int]:
        """Rows of this step's batch at each row length; 0 where one of its segments is longer."""
        segments = segments_of(self.data, self._draws(step))
        groups, longest = by_prompt(segments), longest_of(segments)
        return [pack_groups(groups, tokens)[-1] if tokens >= longest else 0 for tokens in self._row_lengths]


def _check_arguments(
    pairs: int, pairing: str, responses: Sequence[str], order: str, rows_multiple: int, row_segments: int
) -> None:
    if min(pairs, rows_multiple, row_segments) < 1:
        raise ValueError(f"{pairs=}, {rows_multiple=} and {row_segments=} must be at least 1.")
    for name, got, allowed in (("pairing", pairing, PAIRINGS), ("order", order, ORDERS)):
        if got not in allowed:
            raise ValueError(f"{name}={got!r} is unknown; use one of {', '.join(allowed)}.")
    if "chosen" not in responses or not set(responses) <= set(KINDS):
        raise ValueError(f"responses={tuple(responses)} must hold chosen, and none but {', '.join(KINDS)}.")
    if set(REFINED) & set(responses) and not {"rejected", *REFINED} <= set(responses):
        raise ValueError(
            f"responses={tuple(responses)} must hold rejected and both of {', '.join(REFINED)}, or neither."
        )


def _check_related(data: PreferenceData, pairs: int, order: str, group: int | None) -> None:
    if group is not None and (group < 1 or pairs % group):
        raise ValueError(f"{group=} does not divide the {pairs} pairs of a batch.")
    if order == "related" and data.examples and (data.embeddings is None or not data.embeddings.shape[1]):
        raise ValueError("order='related' puts neighbours in embedding space together, but the data has no embeddings.")
