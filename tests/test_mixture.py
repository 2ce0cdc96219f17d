"""Training data of several sources, as it is read for a run."""

import numpy as np
import pytest

from rpo_jax.runs.tracking import Reporter
from rpo_jax.training.prepare import batches_of, prepare
from tests.runs import configured, preference_rows, write_rows

SUMMARY = {
    "info": {"subreddit": "cats", "title": "My cat", "post": "It sits."},
    "summaries": [{"text": "It stands."}, {"text": "Cat sits."}],
    "choice": 1,
}


def mixed(folder, weights, **changes):
    return configured(
        "null",
        folder / "run",
        folder / "cache",
        {
            "data.mix": "{" + ", ".join(f"{path}: {weight}" for path, weight in weights.items()) + "}",
            "data.eval_rows": 0,
            "contrast.weights": "uniform",
            **changes,
        },
    )


def test_examples_know_their_source_whatever_is_skipped(tmp_path):
    rows = preference_rows(12)
    rows[3]["chosen"] = ""
    first = write_rows(tmp_path / "a.jsonl", rows[:8])
    second = write_rows(tmp_path / "b.jsonl", rows[8:])
    config = mixed(tmp_path, {first: 1, second: 2.5}, **{"data.on_bad_row": "skip", "data.train_rows": 6})
    prepared = prepare(config, Reporter(silent=True))
    names = [example.row_id.rpartition("/")[2] for example in prepared.train.examples]
    assert names == [*(f"a.jsonl:{line}" for line in (1, 2, 3, 5, 6, 7)), *(f"b.jsonl:{line}" for line in range(1, 5))]
    np.testing.assert_array_equal(prepared.train.source, [0] * 6 + [1] * 4)
    assert batches_of(config, prepared.train, prepared.responses, 1).epoch_draws == 6 + 10


def test_a_batch_of_a_mixture_has_all_responses_of_its_prompts(tmp_path):
    """Of 4 prompts once and of 6 twice; three answers to each, two of them bad."""
    rows = [
        {"prompt": f"What is {i}?", "responses": [f"{word} {i}." for word in ("Yes", "No", "Ah")], "scores": [3, 1, 1]}
        for i in range(10)
    ]
    sources = {write_rows(tmp_path / f"{i}.jsonl", some): 2**i for i, some in enumerate((rows[:4], rows[4:]))}
    config = mixed(tmp_path, sources, **{"data.pairing": "grouped", "batch.pairs": 8})
    prepared = prepare(config, Reporter(silent=True))
    batches = batches_of(config, prepared.train, prepared.responses, 1)
    assert batches.epoch_draws == 4 + 12
    drawn = [batches.batch_at(step).sides for step in range(batches.steps_per_epoch)]
    chosen, rejected = ([side[kind] for side in drawn] for kind in ("chosen", "rejected"))
    assert all(one.valid.sum() == 8 and two.valid.sum() == 16 for one, two in zip(chosen, rejected, strict=True))
    for one, two in zip(chosen, rejected, strict=True):
        np.testing.assert_array_equal(np.repeat(one.prompt_id, 2), two.prompt_id)
    seen = np.bincount(np.concatenate([one.example_index for one in chosen]), minlength=10)
    assert seen.tolist() == [1] * 4 + [2] * 6


def test_sources_that_are_cut_at_different_ends_are_refused_unless_it_is_said(tmp_path):
    paths = {
        write_rows(tmp_path / "pairs.jsonl"): 1,
        write_rows(tmp_path / "summaries.jsonl", [SUMMARY] * 4): 1,
    }
    with pytest.raises(ValueError, match=r"^data\.mix: .*pairs.jsonl .*summaries.jsonl .*set data\.truncation_side"):
        prepare(mixed(tmp_path, paths), Reporter(silent=True))
    prepared = prepare(mixed(tmp_path, paths, **{"data.truncation_side": "keep_start"}), Reporter(silent=True))
    assert np.bincount(prepared.train.source).tolist() == [32, 4]
