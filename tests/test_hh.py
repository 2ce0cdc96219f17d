"""The whole path on real Anthropic-HH transcripts, where the file is at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rpo_jax
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.runs.tracking import Reporter
from rpo_jax.tools.exporting import export
from rpo_jax.training.prepare import prepare

CONFIG = Path(__file__).parents[1] / "configs" / "hh_small.yaml"
HH = Path(__file__).parents[2] / "shared" / "data" / "hh-harmless-base-test.jsonl.gz"
needs_hh = pytest.mark.skipif(not HH.is_file(), reason=f"{HH.name} is not beside the repository")

SMALL = (
    "data.train_rows=48",
    "data.eval_rows=32",
    "data.max_prompt_tokens=48",
    "data.max_tokens=96",
    "model.vocab_size=512",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_layers=2",
    "model.num_heads=2",
    "batch.pairs=16",
    "train.steps=4",
    "train.log_every=1",
)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@needs_hh
@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_hh_transcripts_train_and_export(tmp_path, cache_dir, pairing):
    overrides = (f"run.dir={tmp_path / 'run'}", f"run.cache_dir={cache_dir}", f"data.path={HH}")
    result = rpo_jax.run(rpo_jax.load_config(CONFIG, [*overrides, *SMALL, f"data.pairing={pairing}"]))
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4
    assert losses[0] == pytest.approx(np.log(2), rel=1e-5), "before the first step every reward is 0"
    assert losses[-1] < losses[0]
    assert lines[-1]["eval_contrast/perplexity"] == pytest.approx(6, abs=1e-3)
    assert ("rewards/accuracies" in lines[1]) == (pairing == "paired")
    assert 0 < result.metrics["eval_rewards/accuracies"] < 1, "held-out pairs are compared in either setting"
    folder = export(result.run_dir, tmp_path / "hf")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}


@pytest.fixture(scope="module")
def hh_data():
    """The transcripts in tokens of a vocabulary learnt from them, at most 512 each."""
    settings = [f"data.path={HH}", "data.layout=hh_rlhf", "data.on_bad_row=skip", "contrast.weights=uniform"]
    return prepare(rpo_jax.load_config(None, settings), Reporter()).train


# Share of all positions that hold a token. Few pairs leave the last row part empty as often as many, of fewer rows.
PACKED = {
    ("paired", 64, 1): 0.93,
    ("unpaired", 64, 1): 0.95,
    ("paired", 64, 4): 0.92,
    ("unpaired", 64, 4): 0.93,
    ("paired", 8, 1): 0.85,
    ("unpaired", 8, 1): 0.87,
    ("paired", 8, 4): 0.80,
    ("unpaired", 8, 4): 0.75,
}


@needs_hh
@pytest.mark.parametrize(("pairing", "pairs", "rows_multiple"), PACKED)
def test_hh_rows_are_full(hh_data, pairing, pairs, rows_multiple):
    """Over whole epochs, their small last batches included, and later ones than the shapes are chosen by."""
    batches = PreferenceBatches(hh_data, pairs=pairs, pairing=pairing, seed=0, rows_multiple=rows_multiple)
    tokens, positions, used = 0, 0, set()
    for step in range(5 * batches.steps_per_epoch, 10 * batches.steps_per_epoch):
        batch = batches.batch_at(step)
        tokens += int(np.sum(batch.segment_ids > 0))
        positions += batch.tokens.size
        used.add(batch.tokens.shape)
    print(f"{pairing}, {pairs} pairs, rows by {rows_multiple}: {tokens / positions:.4f} in {sorted(used)}")
    assert tokens / positions > PACKED[pairing, pairs, rows_multiple]
    assert len(used) <= 6


@needs_hh
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_hh_small_as_configured(tmp_path):
    """As a user runs it: in a process of its own, compiled with optimisation."""
    command = [sys.executable, "-m", "rpo_jax.train", "--config", str(CONFIG), "--data.path", str(HH)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    folders = ["--run.dir", str(tmp_path / "run"), "--run.cache_dir", str(tmp_path / "cache")]
    subprocess.run([*command, *folders], env=environment, check=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = next(line for line in reversed(lines) if "loss" in line)
    held_out = next(line for line in reversed(lines) if "eval_loss" in line)
    assert trained["rewards/accuracies"] > 0.6, "it learns its training pairs"
    assert held_out["eval_rewards/accuracies"] > 0.5
