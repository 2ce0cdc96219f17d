"""The report: what it reads, what it computes again, and that its page works in a browser without a network."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import jax
import numpy as np
import pytest

import rpo_jax
from rpo_jax.config import resolve
from rpo_jax.config.reading import load_config
from rpo_jax.objectives.metrics import TIE_NATS
from rpo_jax.report import main, write_report
from rpo_jax.runs.checkpoints import Checkpoints
from rpo_jax.runs.folder import MODEL
from rpo_jax.runs.tracking import Reporter
from rpo_jax.tools.exporting import export
from rpo_jax.tools.reporting import contrast_panel, rewards_panel
from rpo_jax.tools.reporting.curves import final_values, make_panels, points
from rpo_jax.tools.reporting.report_page import make_page
from rpo_jax.tools.reporting.run_records import read_runs
from rpo_jax.tools.reporting.verdict import verdict
from rpo_jax.training.prepare import batches_of, prepare
from tests.runs import configured, metric_lines, preference_rows, write_rows

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDS_BROWSER = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the PATH")
CHANGES = {"train.steps": 4, "train.eval_every": 2, "contrast.perplexity": 2, "train.sample_prompts": 2}
HOSTILE = "</script><script>document.title = 'broken'</script> & \"quotes\""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data file and the run folders rpo and dpo, trained for four steps."""
    folder = tmp_path_factory.mktemp("report")
    rows = preference_rows(40)
    rows[-1]["prompt"] += " " + HOSTILE  # held out, and so sampled where it is first
    data = write_rows(folder / "data.jsonl", rows)
    for name, changes in (("rpo", CHANGES), ("dpo", {"objective.name": "dpo", "train.steps": 3})):
        rpo_jax.run(configured(data, folder / name, folder / "cache", changes))
    return folder


@pytest.fixture(scope="module")
def prepared(world):
    config = load_config(world / "rpo" / "config.yaml")
    return config, prepare(config, Reporter(silent=True), world / "rpo" / MODEL)


@pytest.fixture(scope="module")
def page(world):
    return write_report([str(world / "rpo"), str(world / "dpo")], world / "report.html", reporter=Reporter(silent=True))


def data_of(page) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S)
    assert found is not None
    return json.loads(found[1])


