"""Refined prompts, and responses once more under them: in the data, in batches, in a sweep for log-probs."""

import dataclasses

import numpy as np
import pytest

from rpo_jax.core.records import KINDS, PreferenceData, PreferenceExample
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.data.refine import refined
from rpo_jax.data.sweep import Sweep
from rpo_jax.data.tokenize import encode_prompts, tokenize_examples
from rpo_jax.training.reference import tokens_fingerprint

from .ragged import data_of, examples_of_lengths, sequence

RESPONSES = ("chosen", "rejected", "refined_chosen", "refined_rejected")
TEXT = "Answer well. Query:"


def data(count=13, width=2):
    """Every token of the data a different one, but for those before all refined prompts."""
    made = examples_of_lengths(np.random.default_rng(0).integers(2, 12, (count, 4)).tolist())
    return data_of([with_refined(example) for example in made], width)


def with_refined(example):
    return dataclasses.replace(
        example,
        refined_prompt_ids=np.concatenate([np.full(5, 9999, np.int32), example.prompt_ids]),
        refined_chosen_ids=example.chosen_ids,
        refined_rejected_ids=example.rejected_ids[:4],
    )


def examples(rows, **limits):
    return lambda tokenizer: tokenize_examples(
        [PreferenceExample(f"rows.jsonl:{i + 1}", *row) for i, row in enumerate(rows)],
        tokenizer,
        truncation_side="keep_end",
        **limits,
    )[0]


def test_the_text_stands_before_the_prompt_as_it_was_cut(tokenizer):
    rows = [("What is it?", "It is good.", None), ("one two three four " * 9, "a b c d e f g h", "five")]
    before = examples(rows, max_prompt_tokens=12, max_tokens=40)(tokenizer)
    after = refined(before, TEXT, tokenizer, 40)
    (text,) = encode_prompts([TEXT], tokenizer)
    bos = int(tokenizer.bos_token_id is not None)
    for one, other in zip(before, after, strict=True):
        assert other.refined_prompt_ids.tolist() == [*text.tolist(), *one.prompt_ids[bos:].tolist()]
        assert other.prompt_of("chosen") is one.prompt_ids
        assert other.prompt_of("refined_rejected") is other.refined_prompt_ids
        room = 40 - len(other.refined_prompt_ids)
        assert other.refined_chosen_ids.tolist() == one.chosen_ids[:room].tolist()
        assert other.chosen_ids is one.chosen_ids
    assert after[0].refined_rejected_ids is None
    assert len(after[1].refined_rejected_ids)


def test_no_room_for_a_response_is_told_with_the_row(tokenizer):
    made = examples([("What is it?", "good", "bad")], max_prompt_tokens=12, max_tokens=40)(tokenizer)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: objective\.sr_prompt .* data\.max_tokens=40 .* raise it"):
        refined(made, TEXT * 40, tokenizer, 40)


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_each_slot_holds_its_example_under_its_prompt(pairing):
    source = data()
    table = np.arange(13 * len(KINDS), dtype=np.float32).reshape(13, -1)
    source = PreferenceData(source.examples, source.chosen_embeddings, source.rejected_embeddings, table)
    batches = PreferenceBatches(source, pairs=5, pairing=pairing, responses=RESPONSES, seed=2)
    for step in range(batches.steps_per_epoch):
        batch = batches.batch_at(step)
        assert batch.tokens.shape in [tuple(shape) for shape in batches.shapes]
        assert [side.valid.size for side in batch.sides] == [5, 5, 0, 5, 5]
        for plain, again in zip((batch.chosen, batch.rejected), batch.refined, strict=True):
            np.testing.assert_array_equal(plain.valid, again.valid)
            np.testing.assert_array_equal(plain.example_index, again.example_index)
        for first, kind, side in zip(
            (0, 5, 10, 15), RESPONSES, (batch.chosen, batch.rejected, *batch.refined), strict=True
        ):
            for slot in np.flatnonzero(side.valid):
                example = source.examples[side.example_index[slot]]
                expected = example.prompt_of(kind).tolist(), getattr(example, f"{kind}_ids").tolist()
                assert sequence(batch, first + slot) == expected
                assert side.reference_log_prob[slot] == table[side.example_index[slot], KINDS.index(kind)]


@pytest.mark.parametrize("row_tokens", [None, 29])
def test_a_sweep_reaches_them_under_their_prompts(row_tokens):
    source = data(40)
    sweep = Sweep(source, RESPONSES, batch_pairs=8, row_tokens=row_tokens)
    reached = []
    for number in range(len(sweep)):
        batch, indices, columns = sweep.call(number)
        for slot, (index, column) in enumerate(zip(indices, columns, strict=True)):
            example, kind = source.examples[index], KINDS[column]
            assert sequence(batch, slot) == (
                example.prompt_of(kind).tolist(),
                getattr(example, f"{kind}_ids").tolist(),
            )
            reached.append((int(index), kind))
    assert sorted(reached) == sorted((i, kind) for i in range(40) for kind in RESPONSES)


def test_a_cache_tells_texts_before_the_prompt_apart():
    source, other = data(), data()
    other.examples[3].refined_prompt_ids[0] += 1
    assert tokens_fingerprint(source, "chosen") == tokens_fingerprint(other, "chosen")
    assert tokens_fingerprint(source, "refined_chosen") != tokens_fingerprint(other, "refined_chosen")


def test_sides_are_refined_both_or_not_at_all():
    with pytest.raises(ValueError, match="must hold rejected and both of refined_chosen, refined_rejected, or neither"):
        PreferenceBatches(data(), pairs=2, responses=("chosen", "rejected", "refined_chosen"), seed=0)
    plain = data_of(examples_of_lengths([(3, 4, 5, 2)] * 4))
    with pytest.raises(ValueError, match="file:1 has no refined_chosen response; refine the data's prompts"):
        PreferenceBatches(plain, pairs=2, responses=RESPONSES, seed=0)
