"""Ragged examples to rows of fixed shape, several to a row, each prompt stored once for all its responses.

Letters: R rows and T tokens of a batch; S response slots of one kind; n segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from rpo_jax.core.records import KINDS, Batch, PreferenceData, Side
from rpo_jax.data.shapes import PackedShape

NO_RESPONSE = -1

# Responses by kind, by their numbers in the data, NO_RESPONSE for a slot that stays empty: slot i of all kinds is what
# is drawn together, and shares a segment where it shares a prompt.
Draws = dict[str, Int[np.ndarray, "S"]]


class Segment(NamedTuple):
    """One prompt and the responses that share it: (slot in the batch, token ids), branches 1, 2, ... in this order."""

    row_id: str
    prompt_ids: Int[np.ndarray, "_"]
    responses: tuple[tuple[int, Int[np.ndarray, "_"]], ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(len(ids) for _, ids in self.responses)


def pack(
    lengths: Sequence[int] | Int[np.ndarray, "n"], row_tokens: int
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"], int]:
    """First-fit-decreasing: (row of each segment, its first column, number of rows).

    Longest first, ties in the order given; each goes to the first row with room, so at most one row is less than
    half full. Lengths must not exceed `row_tokens`.
    """
    lengths = np.asarray(lengths, np.int64)
    assert lengths.max(initial=0) <= row_tokens
    rows, starts = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    free = np.full(len(lengths) + 1, row_tokens, np.int64)
    num_rows = 0
    for index in np.argsort(-lengths, kind="stable"):
        row = int(np.argmax(free[: num_rows + 1] >= lengths[index]))
        rows[index], starts[index] = row, row_tokens - free[row]
        free[row] -= lengths[index]
        num_rows = max(num_rows, row + 1)
    return rows, starts, num_rows


def by_prompt(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments with the same prompt token ids together, in order of first appearance.

    The ids, not the prompt's text: two texts that are cut to the same ids can share, one text that is cut to
    different ids cannot.
    """
    groups: dict[bytes, list[Segment]] = {}
    for segment in segments:
        groups.setdefault(segment.prompt_ids.tobytes(), []).append(segment)
    return list(groups.values())


def pack_groups(
    groups: Sequence[Sequence[Segment]], row_tokens: int
) -> tuple[list[Segment], Int[np.ndarray, "n"], Int[np.ndarray, "n"], int]:
    """Each group of segments that share a prompt joined into one, or into as many as it takes to stay within
    `row_tokens` each; and where `pack` puts the joined ones."""
    shared: list[Segment] = []
    for first, *others in groups:
        shared.append(first)
        for segment in others:
            joined = shared[-1]._replace(responses=(*shared[-1].responses, *segment.responses))
            if joined.num_tokens <= row_tokens:
                shared[-1] = joined
            else:
                shared.append(segment)
    return shared, *pack([segment.num_tokens for segment in shared], row_tokens)


class PackingPlan(NamedTuple):
    """Which segment of a batch goes where: the same on every process, from the segments' lengths alone."""

    segments: list[Segment]
    rows: Int[np.ndarray, "n"]
    starts: Int[np.ndarray, "n"]
    shape: PackedShape

    @property
    def num_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def efficiency(self) -> float:
        """Share of the R x T positions that hold a token."""
        return self.num_tokens / self.shape.size


def plan_batch(data: PreferenceData, draws: Sequence[Draws], shapes: Sequence[PackedShape]) -> PackingPlan:
    """Where the responses of a batch go.

    All responses to one prompt share it, whichever slots they have, as far as a row holds them. Of `shapes`, the batch
    has the smallest that holds it, and of equal ones the one with the shortest rows, in which attention has least to
    skip.

    Args:
        draws: each kind in one of them.

    Raises ValueError for an example that no row holds.
    """
    segments = segments_of(data, draws)
    longest, row_tokens = longest_of(segments), max(shape.tokens for shape in shapes)
    for segment in segments:
        if segment.num_tokens > row_tokens:
            raise ValueError(
                f"{segment.row_id} needs {segment.num_tokens} tokens for its prompt and responses, more than "
                f"row_tokens={row_tokens}; raise batch.row_tokens or lower data.max_tokens."
            )
    groups = by_prompt(segments)
    packed = {tokens: pack_groups(groups, tokens) for tokens in {s.tokens for s in shapes if s.tokens >= longest}}
    holding = [shape for shape in shapes if shape.tokens in packed and packed[shape.tokens][-1] <= shape.rows]
    assert holding, "the last shape holds any batch"
    shape = min(holding, key=lambda shape: (shape.size, shape.tokens))
    shared, rows, starts, _ = packed[shape.tokens]
    return PackingPlan(shared, rows, starts, shape)


def fill_batch(
    plan: PackingPlan, data: PreferenceData, draws: Sequence[Draws], own_rows: Bool[np.ndarray, "R"] | None = None
) -> Batch:
    """The batch of the same draws; rows that are not among `own_rows` stay empty."""
    sides = {kind: _side(data, kind, responses) for drawn in draws for kind, responses in drawn.items()}
    return Batch(**token_arrays(plan, own_rows), sides=sides)


def segments_of(data: PreferenceData, draws: Sequence[Draws]) -> list[Segment]:
    """A segment for each slot of each of the draws and each prompt that its responses follow, the plain prompts first.

    Responses are numbered by their slots in a batch, those of the first of KINDS first.
    """
    drawn = {kind: (number, responses) for number, kinds in enumerate(draws) for kind, responses in kinds.items()}
    places, first = [], 0
    for kind in KINDS:
        if kind in drawn:
            number, responses = drawn[kind]
            used = enumerate(responses.tolist())
            places += [((number, slot), index, first + slot) for slot, index in used if index != NO_RESPONSE]
            first += len(responses)
    return [segment for _, segment in sorted(segments_by(data, places).items(), key=lambda item: item[0])]


