"""Ragged examples to rows of fixed shape, several to a row, each prompt stored once for all its responses.

Letters: R rows and T tokens of a batch; S response slots of one side; n segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from rpo_jax.core.records import KINDS, Batch, PreferenceData, Side
from rpo_jax.data.shapes import Shape

NO_EXAMPLE = -1


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


def share_prompts(groups: Sequence[Sequence[Segment]], row_tokens: int) -> list[Segment]:
    """Segments of one prompt joined into one, or into as many as it takes to stay within `row_tokens` each.

    A segment that is longer than that on its own stays as it is.
    """
    shared = []
    for first, *others in groups:
        shared.append(first)
        for segment in others:
            joined = shared[-1]._replace(responses=(*shared[-1].responses, *segment.responses))
            if joined.num_tokens <= row_tokens:
                shared[-1] = joined
            else:
                shared.append(segment)
    return shared


class Plan(NamedTuple):
    """Which segment of a batch goes where: the same on every process, from the segments' lengths alone."""

    segments: list[Segment]
    rows: Int[np.ndarray, "n"]
    starts: Int[np.ndarray, "n"]
    shape: Shape

    @property
    def num_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def efficiency(self) -> float:
        """Share of the R x T positions that hold a token."""
        return self.num_tokens / self.shape.size


def plan_batch(
    data: PreferenceData,
    chosen_index: Int[np.ndarray, "M"],
    rejected_index: Int[np.ndarray, "N"],
    *,
    paired: bool,
    mismatched: bool,
    refined: bool = False,
    shapes: Sequence[Shape],
) -> Plan:
    """Where the examples at these indices of `data` go; index -1 leaves its slot invalid.

    Slots are the chosen responses, the rejected ones, and, with `mismatched`, one for each chosen; with `refined`, the
    chosen and the rejected ones again. With `paired`, slot i of both sides is one example. All responses to one prompt
    share it, whichever slots they have, as far as a row holds them. Of `shapes`, the batch has the smallest that holds
    it, and of equal ones the one with the shortest rows, in which attention has least to skip.

    Raises ValueError for an example that no row holds.
    """
    segments = segments_of(data, chosen_index, rejected_index, paired=paired, mismatched=mismatched, refined=refined)
    longest = max((segment.num_tokens for segment in segments), default=0)
    for segment in segments:
        if segment.num_tokens > max(shape.tokens for shape in shapes):
            raise ValueError(
                f"{segment.row_id} needs {segment.num_tokens} tokens for its prompt and responses, more than "
                f"row_tokens={max(shape.tokens for shape in shapes)}; raise batch.row_tokens or lower data.max_tokens."
            )
    groups = by_prompt(segments)
    packed = {}
    for tokens in {shape.tokens for shape in shapes if shape.tokens >= longest}:
        shared = share_prompts(groups, tokens)
        packed[tokens] = shared, *pack([segment.num_tokens for segment in shared], tokens)
    holding = [shape for shape in shapes if shape.tokens in packed and packed[shape.tokens][-1] <= shape.rows]
    assert holding, "the last shape holds any batch"
    shape = min(holding, key=lambda shape: (shape.size, shape.tokens))
    shared, rows, starts, _ = packed[shape.tokens]
    return Plan(shared, rows, starts, shape)


def fill_batch(
    plan: Plan,
    data: PreferenceData,
    chosen_index: Int[np.ndarray, "M"],
    rejected_index: Int[np.ndarray, "N"],
    *,
    mismatched: bool,
    refined: bool = False,
    own_rows: Bool[np.ndarray, "R"] | None = None,
) -> Batch:
    """The Batch of a plan for the same examples; rows that are not among `own_rows` stay empty."""
    none = np.zeros(0, np.int64)
    return Batch(
        **layout(*plan, own_rows),
        chosen=_side(data, "chosen", chosen_index),
        rejected=_side(data, "rejected", rejected_index),
        mismatched=_side(data, "mismatched", chosen_index if mismatched else none),
        refined=(_side(data, "refined_chosen", chosen_index), _side(data, "refined_rejected", rejected_index))
        if refined
        else (),
    )


