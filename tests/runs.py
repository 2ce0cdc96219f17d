"""Whole runs in small: preference files, configurations that train in seconds, and models made by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rpo_jax
from rpo_jax.config import Config

DISHES = ("bread", "soup", "rice", "tea", "pasta", "salad", "cake", "beans")
QUESTIONS = ("How do I make {}?", "Is {} good for me?", "What goes well with {}?", "How long does {} keep?")

# The smallest run that goes through everything; 8 pairs because 8 devices split a batch.
SMALL: dict[str, Any] = {
    "model.vocab_size": 300,
    "model.hidden_size": 32,
    "model.intermediate_size": 48,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "data.eval_rows": 8,
    "data.max_prompt_tokens": 40,
    "data.max_tokens": 120,
    "batch.pairs": 8,
    "optim.learning_rate": 1e-3,
    "optim.warmup_steps": 2,
    "train.log_every": 1,
}


def preference_rows(count: int = 32) -> list[dict[str, str]]:
    """Pairs whose chosen response can be told from the rejected one by its first word."""
    rows = []
    for i in range(count):
        dish = DISHES[i % len(DISHES)]
        prompt = QUESTIONS[i // len(DISHES) % len(QUESTIONS)].format(dish)
        rows.append({"prompt": prompt, "chosen": f"Gladly: {dish} {i}.", "rejected": f"No, not {dish} {i} again."})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    lines = [json.dumps(row) + "\n" for row in (preference_rows() if rows is None else rows)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def settings(data: Path, run_dir: Path, cache_dir: Path, changes: dict[str, Any]) -> list[str]:
    """`section.key=value` of a small run."""
    values = {**SMALL, "data.path": data, "run.dir": run_dir, "run.cache_dir": cache_dir, **changes}
    return [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in values.items()]


def configured(data: Path, run_dir: Path, cache_dir: Path, changes: dict[str, Any] | None = None) -> Config:
    return rpo_jax.load_config(None, settings(data, run_dir, cache_dir, changes or {}))


def stopped_and_whole(folder: Path, changes: dict[str, Any]) -> tuple[Callable[..., Any], list[dict[str, float]]]:
    """A run of two steps that goes on as far as the whole one beside it, with the same losses.

    Returns a function that runs it again with further changes, and its lines of metrics that have a loss.
    """
    data = write_rows(folder / "pairs.jsonl")
    changes = {"tracking.tensorboard": False, "train.steps": 4, **changes}

    def run(name: str, **more: Any) -> Any:
        return rpo_jax.run(configured(data, folder / name, folder / "cache", {**changes, **more}))

    run("whole")
    run("stopped", **{"train.steps": 2})
    run("stopped", **{"run.resume": "auto"})
    whole, stopped = (
        [line for line in without_timings(metric_lines(folder / name)) if "loss" in line]
        for name in ("whole", "stopped")
    )
    assert whole == stopped
    return run, stopped


def metric_lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


TIMINGS = {"tokens_per_second", "pairs_per_second", "step_seconds", "eval_seconds", "memory/host_gib"}


def without_timings(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]
