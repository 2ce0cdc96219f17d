"""The records passed between rooms.

No jax here: `data/` fills these with NumPy arrays, the step receives the same tuples as device arrays.

Letters: R rows and T tokens of a packed batch; M chosen, N rejected and K mismatched responses; P = M + N + K
response slots, chosen first, then rejected, then mismatched, and M + N more where responses are scored once more
under a refined prompt; E embedding width; n examples of a data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Array = Any  # np.ndarray on the host, jax.Array on devices


class Row(NamedTuple):
    """One record of a source, before any layout is known."""

    values: Mapping[str, Any]
    file: str
    line: int  # 1-based: the line of a JSONL file, the element of a JSON list, the record of a table

    @property
    def row_id(self) -> str:
        return f"{self.file}:{self.line}"


class Message(NamedTuple):
    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A prompt with a chosen response, a rejected one, or both.

    prompt: a string is used as it is; messages go through the chat template, which opens the assistant's turn.
    scores: how good the data says that the chosen and the rejected response are; None where it was not asked.
    """

    row_id: str
    prompt: str | tuple[Message, ...]
    chosen: str | None
    rejected: str | None
    scores: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids of one example; the prompt is cut once, so that all its responses share it.

    prompt_ids start with BOS where the tokenizer has one; response ids end with EOS unless the response was cut.
    prompt_id numbers distinct prompts and the text ids distinct responses over a whole data set: two responses
    are the same text to the same prompt exactly if both ids are equal.
    """

    row_id: str
    prompt_ids: Int[np.ndarray, "_"]
    chosen_ids: Int[np.ndarray, "_"] | None
    rejected_ids: Int[np.ndarray, "_"] | None
    prompt_id: int
    chosen_text_id: int  # -1 where there is no such response
    rejected_text_id: int
    mismatched_ids: Int[np.ndarray, "_"] | None = None  # another example's response, for KTO's KL estimate
    refined_prompt_ids: Int[np.ndarray, "_"] | None = None  # the prompt after a text that asks for a good response
    refined_chosen_ids: Int[np.ndarray, "_"] | None = None  # the chosen response as far as it fits after that
    refined_rejected_ids: Int[np.ndarray, "_"] | None = None

    def prompt_of(self, kind: str) -> Int[np.ndarray, "_"]:
        """What a response of this kind follows."""
        ids = self.refined_prompt_ids if kind in REFINED else self.prompt_ids
        assert ids is not None, "whoever asks for refined responses has refined the prompts"
        return ids


RESPONSES = ("chosen", "rejected", "mismatched")
REFINED = ("refined_chosen", "refined_rejected")
KINDS = (*RESPONSES, *REFINED)  # slot order in a batch, column order in reference log-probs


@dataclass(frozen=True, slots=True)
class PreferenceData:
    """A data set ready to be packed.

    reference_log_probs: one column per name in KINDS, NaN where there is no such response; None until computed.
    Embeddings have width 0 where the objective needs none. scores: of the chosen and of the rejected response, NaN
    where there is none; None where the objective needs none.
    """

    examples: Sequence[TokenizedExample]
    chosen_embeddings: Float[np.ndarray, "n E"]
    rejected_embeddings: Float[np.ndarray, "n E"]
    reference_log_probs: Float[np.ndarray, "n K"] | None = None
    scores: Float[np.ndarray, "n 2"] | None = None


class Side(NamedTuple):
    """The responses of one kind in a batch; S is M, N or K. Slots that are not valid hold zeros, ids -1."""

    valid: Bool[Array, "S"]
    reference_log_prob: Float[Array, "S"]  # summed over scored tokens, nats
    embedding: Float[Array, "S E"]
    prompt_id: Int[Array, "S"]
    text_id: Int[Array, "S"]
    example_index: Int[Array, "S"]  # which example of the data set: for reports and caches
    score: Float[Array, "S"] | None = None  # of the response, by the data; None where nothing needs it


class Batch(NamedTuple):
    """A packed batch of fixed shape.

    A row holds segments one after another; a segment is a prompt (branch 0) followed by its responses (branches
    1, 2, ...). A token attends to earlier tokens of its own segment that are prompt or of its own branch.
    Positions count along a token's own sequence, so every branch continues where the prompt ended.
    """

    tokens: Int[Array, "R T"]
    positions: Int[Array, "R T"]
    segment_ids: Int[Array, "R T"]  # 1, 2, ... within a row; 0 is padding
    branch_ids: Int[Array, "R T"]
    previous: Int[Array, "R T"]  # index in the row of the token before it in its own sequence: its predictor
    response_ids: Int[Array, "R T"]  # slot of the response that a scored token belongs to; -1 elsewhere
    chosen: Side
    rejected: Side
    mismatched: Side
    refined: tuple[Side, ...] = ()  # chosen and rejected once more, under refined prompts; empty where not needed

    @property
    def sides(self) -> tuple[Side, ...]:
        """All of them, in the order of their slots."""
        return (self.chosen, self.rejected, self.mismatched, *self.refined)

    def with_sides(self, sides: Sequence[Side]) -> Batch:
        return self._replace(chosen=sides[0], rejected=sides[1], mismatched=sides[2], refined=tuple(sides[3:]))