class Structure(HTMLParser):
    """Tags of a page, and every address that it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]


def test_the_page_is_whole_and_fetches_nothing(page):
    text = page.read_text("utf-8")
    found = Structure()
    found.feed(text)
    assert found.tags[:2] == ["html", "head"]
    assert found.tags.count("script") == 2  # the data and the code: no prompt has opened a third
    assert found.fetched == []
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "width=device-width" in text
    assert "prefers-color-scheme: dark" in text


def test_curves_are_what_was_logged(world, page):
    told = data_of(page)
    lines = metric_lines(world / "rpo")
    of_dpo, of_rpo = (panel for panel in told["panels"] if panel["key"] == "loss")
    assert (of_dpo["title"], of_rpo["title"]) == ("Loss of dpo", "Loss of rpo")
    assert of_rpo["curves"][0] == of_dpo["curves"][1] == {"train": [], "held_out": []}, "each has its own scale"
    wanted = [[line["step"], line["loss"]] for line in lines if "loss" in line]
    assert [step for step, _ in of_rpo["curves"][1]["train"]] == [1, 2, 3, 4]
    np.testing.assert_allclose(np.array(of_rpo["curves"][1]["train"]), np.array(wanted), rtol=1e-5)
    assert [step for step, _ in of_rpo["curves"][1]["held_out"]] == [0, 2, 4]
    assert {panel["key"] for panel in told["panels"]} >= {
        "loss",
        "rewards/margins",
        "rewards/accuracies",
        "grad_norm",
        "packing/efficiency",
        "tokens_per_second",
        "memory/host_gib",
    }
    assert [run["name"] for run in told["runs"]] == ["dpo", "rpo"], "the last one that was named comes first"


def test_kl_is_shown_where_it_was_logged(world, tmp_path):
    folder = shutil.copytree(world / "dpo", tmp_path / "kto")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": NaN, "kl": 0.25}\n')
    (record,) = read_runs([str(folder)])
    (panel,) = (panel for panel in make_panels([record]) if panel["key"] == "kl")
    assert panel["curves"] == [{"train": [[9, 0.25]], "held_out": []}]
    assert points(record, "loss")[-1] == [9, None]
    assert json.loads(json.dumps(make_panels([record]), allow_nan=False))


def test_the_matrix_is_the_one_that_was_trained_on(world, prepared):
    """Its diagonal weight and perplexity are those that the step itself has logged."""
    for step in (1, 3):
        found = contrast_panel.batch_contrast(*prepared, step)
        (line,) = (line for line in metric_lines(world / "rpo") if line["step"] == step and "loss" in line)
        assert np.mean(np.diag(found.weights)) == pytest.approx(line["contrast/diagonal_weight"], abs=1e-5)
        assert np.mean(found.perplexity) == pytest.approx(line["contrast/perplexity"], abs=1e-4)
        assert found.temperature is not None
        assert np.mean(found.temperature) == pytest.approx(line["contrast/temperature"], rel=1e-4)


def test_prompts_stand_at_their_rows_and_columns(prepared):
    config, data = prepared
    found = contrast_panel.batch_contrast(config, data)
    batch = batches_of(config, data.train, data.responses, 1).batch_at(0)
    lines = [int(data.train.examples[i].row_id.rpartition(":")[2]) for i in batch.sides["chosen"].example_index]
    assert sorted(found.chosen_prompts) == sorted(preference_rows()[line - 1]["prompt"] for line in lines)
    assert found.chosen_prompts == found.rejected_prompts
    of_prompt = {row["prompt"]: row for row in preference_rows()}
    for kind, texts in (("chosen", found.chosen), ("rejected", found.rejected)):
        assert texts == [of_prompt[prompt][kind] for prompt in found.chosen_prompts]
    assert found.cosine is not None
    for i, text in enumerate(found.chosen_prompts):
        for j, other in enumerate(found.rejected_prompts):
            assert (found.cosine[i, j] > 0.9999) == (text == other)


def test_groups_are_blocks_of_the_matrix(world, prepared):
    _, data = prepared
    changes = {**CHANGES, "contrast.group": 4}
    config = configured(world / "data.jsonl", world / "other", world / "cache", changes)
    found = contrast_panel.batch_contrast(config, data)
    apart = np.kron(np.eye(2), np.ones((4, 4))) == 0
    assert not found.mask[apart].any()
    assert not found.weights[apart].any()
    np.testing.assert_allclose(found.weights.sum(axis=1), 1, rtol=1e-5)


def test_related_prompts_lie_together():
    """A chain through three clusters stays in each until it is used up."""
    rng = np.random.default_rng(0)
    cluster = rng.permutation(np.repeat(np.arange(3), 5))
    embeddings = np.eye(3)[cluster] + 0.01 * rng.normal(size=(15, 3))
    chain = contrast_panel._chain(embeddings)
    assert sorted(chain) == list(range(15))
    assert np.count_nonzero(np.diff(cluster[chain])) == 2


def test_unpaired_responses_have_their_own_prompts(world, prepared):
    _, data = prepared
    config = configured(world / "data.jsonl", world / "x", world / "cache", {**CHANGES, "data.pairing": "unpaired"})
    found = contrast_panel.batch_contrast(config, data)
    assert not found.paired
    assert found.weights.shape == (8, 8)
    assert sorted(found.chosen_prompts) != sorted(found.rejected_prompts)


def test_rewards_are_those_of_the_last_evaluation(world, prepared):
    scores, ties, step = rewards_panel.held_out_scores(world / "rpo", *prepared, Reporter(silent=True))
    assert step == 4
    last = [line for line in metric_lines(world / "rpo") if "eval_loss" in line][-1]
    for name in ("chosen", "rejected"):
        assert np.mean(scores[name]) == pytest.approx(last[f"eval_rewards/{name}"], abs=1e-4)
    assert ties == pytest.approx(resolve(prepared[0]).objective.beta * TIE_NATS, rel=0.5)  # of short answers
    shown = rewards_panel.for_page(scores, ties, step, rewards=True)
    assert isinstance(shown, dict)
    assert sum(shown["sides"]["counts"]["chosen"]) == 8
    assert shown["accuracy"] == pytest.approx(last["eval_rewards/accuracies"])
    assert not shown["tied"]


def test_rewards_of_an_objective_that_compares_tokens_and_of_rows_that_devices_share(world, prepared):
    """As if the run had been one of ld_dpo, whose reference the cache has no tokens of, on a mesh of other devices."""
    expected, _, _ = rewards_panel.held_out_scores(world / "rpo", *prepared, Reporter(silent=True))
    by_tokens = configured(
        world / "data.jsonl",
        world / "rpo",
        world / "cache",
        {**CHANGES, "objective.name": "ld_dpo", "contrast.perplexity": "null", "reference.mode": "live"}
        | {"batch.micro_rows": 3, "mesh.context": jax.device_count(), "objective.link": "smoothed"}
        | {"data.label_smoothing": "doubt"},
    )
    scores, _, _ = rewards_panel.held_out_scores(world / "rpo", by_tokens, prepared[1], Reporter(silent=True))
    for name in ("chosen", "rejected"):
        np.testing.assert_allclose(scores[name], expected[name], atol=1e-5)


def test_rewards_that_are_alike_or_lost_are_told():
    ties = np.array([1e-4, 1e-3, 1e-3])
    alike = rewards_panel.for_page({"chosen": 2.0 + ties / 2, "rejected": np.full(3, 2.0)}, ties, 0, rewards=True)
    assert isinstance(alike, dict)
    assert sum(alike["sides"]["counts"]["chosen"]) == 3
    assert alike["accuracy"] == 0
    assert alike["tied"]
    apart = rewards_panel.for_page({"chosen": 2.0 + 2 * ties, "rejected": np.full(3, 2.0)}, ties, 0, rewards=False)
    assert isinstance(apart, dict)
    assert (apart["accuracy"], apart["tied"], apart["score"]) == (1, False, "log-prob")
    lost = rewards_panel.for_page(dict.fromkeys(("chosen", "rejected"), np.full(3, np.nan)), ties, 7, rewards=True)
    assert lost == "No score of the held-out data is a finite number at step 7: the run has diverged."


def test_the_page_holds_matrix_rewards_samples_and_settings(page):
    told = data_of(page)
    dpo, rpo = told["runs"]
    assert rpo["matrix"]["of"] == [8, 8]
    assert rpo["rewards"]["step"] == 4
    assert [row[i] for i, row in enumerate(dpo["matrix"]["weights"])] == [1.0] * 8
    assert [step for step, _ in rpo["samples"][0]["answers"]] == [0, 2, 4]
    assert dpo["samples"] == []
    (objective,) = (row for row in told["settings"] if row["key"] == "objective.name")
    assert objective == {"key": "objective.name", "values": ["dpo", "rpo"], "set": True, "differs": True}


def test_text_of_the_data_never_becomes_markup(world):
    (record,) = read_runs([str(world / "rpo")])
    record.samples.append({"step": 4, "row_id": HOSTILE, "prompt": HOSTILE, "response": HOSTILE})
    text = make_page([record], [HOSTILE], [HOSTILE])
    assert text.count("</script>") == 2
    assert "broken'<" not in text


def test_without_its_data_a_run_still_has_curves(world, tmp_path, capsys):
    folder = shutil.copytree(world / "rpo", tmp_path / "moved", ignore=shutil.ignore_patterns("checkpoints"))
    text = (folder / "config.yaml").read_text().replace("data.jsonl", "gone.jsonl")
    (folder / "config.yaml").write_text(text)
    out = tmp_path / "page.html"
    assert main(["--run", str(folder), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "--no-matrix --no-rewards" in error
    assert error.count("\n") == 1
    assert list(tmp_path.glob("*.html*")) == []
    assert main(["--run", str(folder), "--out", str(out), "--no-matrix", "--no-rewards"]) == 0
    (run,) = data_of(out)["runs"]
    assert run["matrix"] == run["rewards"] == "Left out on request."


def test_a_last_line_that_was_cut_short_is_left_out(world, tmp_path):
    folder = shutil.copytree(world / "dpo", tmp_path / "cut")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    (record,) = read_runs([str(folder)])
    assert record.metrics == metric_lines(world / "dpo")


def test_a_long_run_s_curves_are_thinned_and_its_newest_value_is_shown(world, tmp_path):
    lines = [{"step": step, "loss": 1.0 / step} for step in range(1, 9002)] + [{"step": 9002, "loss": math.nan}]
    record = told(world, tmp_path, "long", [*lines, evaluated(9002, math.nan, 0.5)])
    curve = points(record, "loss")
    assert [step for step, *_ in curve] == list(range(2, 9003, 3))
    assert curve[-1] == [9002, None]
    [loss] = [row for row in final_values([record]) if row["title"] == "Loss"]
    assert loss["values"] == [{"train": "not finite", "held_out": "not finite"}]


def test_a_batch_without_one_of_the_sides_has_no_matrix(world, prepared, monkeypatch):
    config, data = prepared
    empty = contrast_panel.batch_contrast(config, data)
    shape = np.zeros((0, 8))
    monkeypatch.setattr(
        contrast_panel, "batch_contrast", lambda *_: replace(empty, weights=shape, mask=shape.astype(bool), chosen=[])
    )
    page = write_report([str(world / "rpo")], world / "empty.html", with_rewards=False, reporter=Reporter(silent=True))
    assert data_of(page)["runs"][0]["matrix"] == (
        "The batch of step 1 has no chosen response; `--batch-step` takes another."
    )


def test_pairs_that_all_tie_are_called_so(world):
    """Before the first step, where the policy still is its reference: 0 would be the worst accuracy there is."""
    (record,) = read_runs([str(world / "rpo")])
    assert points(record, "eval_rewards/accuracies")[0] == [0, 0.0, "tied"]
    start = replace(record, metrics=record.metrics[:1])
    values = {row["title"]: row["values"] for row in final_values([start])}
    assert values["Reward accuracy"] == [{"train": None, "held_out": "tied"}]
    assert all(len(point) == 2 for point in points(record, "eval_logps/accuracies"))


DAMAGE = {
    "nowhere": (None, "is no folder"),
    "no run": ({"config.yaml": None}, "holds no run"),
    "no metrics": ({"metrics.jsonl": None}, "has no metrics yet"),
    "empty metrics": ({"metrics.jsonl": b""}, "has no metrics yet"),
    "no JSON": ({"metrics.jsonl": b'{"step": 1}\n{"step\n{"step": 3}\n'}, "metrics.jsonl:2 is damaged"),
    "no step": ({"metrics.jsonl": b'{"loss": 1}\n'}, "metrics.jsonl:1 is damaged"),
    "no object": ({"metrics.jsonl": b"\xff\xfe\n"}, "metrics.jsonl:1 is damaged"),
    "no answer": ({"samples.jsonl": b'{"step": 1}\n'}, "samples.jsonl:1 is damaged"),
    "an object as a row's id": (
        {"samples.jsonl": b'{"step": 1, "row_id": {"a": 1}, "prompt": "p", "response": "r"}\n'},
        "samples.jsonl:1 is damaged: its 'row_id'",
    ),
    "an answer that is no text": (
        {"samples.jsonl": b'{"step": 1, "row_id": "a", "prompt": "p", "response": [1]}\n'},
        "samples.jsonl:1 is damaged: its 'response'",
    ),
    "brackets": ({"metrics.jsonl": b"[" * 200_000 + b"\n"}, "metrics.jsonl:1 is damaged"),
    "a step beyond any": (
        {"metrics.jsonl": b'{"step": 1' + b"0" * 400 + b"}\n"},
        "metrics.jsonl:1 is damaged: its 'step'",
    ),
    "a step below any": ({"metrics.jsonl": b'{"step": -1}\n'}, "metrics.jsonl:1 is damaged: its 'step'"),
    "counts that are none": ({"data.json": b'{"train": [1]}'}, "data.json is damaged"),
    "counts of nothing": ({"data.json": b'{"train": {"prompts_cut": "x"}}'}, "data.json is damaged"),
    "counts in brackets": ({"data.json": b"[" * 200_000}, "is not valid JSON"),
    "no YAML": ({"config.yaml": b"run: [\n"}, "is not valid YAML"),
    "no checkpoint": ({"checkpoints": None}, "has no complete checkpoint"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_cannot_be_reported_is_one_clear_error(world, tmp_path, capsys, name):
    files, reason = DAMAGE[name]
    folder = tmp_path / "run"
    if files is not None:
        shutil.copytree(world / "dpo", folder)
    for file, content in (files or {}).items():
        if content is not None:
            (folder / file).write_bytes(content)
        elif (folder / file).is_dir():
            shutil.rmtree(folder / file)
        else:
            (folder / file).unlink()
    assert main(["--run", str(folder), "--out", str(tmp_path / "page.html"), "--no-matrix"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert reason in told
    assert told.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "samples.jsonl", "data.json", "model"])
def test_a_folder_of_others_leads_nowhere_else(world, tmp_path, capsys, file):
    folder = shutil.copytree(world / "rpo", tmp_path / "run")
    shutil.move(folder / file, tmp_path / file)
    (folder / file).symlink_to(tmp_path / file)
    assert main(["--run", str(folder), "--out", str(tmp_path / "page.html"), "--no-rewards"]) == 2
    assert "leads out of" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_folder_of_others_shows_no_data_but_its_own(world, tmp_path, capsys):
    """Its configuration may name any file of whoever reports it, who passes the page on."""
    folder, page = shutil.copytree(world / "rpo", tmp_path / "run"), tmp_path / "page.html"
    secret = write_rows(tmp_path / "secret.jsonl", [{**row, "prompt": "secret"} for row in preference_rows(40)])
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(world / "data.jsonl"), str(secret)))
    arguments = ["--run", str(folder), "--out", str(page), "--no-rewards"]
    assert main(arguments) == 2
    assert f"{secret} does not hold the data that {folder} was trained on" in capsys.readouterr().err
    shutil.rmtree(folder / "checkpoints")
    assert main(arguments) == 2
    assert "was made in another place" in capsys.readouterr().err
    assert not page.exists()
    assert main([*arguments, "--no-matrix"]) == 0


def test_a_folder_s_name_is_a_name_and_a_number_beyond_all_a_gap(world, tmp_path, capsys):
    folder = shutil.copytree(world / "dpo", tmp_path / "{{data}}{% raw %}<b>\x1b[31m$(x)")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1' + "0" * 400 + ', "grad_norm": Infinity, "kl": {"a": 1}}\n')
    page = tmp_path / "\x1b[2J.html"
    assert main(["--run", str(folder), "--out", str(page), "--no-matrix", "--no-rewards"]) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "\\x1b[2J.html" in printed.out
    (run,) = data_of(page)["runs"]
    assert run["name"] == folder.name
    assert "{{data}}{% raw %}&lt;b&gt;" in page.read_text("utf-8")
    (loss,) = (panel for panel in data_of(page)["panels"] if panel["key"] == "loss")
    assert loss["curves"][0]["train"][-1] == [9, None]


@pytest.mark.parametrize("more", [["--out", "."], ["--out", "no/such/page.html"], ["--batch-step", "0"]])
def test_arguments_that_cannot_be_are_refused(world, more, capsys):
    assert main(["--run", str(world / "dpo"), *more]) == 2
    assert f"error: {more[0]}" in capsys.readouterr().err


def test_a_run_given_twice_is_refused(world, capsys):
    assert main(["--run", str(world / "dpo"), "--run", f"{world}/rpo/../dpo"]) == 2
    assert "more than once" in capsys.readouterr().err


@pytest.mark.slow
def test_a_lora_run_s_base_may_have_moved(world, tmp_path, capsys):
    """Its rewards need the base; the error says how to name it, and named it is used, the old path being gone."""
    base = export(world / "dpo", tmp_path / "base")
    changes = {"train.steps": 2, "lora.rank": 2, "model.path": base, "contrast.weights": "uniform"}
    run = rpo_jax.run(configured(world / "data.jsonl", tmp_path / "lora", world / "cache", changes)).run_dir
    moved, out = base.rename(tmp_path / "moved"), tmp_path / "page.html"
    arguments = ["--run", str(run), "--run", str(world / "dpo"), "--out", str(out), "--no-matrix"]
    assert main(arguments) == 2
    assert "--base says where it is" in capsys.readouterr().err
    assert not out.exists()
    assert main([*arguments, "--base", str(moved)]) == 0
    last = [line for line in metric_lines(run) if "eval_loss" in line][-1]
    (shown,) = (one["rewards"] for one in data_of(out)["runs"] if one["name"] == run.name)
    assert shown["sides"]["means"]["chosen"] == pytest.approx(last["eval_rewards/chosen"], abs=1e-4)
    capsys.readouterr()
    other = export(world / "rpo", tmp_path / "other")
    assert main([*arguments, "--base", str(other)]) == 2
    assert "are not those that the adapters" in capsys.readouterr().err
    assert main(["--run", str(world / "dpo"), "--base", str(moved)]) == 2
    assert "none of these is one" in capsys.readouterr().err


def told(world, tmp_path, name, lines, like="rpo"):
    """A run of these lines of metrics, as the report reads it."""
    folder = shutil.copytree(world / like, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_runs([str(folder)])[0]


def evaluated(step, loss, log_probs, rewards=None, ties=0.0):
    line = {"step": step, "eval_loss": loss, "eval_logps/accuracies": log_probs}
    return line if rewards is None else {**line, "eval_rewards/accuracies": rewards, "eval_rewards/ties": ties}


def test_the_verdict_says_what_came_out(world, tmp_path, monkeypatch):
    start = evaluated(0, 0.6931, 0.5, 0.0, 1.0)
    better, turned = evaluated(8, 0.5, 0.75, 0.875), evaluated(16, 0.52, 0.78, 0.9)
    good = told(world, tmp_path, "good", [start, {"step": 8, "loss": 0.5}, better])
    assert verdict([good]) == (
        "After 8 steps, rpo prefers the chosen response of 88 % of the held-out pairs by rewards (by log-probs 75 %, "
        "50 % before), and its held-out loss fell from 0.693 to 0.5."
    )
    late = told(world, tmp_path, "late", [start, better, turned, {"step": 16, "loss": 0.1, "guard/bad_steps": 2}])
    assert verdict([late, good]).endswith(
        "its held-out loss fell from 0.693 to 0.52; that loss was least at step 8 (0.5); 2 of the steps were skipped, "
        "bad_steps.jsonl says why; by log-probs it is level with good (78 % against 75 % of 8 pairs)."
    )
    many = replace(late, held_out=4000)
    assert verdict([many, good]).endswith("by log-probs it is ahead of good (78 % against 75 %).")
    assert verdict([replace(good, held_out=4000), late]).endswith("it is behind late (75 % against 78 %).")
    monkeypatch.setattr(Checkpoints, "best_step", lambda self: 8)
    assert "that loss was least at step 8 (0.5): `export --step best` takes the checkpoint of step 8" in verdict([late])
    assert "ties on every held-out pair by rewards" in verdict([told(world, tmp_path, "still", [start])])
    lost = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": math.nan}]
    assert verdict([told(world, tmp_path, "lost", lost)]) == (
        "After 2 steps, rpo has diverged: no loss was a finite number since step 1."
    )
    alone = told(world, tmp_path, "alone", [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}])
    assert verdict([alone, good]) == (
        "After 2 steps, rpo is done: its training loss fell from 3 to 2, and no held-out data says what that is worth."
    )
    sampled = [{"step": step, "round": step, "eval_reward": step / 2, "eval_kl": step / 4} for step in (0, 1, 2)]
    gone = told(
        world, tmp_path, "gone", [{"step": 2, "loss": 1.0}, evaluated(1, 0.7, 0.5), evaluated(2, math.nan, 0.6)]
    )
    assert verdict([gone]).endswith("and its held-out loss is no finite number.")
    assert verdict([told(world, tmp_path, "sampled", [*sampled, {"step": 2, "loss": 0.5}])]) == (
        "After 2 steps, rpo is done: the reward of its answers to held-out prompts rose from 0 to 1 at a KL to the "
        "start of 0.5 nats."
    )
    without = told(world, tmp_path, "without", [evaluated(0, 2.0, 0.5), evaluated(4, 1.0, 0.625)])
    assert "rpo finds the chosen response likelier in 62 % of the held-out pairs, 50 % before, and" in verdict(
        [without]
    )


# What a browser found on the page: a script in a second page looks into the report's frame, 390 wide as a phone.
PROBE = """<iframe id="f" src="report.html" style="width:{width}px;height:900px;border:0"></iframe>
<pre id="found"></pre><script>
document.getElementById("f").onload = (event) => {{
  const d = event.target.contentDocument, w = event.target.contentWindow, q = (s) => d.querySelectorAll(s).length;
  const newest = d.querySelector(".tip").textContent;
  const svg = d.querySelector("svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new w.PointerEvent("pointermove", {{clientX: box.right - 12, clientY: box.top + 40}}));
  const tip = svg.closest(".card").querySelector(".tip").textContent;
  const before = d.querySelector(".map h3").textContent;
  const titled = (title) => (c) => c.querySelector("h3")?.textContent.startsWith(title);
  const card = (title) => [...d.querySelectorAll(".card")].find(titled(title));
  const accuracy = card("Reward accuracy"), marks = () => card("Learning rate").querySelector("svg").textContent;
  const linear = marks(), [strength, log] = d.querySelectorAll(".controls input");
  strength.value = "0.5";
  strength.dispatchEvent(new w.Event("input"));
  const smoothed = q("path.smoothed");
  log.click();
  const canvas = d.querySelector("canvas"), map = canvas.getBoundingClientRect();
  canvas.dispatchEvent(new w.PointerEvent("pointerdown", {{clientX: map.left + 1, clientY: map.top + 1}}));
  d.querySelector(".frame").dispatchEvent(new w.KeyboardEvent("keydown", {{key: "ArrowDown"}}));
  const moved = d.querySelector(".map h3").textContent, menu = d.querySelector("select");
  menu.value = "1";
  menu.dispatchEvent(new w.Event("change"));
  document.getElementById("found").textContent = JSON.stringify({{drawn: d.documentElement.dataset.drawn, tip, moved,
    verdict: d.querySelector(".verdict").textContent, panel: d.querySelector(".map .card").textContent,
    smoothed, linear, newest, words: [...accuracy.querySelectorAll("text.word")].map((t) => t.textContent),
    columns: [...d.querySelectorAll("th.n")].map((t) => t.textContent),
    names: [...accuracy.querySelectorAll("text.name")].map((t) => t.textContent), logarithmic: marks(),
    svgs: q("svg"), sections: [...d.querySelectorAll("h2")].map((h) => h.textContent), before,
    wide: d.documentElement.scrollWidth, title: d.title, other: d.querySelector(".map h3").textContent}});
}};
</script>"""


@NEEDS_BROWSER
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_works_in_a_browser(page, width):
    probe = page.with_name("probe.html")
    probe.write_text(PROBE.format(width=width), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--virtual-time-budget=4000",
    ]
    done = subprocess.run(
        [str(BROWSER), *flags, f"--user-data-dir={page.parent}/profile", "--dump-dom", probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    told = re.search(r'<pre id="found">(.+?)</pre>', done.stdout)
    assert told is not None, done.stderr[-2000:]
    found = json.loads(told[1])
    assert found["drawn"] == "yes"
    assert found["wide"] <= width
    assert found["svgs"] >= 15
    assert found["newest"].startswith("step 3"), "what a card says before it is pointed at"
    assert found["tip"].startswith("step 3")
    assert found["words"] == ["tied", "tied"], "held-out pairs at step 0, a batch's at step 1: no accuracy of 0"
    assert found["columns"] == ["dpo, training", "dpo, held-out", "rpo, training", "rpo, held-out"]
    assert found["before"].startswith("Row ")
    assert found["moved"] == "Row 2, column 1"
    assert found["other"].startswith("Row ")
    assert found["sections"] == [
        "Final values",
        "Data",
        "Learning",
        "Contrast",
        "Throughput, packing and memory",
        "Contrast matrix of a batch",
        "Held-out rewards",
        "Samples",
        "Configuration",
    ]
    assert found["title"].startswith("dpo, rpo")
    assert found["verdict"].startswith("After 3 steps, dpo prefers the chosen response of ")
    assert "rejected response" in found["panel"]
    assert found["names"] == ["step", "share of pairs"]
    assert found["smoothed"] > 5
    assert found["logarithmic"] != found["linear"]


def test_the_command_prints_where_the_page_is(world, tmp_path):
    out = tmp_path / "page.html"
    command = [sys.executable, "-m", "rpo_jax.report", "--run", str(world / "rpo"), "--out", str(out)]
    done = subprocess.run([*command, "--no-matrix", "--no-rewards"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(out)
    assert data_of(out)["runs"][0]["steps"] == 4