def segments_of(
    data: PreferenceData,
    chosen_index: Int[np.ndarray, "M"],
    rejected_index: Int[np.ndarray, "N"],
    *,
    paired: bool,
    mismatched: bool,
    refined: bool = False,
) -> list[Segment]:
    """A segment for each example (with `paired`) or each chosen and each rejected response, as for plan_batch.

    With `refined` there is another of each, with the refined prompt.
    """
    sizes = {"chosen": len(chosen_index), "rejected": len(rejected_index), "mismatched": mismatched * len(chosen_index)}
    of_chosen, of_rejected = ({"chosen", "mismatched"} if mismatched else {"chosen"}), {"rejected"}
    groups = [(of_chosen, of_rejected)]
    if refined:
        sizes |= {"refined_chosen": len(chosen_index), "refined_rejected": len(rejected_index)}
        groups.append(({"refined_chosen"}, {"refined_rejected"}))
    first = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
    segments = []
    for with_chosen, with_rejected in groups:
        if paired:
            assert not len(rejected_index) or np.array_equal(chosen_index, rejected_index)
            together = with_chosen | with_rejected if len(rejected_index) else with_chosen
            segments += _segments(data, chosen_index, {kind: first[kind] for kind in sizes if kind in together})
        else:
            segments += _segments(data, chosen_index, {kind: first[kind] for kind in sizes if kind in with_chosen})
            segments += _segments(data, rejected_index, {kind: first[kind] for kind in with_rejected})
    return segments


def _segments(data: PreferenceData, index: Int[np.ndarray, "S"], first: Mapping[str, int]) -> list[Segment]:
    """A segment for each of these examples; `first` are the kinds of its responses, and the first slot of each."""
    segments = []
    for slot, number in enumerate(index):
        if number != NO_EXAMPLE:
            example = data.examples[number]
            responses = tuple((start + slot, getattr(example, f"{kind}_ids")) for kind, start in first.items())
            segments.append(Segment(example.row_id, example.prompt_of(next(iter(first))), responses))
    return segments


def layout(
    segments: Sequence[Segment],
    rows: Int[np.ndarray, "n"],
    starts: Int[np.ndarray, "n"],
    shape: Shape,
    own_rows: Bool[np.ndarray, "R"] | None = None,
) -> dict[str, Int[np.ndarray, "R T"]]:
    """The token arrays of a Batch, computed for all segments' pieces (prompt or response) at once.

    Rows that are not among `own_rows` are zeros, which nobody reads and which take no memory until somebody does.
    """
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


def _side(data: PreferenceData, name: str, index: Int[np.ndarray, "S"]) -> Side:
    valid = index != NO_EXAMPLE
    examples = [data.examples[i] for i in index[valid]]
    embeddings = {"chosen": data.chosen_embeddings, "rejected": data.rejected_embeddings}
    # Others contrast nothing, or what these do: no embedding, no text id.
    width = data.chosen_embeddings.shape[1]
    embedding = np.zeros((len(index), width), np.float32)
    if name in embeddings:
        embedding[valid] = embeddings[name][index[valid]]
    reference = np.zeros(len(index), np.float32)
    if data.reference_log_probs is not None:
        reference[valid] = data.reference_log_probs[index[valid], KINDS.index(name)]
    prompt_id, text_id = np.full(len(index), -1, np.int32), np.full(len(index), -1, np.int32)
    prompt_id[valid] = [example.prompt_id for example in examples]
    if name in embeddings:
        text_id[valid] = [getattr(example, f"{name}_text_id") for example in examples]
    score = None
    if data.scores is not None and name in embeddings:
        score = np.zeros(len(index), np.float32)
        score[valid] = data.scores[index[valid], KINDS.index(name)]
    return Side(valid, reference, embedding, prompt_id, text_id, index.astype(np.int32), score)
