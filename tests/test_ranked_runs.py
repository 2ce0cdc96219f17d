"""Whole runs on several scored responses to a prompt, and on numbers of rows."""

import numpy as np
import pytest

from rpo_jax import doctor, report, train
from tests.runs import DISHES, metric_lines, settings, stopped_and_whole, write_rows

SHORT = {
    "train.steps": 2,
    "train.eval_every": 2,
    "tracking.tensorboard": False,
    "contrast.weights": "uniform",
    "data.pairing": "grouped",
    "objective.beta": 2.0,
}


def ranked_rows(count=32):
    """One to four answers to a prompt, better ones the longer; every eighth row has equal scores."""
    rows = []
    for i in range(count):
        dish, held = DISHES[i % len(DISHES)], 2 + i % 3
        answers = [f"{dish} {'well ' * k}{i}." for k in range(held)]
        scores = [1] * held if i % 8 == 7 else [float(k) for k in range(held)]
        rows.append({"prompt": f"How do I make {dish}, {i}?", "responses": answers, "scores": scores})
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranked")
    return folder, write_rows(folder / "ranked.jsonl", ranked_rows())


def run(place, name, changes, data=None):
    folder, own = place
    arguments = settings(data or own, folder / name, folder / "cache", {**SHORT, **changes})
    return train.main([f"--{argument}" for argument in arguments])


def test_rpo_over_all_responses_of_a_prompt(place, capsys):
    """28 prompts are left; of 8 in a batch every good answer is contrasted with every bad one."""
    assert run(place, "rpo", {}) == 0
    told = capsys.readouterr()
    said = told.out + told.err
    assert "4 rows left out by data.ranked_rule=above_mean" in said
    assert "4  all scores are equal, first " in said
    lines = metric_lines(place[0] / "rpo")
    step, last = next(line for line in lines if "loss" in line), lines[-1]
    assert np.isfinite(step["loss"])
    assert step["contrast/perplexity"] > 8, "more rejected responses than prompts"
    assert step["rewards/ties"] == 1, "it is its reference"
    assert 0 < last["eval_rewards/accuracies"] + last["eval_rewards/ties"] <= 1
    assert np.isfinite(last["eval_loss"])
    assert report.main(["--run", str(place[0] / "rpo"), "--out", str(place[0] / "report.html")]) == 0


def test_the_doctor_reads_them_as_a_run_does(place, capsys):
    folder, data = place
    arguments = settings(data, folder / "doctor", folder / "cache", SHORT)
    doctor.main([f"--{argument}" for argument in arguments])
    said = " ".join(capsys.readouterr().out.split())
    assert "28 examples, layout ranked" in said
    assert "4 rows left out by data.ranked_rule (all scores are equal: 4)" in said


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["infonca", "rpo"])
def test_stopped_and_resumed_equals_never_stopped(tmp_path, objective):
    data = write_rows(tmp_path / "ranked.jsonl", ranked_rows())
    changes = {**SHORT, "data.path": data, "objective.name": objective}
    if objective == "infonca":
        changes["contrast.weights"] = "null"
    stopped_and_whole(tmp_path, changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective.name": "dpo", "contrast.weights": "null"},
            "contrasts the two responses of a pair, but data.pairing is grouped",
        ),
        (
            {"objective.name": "nca", "contrast.weights": "null", "data.pairing": "paired"},
            "ranks all responses to a prompt, but",
        ),
        (
            {"data.ranked_rule": "threshold"},
            "data.ranked_threshold=None and data.ranked_rule=threshold do not go together",
        ),
        (
            {"data.weight": "trust", "objective.name": "nca", "contrast.weights": "null"},
            "data.weight=trust weights entries",
        ),
        (
            {"data.weight": "trust", "objective.name": "rpo_nce"},
            "data.weight=trust weights entries of the contrast matrix",
        ),
        ({"data.label_smoothing": "doubt"}, "data.label_smoothing=doubt is read by the link smoothed alone"),
        ({"data.weight": "trust"}, "column 'trust' is missing"),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(place, capsys, changes, message):
    assert run(place, "refused", changes) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("value", "reason"),
    [(-1, "column 'trust' is not at least 0: got -1"), ("much", "column 'trust' does not hold a number: got str")],
)
def test_a_weight_that_is_none_makes_the_row_unusable(place, tmp_path, capsys, value, reason):
    rows = [{**row, "trust": 1.0} for row in ranked_rows(12)]
    rows[3]["trust"] = value
    data = write_rows(tmp_path / "weighed.jsonl", rows)
    assert run(place, "unusable", {"data.weight": "trust"}, data) == 2
    told = capsys.readouterr().err
    assert f"weighed.jsonl:4: {reason} (data.weight names the column)" in told


@pytest.mark.slow
def test_weights_and_smoothing_of_rows_are_in_the_loss(place, tmp_path):
    """Before the first step all rewards are 0, whatever the smoothing; afterwards the weights decide what is learnt."""
    rows = [{**row, "trust": float(i % 2), "doubt": 0.4} for i, row in enumerate(ranked_rows())]
    data = write_rows(tmp_path / "weighed.jsonl", rows)
    columns = {"data.weight": "trust", "data.label_smoothing": "doubt", "objective.link": "smoothed"}
    found = []
    for name, changes in (("without", {"objective.link": "smoothed"}), ("with", columns)):
        assert run(place, f"rows {name}", {**changes, "train.steps": 3}, data) == 0
        found.append([line["loss"] for line in metric_lines(place[0] / f"rows {name}") if "loss" in line])
    assert found[0][0] == pytest.approx(np.log(2), rel=1e-5)
    assert found[1][0] == pytest.approx(np.log(2), rel=1e-5)
    assert found[0][-1] != found[1][-1]
