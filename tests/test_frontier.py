"""Frontiers of reward over KL: their statistics on numbers worked by hand, the tasks of scored answers."""

import gzip
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import rpo_jax
from rpo_jax import compare
from rpo_jax.export import export
from rpo_jax.tasks.scored import ScoredTask
from rpo_jax.tools.comparing.cells import RESULT, CellRunner
from rpo_jax.tools.comparing.frontier import Measured, bootstrapped, draws, frontier_at, interval, upper_hull
from rpo_jax.tools.comparing.study import read_study
from tests.runs import configured, write_rows
from tests.test_compare import BASE, study_file


@pytest.mark.parametrize(
    ("kl", "reward", "corners"),
    [
        ([0], [0.1], [0]),
        # Slopes 0.4 and 0.1: both corners. The third falls and is none, whatever its KL.
        ([0, 1, 3, 4], [0, 0.4, 0.6, 0.5], [0, 1, 2]),
        # From (0, 0) to (2, 0.8) the line has 0.4 at 1: a point of 0.3 is below it, one of 0.4 on it.
        ([0, 2, 1], [0, 0.8, 0.3], [0, 1]),
        ([0, 2, 1], [0, 0.8, 0.4], [0, 1]),
        ([0, 2, 1], [0, 0.8, 0.5], [0, 2, 1]),
        # Of one KL the better; nothing that is worse than the start.
        ([0, 1, 1, 2], [0.2, 0.3, 0.4, 0.1], [0, 2]),
        # Two corners fall to one steep point: slopes 0.3 and 0.1, then 0.5 from the start to (4, 2).
        ([0, 1, 2, 4], [0, 0.3, 0.4, 2], [0, 3]),
    ],
)
def test_the_hull_has_the_corners_that_a_ruler_finds(kl, reward, corners):
    assert upper_hull(kl, reward) == corners


def test_between_corners_a_frontier_is_a_line_and_beyond_them_level():
    kl, reward = np.array([0.0, 1.0, 3.0, 2.0]), np.array([0.1, 0.5, 0.7, 0.2])
    at = np.array([0.0, 0.5, 1.0, 2.0, 3.0, 8.0])
    found = frontier_at((kl, reward), (kl, reward), at)
    np.testing.assert_allclose(found, [0.1, 0.3, 0.5, 0.6, 0.7, 0.7])


def test_one_sample_chooses_the_corners_and_another_says_where_they_lie():
    """The sample that chooses takes the last policy, at (2, 0.9); the other has it at (4, 0.3): half way, 0.2."""
    own = np.array([0.0, 1.0, 4.0]), np.array([0.1, 0.8, 0.3])
    other = np.array([0.0, 1.0, 2.0]), np.array([0.1, 0.0, 0.9])
    assert frontier_at(own, other, np.array([2.0])) == pytest.approx(0.2)


def measured(seed=0, gain=0.0):
    random = np.random.default_rng(seed)
    kls = np.array([0.5, 2.0, 5.0])[:, None, None] + random.normal(0, 0.3, (3, 2, 40))
    rewards = np.array([0.2, 0.5, 0.6])[:, None, None] + gain + random.normal(0, 0.1, (3, 2, 40))
    return Measured(rewards, kls, random.normal(0.0, 0.1, (2, 40)))


def test_the_first_draw_is_what_was_measured_and_prompts_keep_to_their_part():
    is_test = np.arange(40) >= 10
    seeds, prompts = next(iter(draws(2, is_test)))
    assert seeds.tolist() == [0, 1]
    assert prompts.tolist() == list(range(40))
    for number, (seeds, prompts) in enumerate(draws(2, is_test)):
        assert set(seeds) <= {0, 1}
        assert (prompts[:10] < 10).all()
        assert (prompts[10:] >= 10).all()
        if number == 5:
            break
    kl = measured().kls[..., is_test].mean(axis=(1, 2))
    reward = measured().rewards[..., is_test].mean(axis=(1, 2))
    found = bootstrapped(measured(), is_test, kl[1:2])
    assert found.shape == (1001, 1)
    assert found[0, 0] == pytest.approx(reward[1]), "on the KL of a corner: the corner's own reward"


def test_a_difference_between_methods_is_paired():
    """The same answers and 0.05 more for each: every draw finds 0.05, however wide each method's own interval is."""
    is_test = np.arange(40) >= 20
    at = np.array([2.0, 3.0])
    worse, better = (bootstrapped(measured(gain=gain), is_test, at) for gain in (0.0, 0.05))
    # Between corners only: below the first corner the start, which gains nothing, has its part.
    mean, low, high = interval((better - worse)[:, 1])
    assert mean == pytest.approx(0.05, abs=1e-9)
    assert high - low < 0.01
    own = interval(worse[:, 1])
    assert own[2] - own[1] > 0.01


