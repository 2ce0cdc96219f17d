"""Scores of the data's responses, from a column to the loss: read, checked, packed, trained on."""

import numpy as np
import pytest

import rpo_jax
from rpo_jax import train
from rpo_jax.core.records import Row
from rpo_jax.data.examples import make_examples
from rpo_jax.data.faults import BadRow
from rpo_jax.data.loader import PreferenceBatches
from tests.data.ragged import embedded, embeddings_of
from tests.runs import configured, metric_lines, preference_rows, settings, write_rows
from tests.worlds import random_data

COLUMNS = {"chosen": "score_chosen", "rejected": "score_rejected"}


def scored_rows():
    return [
        {**row, "score_chosen": 5.0 + i % 3, "score_rejected": 1 + i % 2} for i, row in enumerate(preference_rows())
    ]


def rows_of(values):
    return [Row(row, "made.jsonl", i + 1) for i, row in enumerate(values)]


def scores_of(example):
    return [response.score for response in example.responses]


def test_a_rows_columns_become_its_responses_scores():
    found = make_examples(rows_of(scored_rows()), scores=COLUMNS).examples
    assert [scores_of(example) for example in found[:3]] == [[5.0, 1.0], [6.0, 2.0], [7.0, 1.0]]
    assert make_examples(rows_of(scored_rows())).examples[0].responses[0].score is None


def test_a_score_is_a_weighted_sum_of_columns():
    rows = [{**row, "help": 8, "brief": 0.5} for row in scored_rows()]
    found = make_examples(rows_of(rows), scores={"chosen": {"help": 0.25, "brief": -1}, "rejected": "brief"}).examples
    assert [scores_of(example) for example in found[:2]] == [[1.5, 0.5]] * 2
    with pytest.raises(ValueError, match="column 'gone' is missing"):
        make_examples(rows_of(rows), scores={"chosen": {"help": 1, "gone": 1}, "rejected": "brief"})
    config = rpo_jax.load_config(None, ["data.chosen_score={help: 0.25, brief: -1}", "data.rejected_score=brief"])
    assert (config.data.chosen_score, config.data.rejected_score) == ({"help": 0.25, "brief": -1.0}, "brief")
    for wrong in ("{}", "{help: .inf}"):
        with pytest.raises(ValueError, match="chosen_score"):
            rpo_jax.load_config(None, [f"data.chosen_score={wrong}"])


def test_a_response_of_its_own_needs_its_own_score_alone():
    labelled = [
        {"prompt": "a?", "completion": "b", "label": True, "score": 2.5},
        {"prompt": "a?", "completion": "c", "label": False, "score": -1},
    ]
    found = make_examples(rows_of(labelled), scores=dict.fromkeys(COLUMNS, "score")).examples
    assert [scores_of(example) for example in found] == [[2.5], [-1.0]]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "column 'score_chosen' is null"),
        ("high", "column 'score_chosen' does not hold a number: got str"),
        (True, "column 'score_chosen' does not hold a number: got bool"),
        (float("inf"), "column 'score_chosen' does not hold a finite number: got inf"),
    ],
)
def test_what_is_no_score_makes_the_row_unusable(value, reason):
    rows = scored_rows()
    rows[4]["score_chosen"] = value
    with pytest.raises(ValueError, match=r"made\.jsonl:5: .*1 of 32 rows") as told:
        make_examples(rows_of(rows), scores=COLUMNS)
    assert reason in str(told.value)
    assert len(make_examples(rows_of(rows), on_bad_row="skip", scores=COLUMNS).examples) == 31
    unreadable = [*rows_of(rows[:4]), BadRow("made.jsonl:9", "not JSON"), *rows_of(rows[5:])]
    assert len(make_examples(unreadable, on_bad_row="skip", scores=COLUMNS).examples) == 31


def test_rows_that_are_joined_have_no_scores():
    messages = [{"message_id": "1", "parent_id": None, "text": "a", "role": "prompter", "rank": None}]
    with pytest.raises(ValueError, match="'oasst1' makes an example of several rows, so no row scores"):
        make_examples(rows_of(messages), scores=COLUMNS)


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_every_slot_of_a_batch_has_its_responses_score(pairing):
    data = random_data(10)
    scores = np.arange(20, dtype=np.float32).reshape(10, 2)
    data = embedded(data.examples, embeddings_of(data, "chosen"), scores=scores)
    batch = PreferenceBatches(data, pairs=8, pairing=pairing, seed=0).batch_at(1)
    for column, side in enumerate((batch.sides["chosen"], batch.sides["rejected"])):
        assert not side.valid.all(), "the epoch's last batch is not full"
        expected = np.where(side.valid, scores[side.example_index, column], 0)
        np.testing.assert_array_equal(side.score, expected)


@pytest.mark.slow
def test_a_run_learns_from_scores(tmp_path):
    """ODPO on the matrix; the offset is in the loss, and the loss goes down."""
    data = write_rows(tmp_path / "pairs.jsonl", scored_rows())
    changes = {"objective.name": "odpo", "contrast.weights": "uniform", "train.steps": 6, "tracking.tensorboard": False}

    def losses(name, **more):
        rpo_jax.run(configured(data, tmp_path / name, tmp_path / "cache", {**changes, **more}))
        return [line["loss"] for line in metric_lines(tmp_path / name) if "loss" in line]

    told = losses("log")
    assert told[-1] < told[0]
    # Before the first step all rewards are 0: the loss is that of the offsets alone.
    offsets = [np.log(c["score_chosen"] - r["score_rejected"]) for c in scored_rows() for r in scored_rows()]
    softplus = np.logaddexp(0, offsets)
    assert softplus.min() < told[0] < softplus.max()
    plain = losses("none", **{"objective.odpo_alpha": 0.0})
    assert plain[0] == pytest.approx(np.log(2), rel=1e-5)


def test_data_without_the_columns_says_so_in_one_line(tmp_path, capsys):
    data = write_rows(tmp_path / "pairs.jsonl")
    arguments = settings(data, tmp_path / "run", tmp_path / "cache", {"objective.name": "odpo"})
    assert train.main([f"--{argument}" for argument in arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert "column 'score_chosen' is missing" in told
    assert "data.chosen_score and data.rejected_score name the columns" in told
    assert "\n" not in told
