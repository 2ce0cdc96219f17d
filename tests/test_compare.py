"""A comparison end to end with a model that learns nothing in two steps, and what its numbers rest on."""

import gzip
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from rpo_jax import compare
from rpo_jax.tasks.gold import GoldTask, make_rows, win
from rpo_jax.tasks.quickstart import gold_score
from rpo_jax.tools.comparing import tables
from rpo_jax.tools.comparing.cells import CellRunner
from rpo_jax.tools.comparing.compare import table_results, tuned_settings
from rpo_jax.tools.comparing.study import read_study

BASE = {
    "data.max_prompt_tokens": 32,
    "data.max_tokens": 160,
    "model.vocab_size": 300,
    "model.hidden_size": 16,
    "model.intermediate_size": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "batch.pairs": 16,
    "train.steps": 2,
    "contrast.temperature": 0.5,
    "optim.learning_rate": 1e-2,
    "tracking.tensorboard": False,
}
STUDY = {
    "seeds": [0, 1],
    "task": {"train_pairs": 1, "held_out_pairs": 1},
    "max_tokens": 4,
    "base": BASE,
    "start": {"objective.name": "sft"},
    "tuning": {"seed": 7, "grid": {"objective.beta": [0.1, 1.0]}},
    "methods": {
        "DPO": {"objective.name": "dpo"},
        "uniform": {"objective.name": "rpo", "contrast.weights": "uniform", "grid": {"objective.beta": [0.5, 5.0]}},
    },
    "tables": {
        "main": {
            "title": "Main",
            "against": "DPO",
            "rows": {
                "SFT": {},
                "DPO": {"method": "DPO"},
                "uniform": {"method": "uniform"},
                "noisy": {"method": "DPO", "task": {"noise": 0.4}},
                "own encoder": {
                    "method": "uniform",
                    "contrast.weights": "embedding",
                    "embedding.encoder": "{start}",
                },
            },
        }
    },
}


def study_file(folder, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}), encoding="utf-8")
    return path


def compared(path, out):
    arguments = ["--config", str(path), "--out", str(out), "--cache-dir", str(out.parent / "cache")]
    assert compare.main(arguments) == 0
    return read_study(path), CellRunner(out, out.parent / "cache", 4)


def made_at(cells):
    return {cell: (cell / "result.json").stat().st_mtime_ns for cell in cells}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_study_runs_is_reported_and_runs_nothing_twice(tmp_path, capsys):
    """Two points of a grid and the fine-tuned model they start from; the better point is the table's row."""
    rows = {"SFT": {}, "DPO": {"method": "DPO"}}
    path = study_file(
        tmp_path,
        seeds=[7],
        methods={"DPO": {"objective.name": "dpo"}},
        tables={"main": {"title": "Main", "against": "SFT", "rows": rows}},
    )
    out = tmp_path / "out"
    study, runner = compared(path, out)
    results = table_results(study, runner)["main"]
    assert {label: len(each) for label, each in results.items()} == {"SFT": 1, "DPO": 1}
    for (result,) in results.values():
        assert len(result["wins"]) == 60
        assert set(result["wins"]) <= {0.0, 0.5, 1.0}
    assert np.isfinite(results["DPO"][0]["divergence"])
    assert "divergence" not in results["SFT"][0]
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    for line in ("### Main", "| SFT |", "| DPO |", "| DPO | objective.beta="):
        assert line in text
    assert 'class="dots"' in page
    assert "SFT: " in page, "the baseline has its name and value"
    assert "http" not in page
    cells = sorted((out / "cells").iterdir())
    assert len(cells) == 3
    assert not [cell for cell in cells if (cell / "run").exists()], "run folders are removed"

    before = made_at(cells)
    removed = runner.place(study.trial("DPO", study.candidates("DPO")[0]))
    shutil.rmtree(removed)
    capsys.readouterr()
    compared(path, out)
    assert sum(line[:1].isdigit() for line in capsys.readouterr().out.splitlines()) == 1
    after = made_at(cells)
    assert [cell for cell in cells if after[cell] != before[cell]] == [removed]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_study_of_several_methods_seeds_and_noises(tmp_path):
    study, runner = compared(study_file(tmp_path), tmp_path / "out")
    results = table_results(study, runner)["main"]
    assert {label: len(each) for label, each in results.items()} == {
        "SFT": 2,
        "DPO": 2,
        "uniform": 2,
        "noisy": 2,
        "own encoder": 2,
    }
    assert results["noisy"][0]["task"]["noise"] == 0.4
    assert tuned_settings(study, runner)["uniform"]["objective.beta"] in (0.5, 5.0)
    # 4 trials, 2 seeds x 5 rows, and the fine-tuned models that the trials and the noisy rows start from.
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 4 + 10 + 1 + 2
    assert "(" in (tmp_path / "out" / "report.md").read_text().split("| DPO |")[1].splitlines()[0], "an interval"


