"""Batches as a pure function of the step: nothing to save for a resume, the same on any number of hosts.

Letters: n examples of the data set; S slots of one side of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Int

from rpo_jax.data.packing import NO_EXAMPLE, build_batch, pack
from rpo_jax.types import RESPONSES, Batch, PreferenceData, TokenizedExample

ROW_TOKENS_MULTIPLE = 64
PAIRINGS = ("paired", "unpaired")
ORDERS = ("shuffled", "sequential")

# Row counts that batches are padded to: every one used is compiled. The quantiles are of the rows that a sample of the
# run's own batches needs, the last one with a margin for the rest of the run.
SAMPLED_BATCHES = 64
ROW_QUANTILES = (0.5, 0.9, 1.0)
ROW_MARGIN = 1.25
CLOSE_COUNTS = 1.06  # a shape that saves less than this is not worth its compilation


class PreferenceBatches:
    """Serves batches of a data set, each a pure function of (data, arguments, step).

    Args:
        data: the examples, with embeddings and, where computed, reference log-probs.
        pairs: slots of each side of a batch: M = pairs, N = pairs or 0, K = pairs or 0.
        pairing: `paired` gives slot i of every side to one example; `unpaired` draws chosen and rejected responses
            from two pools, shuffled apart, as many of each: the larger pool's size is the epoch, the smaller one starts
            again in a new order when it is used up; in sequential order its slots stay empty instead.
        responses: which of RESPONSES to load; mismatched slot i belongs to chosen slot i.
        order: `shuffled` anew each epoch, or `sequential`.
        seed: of the shuffles.
        row_tokens: length of a row; where not given, the longest segment rounded up to a multiple of 64.
        rows_multiple: the number of rows of a batch is a multiple of this.

    Every example is served once an epoch; the last batch of an epoch is filled with invalid slots. All batches have
    the same number of slots and one of at most five row counts, in ascending order in `row_counts`.

    Raises ValueError for data that lacks what the arguments ask for, naming the row and the fix.
    """

    def __init__(
        self,
        data: PreferenceData,
        *,
        pairs: int,
        pairing: Literal["paired", "unpaired"] = "paired",
        responses: Sequence[str] = ("chosen", "rejected"),
        order: Literal["shuffled", "sequential"] = "shuffled",
        seed: int,
        row_tokens: int | None = None,
        rows_multiple: int = 1,
    ) -> None:
        _check_arguments(pairs, pairing, responses, order, rows_multiple)
        assert len(data.examples) == len(data.chosen_embeddings) == len(data.rejected_embeddings)
        self.data = data
        self.pairs = pairs
        self.paired = pairing == "paired"
        self.responses = tuple(name for name in RESPONSES if name in responses)
        self.order = order
        self.seed = seed
        self._permutation = lru_cache(maxsize=8)(self._new_permutation)
        self._pools = self._build_pools()
        self.epoch_examples = max(len(pool) for pool in self._pools.values())
        self.steps_per_epoch = -(-self.epoch_examples // pairs)
        self._segment_tokens = {name: self._count_tokens(name) for name in self._pools}
        self.row_tokens = self._checked_row_tokens(row_tokens)
        self.row_counts = self._choose_row_counts(rows_multiple)

    def batch_at(self, step: int) -> Batch:
        """The batch of this step, counted from 0 over all epochs."""
        index = self._indices(step)
        none = np.zeros(0, np.int64)
        rejected = index["chosen" if self.paired else "rejected"] if "rejected" in self.responses else none
        return build_batch(
            self.data,
            index.get("chosen", none),
            rejected,
            paired=self.paired,
            mismatched="mismatched" in self.responses,
            row_tokens=self.row_tokens,
            row_counts=self.row_counts,
        )

    def _indices(self, step: int) -> dict[str, Int[np.ndarray, "S"]]:
        """Pool name -> example of each slot, NO_EXAMPLE past the end of the epoch."""
        assert step >= 0
        epoch, batch = divmod(step, self.steps_per_epoch)
        first = batch * self.pairs
        count = min(self.pairs, self.epoch_examples - first)
        # Counted over all epochs: the smaller pool goes round on its own.
        position = epoch * self.epoch_examples + first + np.arange(count)
        indices = {}
        for name, pool in self._pools.items():
            if self.order == "sequential":
                # A sweep has everything once: evaluation must not count the smaller pool's responses twice.
                here = first + np.arange(count)
                here = here[here < len(pool)]
                indices[name] = np.concatenate([pool[here], np.full(self.pairs - len(here), NO_EXAMPLE)])
                continue
            rounds, places = np.divmod(position, len(pool))
            index = np.full(self.pairs, NO_EXAMPLE, np.int64)
            for number in np.unique(rounds):
                here = np.flatnonzero(rounds == number)
                index[here] = pool[self._permutation(name, int(number))[places[here]]]
            indices[name] = index
        return indices

    def _new_permutation(self, pool: str, number: int) -> Int[np.ndarray, "_"]:
        size = len(self._pools[pool])
        return np.random.default_rng([self.seed, number, RESPONSES.index(pool)]).permutation(size)

    def _build_pools(self) -> dict[str, Int[np.ndarray, "_"]]:
        examples = self.data.examples
        if self.paired:
            pools = {"chosen": np.arange(len(examples))}
        else:
            pools = {
                name: np.array([i for i, example in enumerate(examples) if _ids(example, name) is not None], np.int64)
                for name in self.responses
                if name != "mismatched"
            }
        for name, pool in pools.items():
            if not len(pool):
                raise ValueError(f"None of the {len(examples)} examples has a {name} response; add rows that have one.")
            for index in pool.tolist():
                for response in self._responses_of(name):
                    _check_response(examples[index], response)
        return pools

    def _responses_of(self, pool: str) -> tuple[str, ...]:
        """The responses in a segment of this pool."""
        if self.paired:
            return self.responses
        return tuple(name for name in self.responses if (name == "rejected") == (pool == "rejected"))

    def _count_tokens(self, pool: str) -> Int[np.ndarray, "n"]:
        """Tokens of each example's segment in this pool; 0 for examples that are not in it."""
        tokens = np.zeros(len(self.data.examples), np.int64)
        for index in self._pools[pool].tolist():
            example = self.data.examples[index]
            responses = [_ids(example, name) for name in self._responses_of(pool)]
            tokens[index] = len(example.prompt_ids) + sum(len(ids) for ids in responses if ids is not None)
        return tokens

    def _checked_row_tokens(self, row_tokens: int | None) -> int:
        index = max((int(np.argmax(tokens)) for tokens in self._segment_tokens.values()), key=self._longest_at)
        longest = self._longest_at(index)
        if row_tokens is None:
            return -(-longest // ROW_TOKENS_MULTIPLE) * ROW_TOKENS_MULTIPLE
        if longest > row_tokens:
            raise ValueError(
                f"{self.data.examples[index].row_id} needs {longest} tokens for its prompt and responses, more than "
                f"batch.row_tokens={row_tokens}; raise it to {longest}, or lower data.max_tokens."
            )
        return row_tokens

    def _longest_at(self, index: int) -> int:
        return max(int(tokens[index]) for tokens in self._segment_tokens.values())

    def _choose_row_counts(self, multiple: int) -> tuple[int, ...]:
        sample = np.unique(np.linspace(0, self.steps_per_epoch - 1, SAMPLED_BATCHES).astype(int))
        needed = [self._rows_needed(int(step)) for step in sample]
        # No two rows of a first-fit packing fit into one, so k rows hold more than (k // 2) * row_tokens tokens.
        most_tokens = sum(int(np.sort(tokens)[-self.pairs :].sum()) for tokens in self._segment_tokens.values())
        bound = min(self.pairs * len(self._pools), 2 * -(-most_tokens // self.row_tokens) - 1)
        wanted = [*np.quantile(needed, ROW_QUANTILES), ROW_MARGIN * max(needed), bound]
        counts = sorted({multiple * -(-int(np.ceil(min(count, bound))) // multiple) for count in wanted})
        kept = counts[-1:]
        for count in reversed(counts[:-1]):
            if kept[0] >= CLOSE_COUNTS * count:
                kept.insert(0, count)
        return tuple(kept)

    def _rows_needed(self, step: int) -> int:
        indices = self._indices(step)
        lengths = [self._segment_tokens[name][index[index != NO_EXAMPLE]] for name, index in indices.items()]
        return pack(np.concatenate(lengths), self.row_tokens)[2]


def _ids(example: TokenizedExample, response: str) -> Int[np.ndarray, "_"] | None:
    return getattr(example, f"{response}_ids")


def _check_response(example: TokenizedExample, response: str) -> None:
    if _ids(example, response) is not None:
        return
    fix = (
        "tokenise the data with mismatched=True"
        if response == "mismatched"
        else "give it one, or train on the responses apart with data.pairing: unpaired"
    )
    raise ValueError(f"{example.row_id} has no {response} response; {fix}.")


def _check_arguments(pairs: int, pairing: str, responses: Sequence[str], order: str, rows_multiple: int) -> None:
    if pairs < 1 or rows_multiple < 1:
        raise ValueError(f"pairs={pairs} and rows_multiple={rows_multiple} must be at least 1.")
    for name, got, allowed in (("pairing", pairing, PAIRINGS), ("order", order, ORDERS)):
        if got not in allowed:
            raise ValueError(f"{name}={got!r} is unknown; use one of {', '.join(allowed)}.")
    if "chosen" not in responses or not set(responses) <= set(RESPONSES):
        raise ValueError(f"responses={tuple(responses)} must hold chosen, and none but {', '.join(RESPONSES)}.")
