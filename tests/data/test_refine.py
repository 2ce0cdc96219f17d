"""Refined prompts, and responses once more under them: in the data, in batches, in a sweep for log-probs."""

from dataclasses import replace

import numpy as np
import pytest

from rpo_jax.core.records import KINDS, PreferenceData
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.data.reference_pass import ReferencePass
from rpo_jax.data.refine import refined
from rpo_jax.data.tokenize import PromptEncoder, TokenLimits, tokenize_examples
from rpo_jax.training.reference import tokens_fingerprint

from .ragged import changed, data_of, embedded, embeddings_of, examples_of_lengths, ids_of, pair, sequence

RESPONSES = ("chosen", "rejected", "refined_chosen", "refined_rejected")
TEXT = "Answer well. Query:"


def data(count=13, width=2):
    """Every token of the data a different one, but for those before all refined prompts."""
    made = examples_of_lengths(np.random.default_rng(0).integers(2, 12, (count, 4)).tolist())
    return data_of([with_refined(example) for example in made], width)


def with_refined(example):
    return changed(
        example,
        refined_prompt=np.concatenate([np.full(5, 9999, np.int32), example.prompt_ids]),
        refined_chosen=ids_of(example, "chosen"),
        refined_rejected=ids_of(example, "rejected")[:4],
    )


def examples(rows, **limits):
    return lambda tokenizer: tokenize_examples(
        [pair(*row, f"rows.jsonl:{i + 1}") for i, row in enumerate(rows)],
        tokenizer,
        TokenLimits(truncation_side="keep_end", **limits),
    )[0]


def test_the_text_stands_before_the_prompt_as_it_was_cut(tokenizer):
    rows = [("What is it?", "It is good.", None), ("one two three four " * 9, "a b c d e f g h", "five")]
    before = examples(rows, max_prompt_tokens=12, max_tokens=40)(tokenizer)
    after = refined(before, TEXT, tokenizer, 40)
    text = PromptEncoder(tokenizer, "auto", {}, None, "keep_end").encode(TEXT)
    bos = int(tokenizer.bos_token_id is not None)
    for one, other in zip(before, after, strict=True):
        plain_prompt, refined_prompt = other.prompts
        assert refined_prompt.tolist() == [*text.tolist(), *one.prompt_ids[bos:].tolist()]
        assert plain_prompt.tolist() == one.prompt_ids.tolist()
        assert [response.prompt for response in other.responses] == [0, 1] if one is before[0] else [0, 0, 1, 1]
        room = 40 - len(refined_prompt)
        assert ids_of(other, "refined_chosen").tolist() == ids_of(one, "chosen")[:room].tolist()
        assert ids_of(other, "chosen").tolist() == ids_of(one, "chosen").tolist()
    assert ids_of(after[0], "refined_rejected") is None
    assert len(ids_of(after[1], "refined_rejected"))


def test_no_room_for_a_response_is_told_with_the_row(tokenizer):
    made = examples([("What is it?", "good", "bad")], max_prompt_tokens=12, max_tokens=40)(tokenizer)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: objective\.sr_prompt .* data\.max_tokens=40 .* raise it"):
        refined(made, TEXT * 40, tokenizer, 40)


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_each_slot_holds_its_example_under_its_prompt(pairing):
    source = data()
    table = np.arange(13 * len(KINDS), dtype=np.float32).reshape(13, -1)
    source = embedded(source.examples, embeddings_of(source, "chosen"), embeddings_of(source, "rejected"), table)
    batches = PreferenceBatches(source, pairs=5, pairing=pairing, responses=RESPONSES, seed=2)
    for step in range(batches.steps_per_epoch):
        batch = batches.batch_at(step)
        assert batch.tokens.shape in [tuple(shape) for shape in batches.shapes]
        assert {kind: (at.start, at.stop) for kind, at in batch.slots().items()} == {
            kind: (first, first + 5) for first, kind in zip((0, 5, 10, 15), RESPONSES, strict=True)
        }
        for kind in ("chosen", "rejected"):
            plain, again = batch.sides[kind], batch.sides[f"refined_{kind}"]
            np.testing.assert_array_equal(plain.valid, again.valid)
            np.testing.assert_array_equal(plain.example_index, again.example_index)
        for kind, slots in batch.slots().items():
            side = batch.sides[kind]
            for slot in np.flatnonzero(side.valid):
                example = source.examples[side.example_index[slot]]
                prompt = example.prompts[kind.startswith("refined")]
                assert sequence(batch, slots.start + slot) == (prompt.tolist(), ids_of(example, kind).tolist())
                assert side.reference_log_prob[slot] == table[side.example_index[slot], list(KINDS).index(kind)]


@pytest.mark.parametrize("row_tokens", [None, 29])
def test_a_sweep_reaches_them_under_their_prompts(row_tokens):
    source = data(40)
    sweep = ReferencePass(source, RESPONSES, batch_pairs=8, row_tokens=row_tokens)
    reached = []
    for number in range(len(sweep)):
        batch, found = sweep.batch(number)
        for slot, index in enumerate(found):
            response, example = source.response(index), source.example_of(index)
            prompt = example.prompts[response.kind.startswith("refined")]
            assert sequence(batch, slot) == (prompt.tolist(), response.ids.tolist())
            reached.append((int(source.example_index[index]), response.kind))
    assert sorted(reached) == sorted((i, kind) for i in range(40) for kind in RESPONSES)


def test_a_cache_tells_texts_before_the_prompt_apart():
    source = data()
    examples = list(source.examples)
    plain, asking = examples[3].prompts
    examples[3] = replace(examples[3], prompts=(plain, asking + 1))
    other = PreferenceData(examples)
    assert tokens_fingerprint(source, "chosen") == tokens_fingerprint(other, "chosen")
    assert tokens_fingerprint(source, "refined_chosen") != tokens_fingerprint(other, "refined_chosen")


def test_sides_are_refined_both_or_not_at_all():
    with pytest.raises(ValueError, match="must hold rejected and both of refined_chosen, refined_rejected, or neither"):
        PreferenceBatches(data(), pairs=2, responses=("chosen", "rejected", "refined_chosen"), seed=0)
    plain = data_of(examples_of_lengths([(3, 4, 5, 2)] * 4))
    with pytest.raises(ValueError, match="file:1 has no refined_chosen response; refine the data's prompts"):
        PreferenceBatches(plain, pairs=2, responses=RESPONSES, seed=0)