def test_a_file_s_rows_are_held_out_by_seed(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    with gzip.open(file, "wt") as out:
        out.writelines(f'{{"prompt": "{n}", "chosen": "a", "rejected": "b"}}\n' for n in range(10))
    study = read_study(study_file(tmp_path, task={"path": str(file), "held_out_rows": 3}, tables={}))
    parts = [study.task.parts(seed) for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    for train, held_out in parts:
        assert (len(train), len(held_out), len({*train, *held_out})) == (7, 3, 10)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz cannot be read as JSON Lines: "):
        study.task.parts(0)


def results_of(study, method, metrics):
    """Results of the points of a method's grid, as a runner gives them."""
    by_name = dict(zip((study.trial(method, point).name for point in study.candidates(method)), metrics, strict=True))
    return SimpleNamespace(result=lambda cell: by_name.get(cell.name))


def test_a_method_without_rewards_is_tuned_by_log_probs(tmp_path):
    """As those are whose objective has no reference."""
    methods = {"SimPO": {"objective.name": "simpo", "grid": {"optim.learning_rate": [1e-6, 1e-4]}}}
    study = read_study(study_file(tmp_path, methods=methods, tables={"main": {"rows": {"S": {"method": "SimPO"}}}}))
    found = [{"metrics": {"eval_logps/accuracies": accuracy}} for accuracy in (0.5, 0.9)]
    assert tuned_settings(study, results_of(study, "SimPO", found))["SimPO"] == {"optim.learning_rate": 1e-4}
    with pytest.raises(ValueError, match="The points of SimPO's grid cannot be told apart"):
        tuned_settings(study, results_of(study, "SimPO", [{"metrics": {}}, {"metrics": {}}]))
    # Beside one that has rewards, what both have decides, and of nothing in common nothing is said.
    rewarded = {"metrics": {"eval_rewards/accuracies": 0.75, "eval_logps/accuracies": 0.25}}
    assert tables.difference([found[1]], [rewarded])[0] == pytest.approx(65.0)
    assert tables.difference([{"metrics": {}}], [rewarded]) is None


def test_what_would_part_a_table_s_cells_is_escaped():
    assert tables.markdown("Title", ["", "log π(y|x)"], [["two\nlines", "1"]]) == (
        "### Title\n\n|  | log π(y\\|x) |\n|---|---|\n| two lines | 1 |\n"
    )


def test_what_a_study_gives_to_all_is_left_out_where_it_would_not_be_read(tmp_path):
    base = {**BASE, "model.tokenizer": "t", "contrast.weights_on": "loss", "reference.path": "r"}
    study = read_study(study_file(tmp_path, base=base))
    cell = study.points(study.tables[0].rows[0], 0)[0]
    assert (cell.config().model.tokenizer, cell.config().contrast.weights_on) == ("train", "loss")
    start = cell.beginning().config()
    assert (start.model.tokenizer, start.contrast.weights_on, start.reference.path) == ("t", "score", None)


def test_a_frontier_s_name_is_part_of_a_file_s(tmp_path):
    with pytest.raises(ValueError, match=r"frontiers: 'main/first' is part of a file's name"):
        read_study(study_file(tmp_path, frontiers={"main/first": STUDY["tables"]["main"]}))


@pytest.mark.slow
def test_a_study_of_a_file_is_judged_by_its_held_out_rows(tmp_path):
    rows, _ = make_rows(GoldTask(train_pairs=1, held_out_pairs=1), 0)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = study_file(
        tmp_path,
        seeds=[3],
        task={"path": str(file), "held_out_rows": 20},
        tables={"main": {"rows": {"SFT": {}}}},
    )
    study, runner = compared(path, tmp_path / "out")
    [result] = table_results(study, runner)["main"]["SFT"]
    assert "wins" not in result
    assert 0 <= result["metrics"]["eval_logps/accuracies"] <= 1
    held_out = (runner.place(study.beginning(3)) / "held_out.jsonl").read_text().splitlines()
    assert len(held_out) == 20


def test_a_cell_that_another_process_is_at_is_left_to_it(tmp_path):
    from rpo_jax.tools.comparing.cells import _claimed

    study = read_study(study_file(tmp_path))
    runner, cell = CellRunner(tmp_path / "out", tmp_path / "cache", 4), study.beginning(0)
    with _claimed(runner.place(cell)) as first:
        assert first
        assert not runner.work_on(cell)


@pytest.mark.slow
def test_a_cell_that_a_signal_ends_has_no_result(tmp_path, capsys):
    base = {**BASE, "train.steps": 100_000, "train.log_every": 1}
    path = study_file(tmp_path, base=base, tables={"main": {"rows": {"SFT": {}}}})
    [cell] = {cell.name for where, cell in read_study(path).configurations() if where == "start"}
    place = tmp_path / "out" / "cells" / cell

    def stop_once_it_trains():
        lines = place / "run" / "metrics.jsonl"
        while not lines.is_file() or '"loss"' not in lines.read_text():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_once_it_trains, daemon=True).start()
    assert compare.main(["--config", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "stopped by SIGTERM; the same command goes on" in capsys.readouterr().out
    assert not (place / "result.json").exists()


def test_gold_pairs_are_what_they_say():
    train, held_out = make_rows(GoldTask(train_pairs=3, held_out_pairs=2), 5)
    assert (len(train), len(held_out)) == (180, 120)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    for row in train + held_out:
        assert gold_score(row["prompt"], row["chosen"]) == row["gold_chosen"] > row["gold_rejected"]
        assert win(row["prompt"], row["chosen"], row["rejected"]) == 1
        assert win(row["prompt"], row["rejected"], row["chosen"]) == 0
        assert win(row["prompt"], row["chosen"], row["chosen"]) == 0.5


def test_noise_swaps_answers_of_the_same_pairs_in_training_only():
    honest, held_out = make_rows(GoldTask(), 3)
    less, more = (make_rows(GoldTask(noise=noise), 3) for noise in (0.2, 0.4))
    assert less[1] == more[1] == held_out
    swapped = [
        [row["chosen"] == before["rejected"] for row, before in zip(rows, honest, strict=True)]
        for rows, _ in (less, more)
    ]
    assert [round(np.mean(each), 1) for each in swapped] == [0.2, 0.4]
    assert all(b for a, b in zip(*swapped, strict=True) if a), "more noise swaps those and others"
    assert {row["prompt"] for row in more[0]} == {row["prompt"] for row in honest}


def test_rarer_virtues_are_rarer():
    def met(share):
        return np.mean([row["gold_chosen"] for row in make_rows(GoldTask(met=share), 0)[0]])

    assert met(0.2) < met(0.4) < met(0.6) < met(0.8)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """Seeds that differ and prompts that differ: of 40 intervals for a known mean, about 38 hold it."""
    random, held = np.random.default_rng(0), 0
    for _ in range(40):
        seeds = np.clip(0.6 + 0.05 * random.normal(size=(8, 1)), 0, 1)
        mean, low, high = tables.over_seeds_and_prompts((random.random((8, 120)) < seeds).astype(float))
        assert low < mean < high
        held += low <= 0.6 <= high
    assert 34 <= held <= 40


def test_a_difference_is_paired():
    random = np.random.default_rng(1)
    wins = random.integers(0, 3, (5, 60)) / 2
    better = np.minimum(wins + (random.random((5, 60)) < 0.1) * 0.5, 1)
    results = [[{"wins": row.tolist()} for row in each] for each in (better, wins)]
    mean, low, high = tables.difference(*results)
    assert mean == pytest.approx(100 * (better - wins).mean())
    assert 0 < low < mean < high < 8, "far narrower than either rate's own interval"


def test_all_that_was_tried_is_told_and_what_was_chosen():
    points = [({"objective.beta": beta}, {"wins": [wins] * 4, "metrics": {}}) for beta, wins in ((1, 0.5), (2, 1.0))]
    trials = {"DPO": [*points, ({"objective.beta": 3}, None)]}
    titles, lines = tables.tried(trials, {"DPO": {"objective.beta": 2}})
    assert titles == ["method", "settings", "gold win rate against chosen, %", ""]
    assert lines == [
        ["DPO", "objective.beta=1", "50.0 (50.0 to 50.0)", ""],
        ["DPO", "objective.beta=2", "100.0 (100.0 to 100.0)", "chosen"],
    ]


def test_one_seed_has_a_mean_and_no_interval():
    assert tables.shown(tables.over_seeds(np.array([0.5])), 2) == "0.50"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds: give a list of numbers"),
        ({"seeds": [0, 1, 0]}, "seeds: each may be given once, got [0, 1, 0]"),
        ({"tuning": {**STUDY["tuning"], "seed": "x"}}, "tuning: seed: give a number of at least 0, got 'x'"),
        ({"tuning": {"grid": {"objective.beta": [0.1, 0.1]}}}, "beta: each value may be given once, got [0.1, 0.1]"),
        ({"sedes": [1]}, "unknown key 'sedes'"),
        ({"base": {**BASE, "objective.bta": 1}}, "did you mean objective.beta?"),
        ({"task": {"noise": 2}}, "noise=2 from 0 to 1"),
        ({"task": {"nose": 2}}, "task: nose is not known"),
        ({"task": {"path": "nowhere.jsonl"}}, "path=nowhere.jsonl is no file"),
        ({"task": {"train_pairs": 1000}}, "the prompts that a topic has"),
        ({"methods": {"DPO": {"objective.name": "dop"}}}, "there is no method uniform"),
        ({"methods": {**STUDY["methods"], "DPO": {"objective.name": "dop"}}}, "did you mean 'dpo'?"),
        ({"methods": {**STUDY["methods"], "DPO": {"grid": {"objective.beta": [1]}}}}, "tuned with as many runs"),
        ({"tables": {"main": {"rows": {"a": {"objective.beta": 1}}}}}, "need a method beside them"),
        ({"tables": {"main": {"against": "b", "rows": {"a": {}}}}}, "there is no row 'b'"),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(tmp_path, capsys, changes, message):
    out = tmp_path / "out"
    assert compare.main(["--config", str(study_file(tmp_path, **changes)), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


LATER = pytest.param("compare_small", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [LATER, "compare_hh", "compare_hh_gpu", "compare_rounds", "frontier_hh"])
def test_the_studies_that_come_with_the_project_are_some(tmp_path, name):
    content = yaml.safe_load(Path(f"configs/{name}.yaml").read_text(encoding="utf-8"))
    if "path" in content["task"]:  # of data that is not in the repository
        content["task"]["path"] = str(tmp_path / "rows.jsonl")
        (tmp_path / "rows.jsonl").touch()
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    study = read_study(path)
    assert len(study.seeds) >= 3
    assert json.dumps([cell.name for _, cell in study.configurations()])
