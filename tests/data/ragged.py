"""Ragged examples for the packer's and the loader's tests, and the way back from a batch to sequences."""

import numpy as np

from rpo_jax.core.records import Batch, PreferenceData, TokenizedExample


def ids(values) -> np.ndarray | None:
    return None if values is None else np.array(values, np.int32)


def example(row_id, prompt, chosen, rejected, mismatched=None, number=0) -> TokenizedExample:
    text_ids = [-1 if tokens is None else 2 * number + side for side, tokens in enumerate((chosen, rejected))]
    return TokenizedExample(row_id, ids(prompt), ids(chosen), ids(rejected), number, *text_ids, ids(mismatched))


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
    return PreferenceData(examples, embeddings[0], embeddings[1])


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
