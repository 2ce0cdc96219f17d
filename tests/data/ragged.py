"""Ragged examples for tests of the data path and of what stands on it, and the way back from a batch to sequences."""

import dataclasses

import numpy as np

from rpo_jax.core.records import (
    KINDS,
    Batch,
    PreferenceData,
    PreferenceExample,
    Response,
    TokenizedExample,
    TokenizedResponse,
)

RESPONSES = ("chosen", "rejected", "mismatched")


def pair(prompt, chosen, rejected, row_id="file:1") -> PreferenceExample:
    """A prompt with a chosen and a rejected response; None for one that is not there."""
    texts = {"chosen": chosen, "rejected": rejected}
    return PreferenceExample(row_id, prompt, tuple(Response(*one) for one in texts.items() if one[1] is not None))


def text_of(example: PreferenceExample, kind: str) -> str | None:
    response = example.first(kind)
    return None if response is None else response.text


def ids(values) -> np.ndarray | None:
    return None if values is None else np.array(values, np.int32)


def example(row_id, prompt, chosen, rejected, mismatched=None, number=0) -> TokenizedExample:
    """An example with one response of each kind; None for one that is not there."""
    tokens = {"chosen": chosen, "rejected": rejected, "mismatched": mismatched}
    text_ids = (2 * number, 2 * number + 1, -1)
    responses = [
        TokenizedResponse(kind, ids(of_kind), text_id)
        for (kind, of_kind), text_id in zip(tokens.items(), text_ids, strict=True)
        if of_kind is not None
    ]
    return TokenizedExample(row_id, number, (ids(prompt),), tuple(responses))


def ids_of(example: TokenizedExample, kind: str) -> np.ndarray | None:
    return next((response.ids for response in example.responses if response.kind == kind), None)


def changed(example: TokenizedExample, **of_kinds) -> TokenizedExample:
    """The example with other token ids: of `prompt`, `refined_prompt` or a kind of response, None to take it away."""
    prompts = [of_kinds.pop("prompt", example.prompt_ids), *example.prompts[1:]]
    if "refined_prompt" in of_kinds:
        prompts[1:] = [of_kinds.pop("refined_prompt")]
    responses = {response.kind: response for response in example.responses}
    for kind, of_kind in of_kinds.items():
        known = responses.pop(kind, TokenizedResponse(kind, of_kind, prompt=int(KINDS[kind].refines is not None)))
        if of_kind is not None:
            responses[kind] = known._replace(ids=of_kind)
    ordered = tuple(responses[kind] for kind in KINDS if kind in responses)
    return dataclasses.replace(example, prompts=tuple(prompts), responses=ordered)


def embedded(examples, chosen, rejected=None, reference=None, scores=None) -> PreferenceData:
    """Data with an embedding for each example's chosen and each one's rejected responses; one for both without those.

    reference, scores: a row for each example, a column for each of KINDS as far as there are columns.
    """
    embeddings = chosen if rejected is None else np.concatenate([chosen, rejected])
    first = {"chosen": 0, "rejected": 0 if rejected is None else len(chosen)}
    data = PreferenceData(examples)
    rows = [
        first[response.kind] + index if response.kind in first else -1
        for response, index in zip(map(data.response, range(data.num_responses)), data.example_index, strict=True)
    ]
    flat = (None if table is None else flattened(data, table) for table in (reference, scores))
    return PreferenceData(examples, embeddings, np.array(rows, np.int64), *flat)


def flattened(data: PreferenceData, table) -> np.ndarray:
    """Values of all responses from a table with a row for each example and columns in the order of KINDS; else NaN."""
    padded = np.full((len(table), len(KINDS)), np.nan, np.float32)
    padded[:, : np.shape(table)[1]] = table
    return padded[data.example_index, data.flat.kind]


def table_of(data: PreferenceData, values, kinds=tuple(KINDS)) -> np.ndarray:
    """The way back: a row for each example, a column for each kind, NaN where an example has no such response."""
    table = np.full((len(data.examples), len(kinds)), np.nan, np.float32)
    for column, kind in enumerate(kinds):
        numbers = data.of_kind(kind)
        table[data.example_index[numbers], column] = values[numbers]
    return table


def embeddings_of(data: PreferenceData, kind: str) -> np.ndarray:
    return data.embeddings[data.embedding_row[data.of_kind(kind)]]


def examples_of_lengths(lengths) -> list[TokenizedExample]:
    """One example per (prompt, chosen, rejected, mismatched) lengths, every token of the data a different one."""
    made, first = [], 1
    for number, sizes in enumerate(lengths):
        tokens = []
        for size in sizes:
            tokens.append(None if size is None else np.arange(first, first + size))
            first += size or 0
        made.append(example(f"file:{number + 1}", *tokens, number=number))
    return made


def data_of(examples, width=0) -> PreferenceData:
    embeddings = np.random.default_rng(0).normal(size=(2, len(examples), width)).astype(np.float32)
    return embedded(examples, *embeddings)


def sequence(batch: Batch, slot: int) -> tuple[list[int], list[int]]:
    """(prompt tokens, response tokens) of a response slot, found by walking `previous` from its last token."""
    row, columns = np.nonzero(batch.response_ids == slot)
    assert len(set(row)) == 1, "a response lies in one row"
    row, column = row[0], columns[-1]
    segment, branch = batch.segment_ids[row, column], batch.branch_ids[row, column]
    walked = []
    while True:
        walked.append(column)
        assert batch.segment_ids[row, column] == segment
        assert batch.branch_ids[row, column] in (0, branch)
        if batch.previous[row, column] == column:
            break
        column = batch.previous[row, column]
    walked = walked[::-1]
    assert batch.positions[row, walked].tolist() == list(range(len(walked)))
    scored = batch.response_ids[row, walked] == slot
    assert scored.tolist() == sorted(scored), "the prompt comes before the response"
    assert scored.sum() == len(columns), "every scored token is on the walk"
    tokens = batch.tokens[row, walked]
    return tokens[~scored].tolist(), tokens[scored].tolist()