def segments_by(
    data: PreferenceData, places: Iterable[tuple[tuple[int, ...], int, int]]
) -> dict[tuple[int, tuple[int, ...], int], Segment]:
    """Responses in segments by (prompt, key, example).

    Args:
        places: (key, response of the data, its number in the segment).
    """
    segments: dict[tuple[int, tuple[int, ...], int], Segment] = {}
    for key, index, number in places:
        response, of = data.response(index), int(data.example_index[index])
        segment = segments.get((response.prompt, key, of))
        segment = segment or Segment(data.flat.row_ids[of], data.flat.prompt_of(index), ())
        segments[response.prompt, key, of] = segment._replace(responses=(*segment.responses, (number, response.ids)))
    return segments


def longest_of(segments: Sequence[Segment]) -> int:
    """Tokens of the longest segment."""
    return max((segment.num_tokens for segment in segments), default=0)


def token_arrays(plan: PackingPlan, own_rows: Bool[np.ndarray, "R"] | None = None) -> dict[str, Int[np.ndarray, "R T"]]:
    """The token arrays of a Batch, computed for all segments' pieces (prompt or response) at once.

    Rows that are not among `own_rows` are zeros, which nobody reads and which take no memory until somebody does.
    """
    segments, rows, starts, shape = plan
    names = ("tokens", "positions", "segment_ids", "branch_ids", "previous", "response_ids")
    arrays = {name: np.zeros(shape, np.int32) for name in names}
    arrays["response_ids"][slice(None) if own_rows is None else own_rows] = -1
    if own_rows is not None:
        mine = own_rows[rows]
        segments = [segment for segment, kept in zip(segments, mine, strict=True) if kept]
        rows, starts = rows[mine], starts[mine]
    if not segments:
        return arrays
    pieces = []  # token ids; and (segment, branch, slot, column, position of the first token, predecessor's column)
    facts = []
    for number, (segment, start) in enumerate(zip(segments, starts, strict=True)):
        prompt_tokens = len(segment.prompt_ids)
        pieces.append(segment.prompt_ids)
        facts.append((number, 0, -1, start, 0, start))
        column = start + prompt_tokens
        for branch, (slot, ids) in enumerate(segment.responses, start=1):
            pieces.append(ids)
            facts.append((number, branch, slot, column, prompt_tokens, start + prompt_tokens - 1))
            column += len(ids)

    piece_tokens = np.array([len(piece) for piece in pieces])
    per_token = np.repeat(np.array(facts).T, piece_tokens, axis=1)
    segment, branch, slot, first_column, first_position, predecessor = per_token
    offset = np.arange(piece_tokens.sum()) - np.repeat(np.cumsum(piece_tokens) - piece_tokens, piece_tokens)
    where = rows[segment], first_column + offset
    arrays["tokens"][where] = np.concatenate(pieces)
    arrays["positions"][where] = first_position + offset
    arrays["segment_ids"][where] = _number_within_rows(rows, starts)[segment]
    arrays["branch_ids"][where] = branch
    arrays["previous"][where] = np.where(offset == 0, predecessor, first_column + offset - 1)
    arrays["response_ids"][where] = slot
    return arrays


def _number_within_rows(rows: Int[np.ndarray, "n"], starts: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """1, 2, ... for the segments of each row, from left to right."""
    order = np.lexsort((starts, rows))
    _, first, count = np.unique(rows[order], return_index=True, return_counts=True)
    numbers = np.zeros(len(rows), np.int64)
    numbers[order] = np.arange(len(rows)) - np.repeat(first, count) + 1
    return numbers


def _side(data: PreferenceData, kind: str, responses: Int[np.ndarray, "S"]) -> Side:
    valid = responses != NO_RESPONSE
    numbers = responses[valid]
    examples = data.example_index[numbers]

    def spread(values: Shaped[np.ndarray, "V ..."], dtype: type, empty: int = 0) -> Shaped[np.ndarray, "S ..."]:
        whole = np.full((len(responses), *values.shape[1:]), empty, dtype)
        whole[valid] = values
        return whole

    known, scores = data.reference_log_probs, data.scores if KINDS[kind].made_by is None else None
    return Side(
        valid=valid,
        reference_log_prob=spread(np.zeros(len(numbers)) if known is None else known[numbers], np.float32),
        embedding=spread(_embeddings(data, numbers), np.float32),
        prompt_id=spread(data.flat.prompt_id[examples], np.int32, -1),
        text_id=spread(data.flat.text_id[numbers], np.int32, -1),
        example_index=spread(examples, np.int32, -1),
        score=None if scores is None else spread(scores[numbers], np.float32),
        row_values={name: spread(of[numbers], np.float32) for name, of in data.row_values.items()} or None,
    )


def _embeddings(data: PreferenceData, numbers: Int[np.ndarray, "V"]) -> Float[np.ndarray, "V E"]:
    """What goes with these responses; zeros where nothing does."""
    if data.embeddings is None or data.embedding_row is None:
        return np.zeros((len(numbers), 0), np.float32)
    rows = data.embedding_row[numbers]
    return np.where(rows[:, None] < 0, np.float32(0), data.embeddings[rows])