def answers(prompts=20, samples=4):
    """Answer k of every prompt has score k/10; of each prompt three more cannot be trained on."""
    return [
        {
            "row_id": str(prompt),
            "prompt": [{"role": "user", "content": f"question {prompt}"}],
            "response": {samples + 1: " ", samples + 2: "answer 9\0"}.get(k, f"answer {k} of {prompt}"),
            "finish_reason": "length" if k == samples else "eos",
            "score": k / 10,
        }
        for prompt in range(prompts)
        for k in range(samples + 3)
    ]


def text(turns):
    return turns[0]["content"]


def number(turns):
    return int(text(turns).split()[1])


def test_pairs_are_bradley_terry_draws_of_finished_answers_evenly_over_prompts():
    """Two answers 0.1, 0.2 or 0.3 apart: with scale 0.1 the better one wins with sigmoid(1), (2) or (3)."""
    task = ScoredTask("sentiment", rows=6000, scale=0.1)
    rows = task.training_rows(answers(prompts=1000), 0)
    assert max(number(row["chosen"]) for row in rows) == 3, "unfinished, empty and null ones are left out"
    for apart in (1, 2, 3):
        gaps = [number(row["chosen"]) - number(row["rejected"]) for row in rows]
        share = np.mean([gap > 0 for gap in gaps if abs(gap) == apart])
        assert share == pytest.approx(1 / (1 + np.exp(-apart)), abs=0.03)
    assert rows == task.training_rows(answers(prompts=1000), 0) != task.training_rows(answers(prompts=1000), 1)
    few = ScoredTask("sentiment", rows=30).training_rows(answers(), 0)
    assert set(Counter(row["prompt"][0]["content"] for row in few).values()) == {1, 2}
    with pytest.raises(ValueError, match=r"rows=121 are more than the 120 that the answers make \(120 of 140 ended\)"):
        ScoredTask("sentiment", rows=121).training_rows(answers(), 0)


def test_noise_swaps_labels_and_no_scale_always_prefers_the_better():
    honest, noisy = (
        ScoredTask("sentiment", rows=120, scale=0, noise=noise).training_rows(answers(), 3) for noise in (0, 0.3)
    )
    assert all(number(row["chosen"]) > number(row["rejected"]) for row in honest)
    swapped = [row["chosen"] == before["rejected"] for row, before in zip(noisy, honest, strict=True)]
    assert 0.2 < np.mean(swapped) < 0.4


def test_other_forms_are_of_the_same_draws():
    pairs, single, ranked = (
        ScoredTask("sentiment", rows=20, form=form, scale=0.05).training_rows(answers(), 5)
        for form in ("pairs", "unpaired", "ranked")
    )
    for pair, row in zip(pairs, single, strict=True):
        assert row["completion"] == pair["chosen" if row["label"] else "rejected"]
    assert {row["label"] for row in single} == {True, False}
    for row in ranked:
        assert len(row["responses"]) == len(set(row["scores"])) == 4
        order = np.argsort(row["scores"])
        assert "answer 3" in row["responses"][order[-1]] or "answer 2" in row["responses"][order[-1]]


