"""A trained and exported model goes through lm-eval, offline, by the task and the command of the documentation."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import rpo_jax
from rpo_jax.export import export
from tests.runs import configured, metric_lines, preference_rows, write_rows
from tests.test_docs import DOCS, blocks, shell_lines

pytest.importorskip("lm_eval", reason="lm-eval is not installed")


@pytest.mark.slow
def test_an_exported_model_goes_through_lm_eval(tmp_path):
    rows = preference_rows(40)
    write_rows(tmp_path / "held_out.jsonl", rows[32:])
    data, tasks = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "tasks"
    changes = {"train.steps": 16, "objective.name": "dpo", "optim.learning_rate": 3e-3}
    run = rpo_jax.run(configured(data, tmp_path / "run", tmp_path / "cache", changes)).run_dir
    export(run, tmp_path / "aligned")

    (task,) = (block for block in blocks(DOCS / "commands.md", "yaml") if block.startswith("# lm-eval"))
    tasks.mkdir()
    (tasks / "preferences.yaml").write_text(task, encoding="utf-8")
    (line,) = (line for line in shell_lines(DOCS / "commands.md") if "lm_eval --model" in line)
    variables, words = line.split("lm_eval ", 1)
    assert variables == "HF_DATASETS_OFFLINE=1 "
    environment = {"PATH": str(Path(sys.executable).parent), "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    environment |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lm_eval", *shlex.split(words)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "lm_eval").rglob("results_*.json")
    found = json.loads(results.read_text(encoding="utf-8"))["results"]["held_out_preferences"]["acc,none"]
    before, *_, after = (line["eval_logps/accuracies"] for line in metric_lines(run) if "eval_loss" in line)
    assert after > max(before, 0.8)
    assert found == pytest.approx(after, abs=0.13), "one pair of eight may hang on the end token"
