"""What the quickstart learnt: held-out accuracy and margins, gold score of greedy answers, and one of them.

Reads the two run folders that scripts/quickstart.sh trains, and samples their exported Hugging Face folders with
transformers, as anyone who serves them would.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from rpo_jax.tasks.quickstart import gold_score

RUNS = Path("runs/quickstart")
HELD_OUT = Path("configs/data/quickstart_eval.jsonl")
SHOWN = 0  # which held-out prompt's answer is printed
MAX_NEW_TOKENS = 64


def held_out_metrics(run_dir: Path) -> dict[str, float]:
    """The last held-out metrics of a run."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in reversed(lines) if "eval_loss" in line)


def greedy_answers(folder: Path, prompts: list[str]) -> list[str]:
    """Greedy answers of an exported model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.inference_mode():
        outputs = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    console = Console(width=100)
    rows = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    prompts = [row["prompt"] for row in rows]
    metrics, answers = {}, {}
    for name in ("sft", "rpo"):
        metrics[name] = held_out_metrics(RUNS / name)
        answers[name] = greedy_answers(RUNS / name / "hf", prompts)
    gold = {name: mean(map(gold_score, prompts, found)) for name, found in answers.items()}

    table = Table(title=f"Quickstart: {len(rows)} held-out pairs")
    for column in ("", "before (SFT)", "after (RPO)"):
        table.add_column(column, justify="right" if column else "left")
    margin = {name: found["eval_logps/chosen"] - found["eval_logps/rejected"] for name, found in metrics.items()}
    log_probs = {name: found["eval_logps/accuracies"] for name, found in metrics.items()}
    reward = metrics["rpo"]
    for label, before, after in (
        ("preference accuracy of the log-probs", f"{log_probs['sft']:.3f}", f"{log_probs['rpo']:.3f}"),
        # Before the first step policy and reference are the same model: every reward is 0, and nothing preferred.
        ("preference accuracy of the rewards", "all tied", f"{reward['eval_rewards/accuracies']:.3f}"),
        ("margin of the log-probs, nats", f"{margin['sft']:.2f}", f"{margin['rpo']:.2f}"),
        ("margin of the rewards", "0.00", f"{reward['eval_rewards/margins']:.2f}"),
        ("gold score of greedy answers, 0 to 1", f"{gold['sft']:.3f}", f"{gold['rpo']:.3f}"),
    ):
        table.add_row(label, before, after)
    console.print(table)
    console.print(f"run folder    {RUNS / 'rpo'}\nHugging Face  {RUNS / 'rpo' / 'hf'}\n", markup=False, highlight=False)
    console.print(f"prompt  {prompts[SHOWN]}", markup=False, highlight=False)
    for name in ("sft", "rpo"):
        score = gold_score(prompts[SHOWN], answers[name][SHOWN])
        console.print(f"{name}     {answers[name][SHOWN].strip()}  (gold {score:.2f})", markup=False, highlight=False)


if __name__ == "__main__":
    main()
