"""Prompts to answers: a seed for each prompt, end tokens and stop strings."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from rpo_jax.data.tokenizer import decode
from rpo_jax.sampling.engine import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenIds = Int[np.ndarray, "_"]


@dataclass(frozen=True)
class Answer:
    """A finished answer to a prompt.

    Attributes:
        index: of its prompt.
        text: without the end token, and up to the stop string that ended it.
        finish_reason: `eos`, `stop` for a stop string, `length` for the most tokens that it might have.
        tokens: that the text took, an end token included.
        ids: all that were sampled.
    """

    index: int
    text: str
    finish_reason: str
    tokens: int
    ids: Sequence[int] = field(default=(), repr=False, compare=False)


def prompt_seeds(prompts: Sequence[TokenIds], seed: int) -> list[int]:
    """A seed in [0, 2^32) for each prompt, from the prompt itself; one that comes again gets another."""
    seen: Counter[bytes] = Counter()
    seeds = []
    for ids in prompts:
        content = np.asarray(ids, np.int32).tobytes()
        digest = hashlib.sha256(f"{seed} {seen[content]} ".encode() + content).digest()
        seeds.append(int.from_bytes(digest[:4], "little"))
        seen[content] += 1
    return seeds


def batch_rows(batch_size: int, prompts: int, shards: int) -> int:
    """Rows of every batch: no more than a power of two that holds all prompts; a multiple of the shards."""
    rows = min(batch_size, 1 << max(prompts - 1, 0).bit_length())
    return -(-rows // shards) * shards


@dataclass(frozen=True)
class Answerer:
    """Answers prompts.

    Args:
        params: as rpo_jax.sampling.kv_cache.to_decode_layout gives them, on the engine's mesh.
        end_ids: tokens that end an answer.
        stop: texts that end an answer, and are no part of it.
        rows: of a batch.
    """

    engine: Engine
    params: Any
    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    stop: tuple[str, ...]
    rows: int

    def answers(
        self,
        prompts: Sequence[TokenIds],
        seeds: Sequence[int],
        limits: Sequence[int],
        wanted: Sequence[int],
        without: Sequence[TokenIds] | None = None,
    ) -> Iterator[list[Answer]]:
        """Answers to the wanted prompts, some at a time as they end; `without` is as for Engine.answers."""
        ended_answers = self.engine.answers(
            self.params,
            [prompts[index] for index in wanted],
            [seeds[index] for index in wanted],
            [limits[index] for index in wanted],
            self.rows,
            self._stopped if self.stop else None,
            None if without is None else [without[index] for index in wanted],
        )
        for ended in ended_answers:
            yield [self._answer(wanted[number], ids) for number, ids in ended]

    def _stopped(self, ids: list[int]) -> bool:
        return self._stop_at(self._text(ids)) is not None

    def _stop_at(self, text: str) -> int | None:
        """Where the first stop string begins."""
        return min((at for at in map(text.find, self.stop) if at >= 0), default=None)

    def _text(self, ids: Sequence[int]) -> str:
        return decode(self.tokenizer, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _answer(self, index: int, ids: list[int]) -> Answer:
        ended = bool(ids) and ids[-1] in self.end_ids
        text = self._text(ids[: len(ids) - ended])
        at = self._stop_at(text)
        if at is None:
            return Answer(index, text, "eos" if ended else "length", len(ids), ids)
        # More may have been sampled before the host looked.
        tokens = next(n for n in range(1, len(ids) + 1) if self._stop_at(self._text(ids[:n])) is not None)
        return Answer(index, text[:at], "stop", tokens, ids)