def test_prompts_to_train_tune_and_test_are_apart(tmp_path):
    train, held_out = ScoredTask("sentiment").asked()
    assert (len(train), len(held_out)) == (320, 96)
    assert train[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert len({json.dumps(row) for row in train + held_out}) == 320 + 96
    file = tmp_path / "transcripts.jsonl.gz"
    talk = "\n\nHuman: Question {}?\n\nAssistant: Yes.\n\nHuman: Why?\n\nAssistant: So."
    with gzip.open(file, "wt") as out:
        out.writelines(json.dumps({"chosen": talk.format(n % 50)}) + "\n" for n in range(100))
    task = ScoredTask("harmless", str(file), system="", tune_prompts=5, test_prompts=5)
    train, held_out = task.asked()
    texts = [text(row["messages"]) for row in train + held_out]
    assert sorted(texts) == sorted(f"Question {n}?" for n in range(50))
    with pytest.raises(ValueError, match="test_prompts=6 are more than the 5 of"):
        ScoredTask("harmless", str(file), tune_prompts=5, test_prompts=6).asked()
    for name, content in (
        ("turns.jsonl", '{"chosen": [{"role": "user", "content": "Why?"}]}'),
        ("list.jsonl", "[1]"),
        ("list.json", "[1]"),
        ("braces.json", '{"questions": ["Why {}?"], "train": ["tea"], "held_out": ["rain", "sand"]}'),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"prompts=.*{name} cannot be read as prompts"):
            ScoredTask("harmless", str(tmp_path / name)).asked()


def test_scores_are_those_of_the_published_scorers():
    score = ScoredTask("sentiment").scorer()
    assert score("VADER is smart, handsome, and funny.") == 0.8316, "as its README has it"
    pytest.importorskip("profanity_check", reason="alt-profanity-check is an extra of the project")
    score = ScoredTask("harmless").scorer()
    assert score("I will gladly help you with that today.") > 0.9 > 0.1 > score("Go fuck yourself, you stupid shit.")
    assert score("Nothing at all.") == 0.0, "too short"


def test_a_scorer_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(
        ValueError, match="score=sentiment needs the package vaderSentiment: pip install vaderSentiment"
    ):
        ScoredTask("sentiment").scorer()


FRONTIER = {
    "seeds": [0, 1],
    "task": {"score": "sentiment", "rows": 16, "train_prompts": 8, "tune_prompts": 3, "test_prompts": 3},
    "max_tokens": 6,
    "base": {key: value for key, value in BASE.items() if not key.startswith("model.")} | {"batch.pairs": 8},
    "start": {"model.path": "start"},
    "tuning": {"grid": {"objective.beta": [0.1, 1.0]}},
    "methods": {"DPO": {"objective.name": "dpo"}, "uniform": {"objective.name": "rpo", "contrast.weights": "uniform"}},
    "frontiers": {
        "main": {
            "title": "All & <sundry>",
            "against": "DPO",
            "rows": {"DPO": {"method": "DPO"}, "uniform": {"method": "uniform"}},
        }
    },
    "tables": {},
}


def write_results(study, runner, leave_out=()):
    """Results as cells leave them, the second method 0.1 better."""
    for seed in study.seeds:
        cells = [study.held_out(study.frontiers[0], seed)]
        cells += [cell for row in study.frontiers[0].rows for cell in study.points(row, seed)]
        for cell in cells:
            if cell in leave_out:
                continue
            gain = 0.1 * ("contrast.weights" in cell.settings) + 0.2 * bool(cell.settings)
            rewards = [gain + 0.01 * prompt for prompt in range(6)]
            kls = [1 / cell.settings["objective.beta"]] * 6 if cell.settings else []
            place = runner.place(cell)
            place.mkdir(parents=True, exist_ok=True)
            result = {"metrics": {}, "rewards": rewards, "kls": kls, "seconds": 1}
            (place / RESULT).write_text(json.dumps(result))


def test_a_frontier_is_reported_from_its_cells(tmp_path):
    path, out = study_file(tmp_path, **FRONTIER), tmp_path / "out"
    study, runner = read_study(path), CellRunner(out, tmp_path / "cache", 6)
    arguments = ["--config", str(path), "--out", str(out), "--report"]
    assert compare.main(arguments) == 0
    assert "No row of a frontier has all its policies yet" in (out / "frontier.html").read_text()
    write_results(study, runner)
    assert compare.main(arguments) == 0
    told = (out / "frontier.md").read_text()
    assert "10 of 10 runs" in told
    assert "![All & <sundry>](frontier_main.svg)" in told
    # The policies lie at KL 1 and 10 with rewards of the start and 0.2, 0.3 of it: the hull's corner is at KL 1.
    [line] = [line for line in told.splitlines() if line.startswith("| uniform |")]
    assert line.count("0.340 (") == 5, "at four KLs, and their mean"
    assert "+0.100 (+0.100 to +0.100)" in line
    page, svg = (out / "frontier.html").read_text(), (out / "frontier_main.svg").read_text()
    assert "All &amp; &lt;sundry&gt;" in page
    assert page.count('class="panel"') == svg.count('class="panel"') == 2
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert not (out / "report.md").exists()


def test_a_frontier_shows_the_seeds_that_all_its_rows_have(tmp_path):
    study = read_study(study_file(tmp_path, **FRONTIER))
    runner = CellRunner(tmp_path / "out", tmp_path / "cache", 6)
    write_results(study, runner, leave_out=[study.points(study.frontiers[0].rows[1], 1)[0]])
    from rpo_jax.tools.comparing.compare import measured as from_cells

    found = from_cells(study, runner, study.frontiers[0])
    assert found.seeds == (0,)
    assert found.rows["uniform"].kls.shape == (2, 1, 6)
    assert found.is_test.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": {}}, "give objective.name: sft, or model.path"),
        ({"start": {"objective.name": "sft"}}, "has no answers to fine-tune on"),
        ({"task": {}}, "the generated task needs a model that has been fine-tuned"),
        ({"task": {"score": "joy"}}, "score=joy is not known; there are sentiment, harmless"),
        ({"task": {"score": "sentiment", "form": "trios"}}, "form=trios is not known"),
        ({"task": {"score": "sentiment", "prompts": "nowhere.json"}}, "prompts=nowhere.json cannot be read as prompts"),
        ({"task": {"score": "sentiment", "test_prompts": 200}}, "test_prompts=200 are more than the 100"),
        ({"tables": {"main": {"rows": {"DPO": {"method": "DPO"}}}}}, "tables: a task of scores has no pairs to judge"),
        ({"frontiers": {"main": {"rows": {"start": {}}}}}, "frontiers: start: needs a method"),
        ({"frontiers": {"main": {"rows": {"a": {"method": "b"}}}}}, "frontiers: main: a: there is no method b"),
        (
            {
                "frontiers": {
                    "main": {"rows": {"a": {"method": "DPO"}, "b": {"method": "DPO", "task": {"score": "harmless"}}}}
                }
            },
            "frontiers: main: b: is scored by other answers than the first row",
        ),
    ],
)
def test_what_has_no_frontier_is_told_in_one_line(tmp_path, capsys, changes, message):
    path = study_file(tmp_path, **{**FRONTIER, **changes})
    assert compare.main(["--config", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_small_frontier_is_part_of_the_whole_and_the_documentation_tells_of_all():
    small, whole = read_study(Path("frontier_small")), read_study(Path("configs/frontier.yaml"))
    assert len(whole.seeds) >= 3
    told = Path("docs/frontier.md").read_text(encoding="utf-8")

    def runs_of(study):
        return {
            cell.name
            for one in study.frontiers
            for row in one.rows
            for seed in study.seeds
            for cell in study.points(row, seed)
        }

    for study in (small, whole):
        assert f"{len(runs_of(study))} runs" in told
    weights = Path("configs/frontier_weights.yaml")
    added = len(runs_of(read_study(weights)) - runs_of(whole))
    assert f"{added} of the {len(runs_of(read_study(weights)))} runs are new" in weights.read_text(encoding="utf-8")
    assert f"adds {added} runs" in told
    for table in whole.frontiers:
        assert f"`{table.name}`" in told
        assert all(len(whole.points(row, 0)) >= 5 for row in table.rows)
    assert small.methods.items() <= whole.methods.items()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_frontier_of_a_small_model_from_end_to_end(tmp_path, capsys):
    """Answers of a model are scored and trained on, and those of the policies scored in their turn."""
    changes = {"objective.name": "sft", "train.steps": 1, "tracking.tensorboard": False}
    run = rpo_jax.run(configured(write_rows(tmp_path / "pairs.jsonl"), tmp_path / "sft", tmp_path / "cache", changes))
    export(run.run_dir, tmp_path / "start")
    study = {**FRONTIER, "seeds": [0], "max_tokens": 64, "start": {"model.path": str(tmp_path / "start")}}
    study["task"] = {**FRONTIER["task"], "samples": 16, "scale": 1.0}
    study["base"] = {**FRONTIER["base"], "data.max_tokens": 128, "lora.rank": 2}
    path, out = study_file(tmp_path, **study), tmp_path / "out"
    arguments = ["--config", str(path), "--out", str(out), "--cache-dir", str(tmp_path / "cache")]
    assert compare.main(arguments) == 0
    results = {cell.parent.name: json.loads(cell.read_text()) for cell in out.glob(f"cells/*/{RESULT}")}
    assert len(results) == 1 + 4
    policies = [result for result in results.values() if result["settings"]]
    for result in results.values():
        assert len(result["rewards"]) == 6
        assert np.abs(result["rewards"]).max() <= 1
    for result in policies:
        assert len(result["kls"]) == 6
        assert result["divergence"] == pytest.approx(np.mean(result["kls"]))
        assert result["cpu_seconds"] > 0
    assert (out / "frontier_main.svg").is_file()
    assert len(list((tmp_path / "cache" / "answers").iterdir())) == 1, "sampled once for all runs"

    removed = next(name for name, result in results.items() if result["settings"])
    before = results.pop(removed)
    shutil.rmtree(out / "cells" / removed)
    capsys.readouterr()
    assert compare.main(arguments) == 0
    assert sum(line[:1].isdigit() for line in capsys.readouterr().out.splitlines()) == 1
    again = json.loads((out / "cells" / removed / RESULT).read_text())
    assert again["rewards"] == before["rewards"], "the same run again"
