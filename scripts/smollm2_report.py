"""What the quickstart's RPO changed: sentiment and length of held-out answers, KL, four answers side by side.

Reads the answers that scripts/quickstart.sh has generated with the model and with the trained policy. Sentiment and
length are those of greedy answers; KL needs answers sampled at temperature 1. At the end transformers answers with the
exported folder, as anyone who serves it would.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from make_smollm2_data import POSITIVE, names_topic, prompts, turns
from rich.console import Console
from rich.table import Table
from rich.text import Text
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rpo_jax.core.command import run_command
from rpo_jax.core.jsonl import read_jsonl
from rpo_jax.core.records import Message
from rpo_jax.tools.comparing.measure import divergences
from rpo_jax.tools.judging.statistics import bootstrap

Answer = dict[str, Any]  # a row that rpo_jax.generate writes
SHOWN = 4


def sentiments(answers: Sequence[Answer]) -> Float[np.ndarray, "n"]:
    """VADER's compound score of every answer, -1 to 1. Source: Hutto & Gilbert 2014, ICWSM."""
    score = SentimentIntensityAnalyzer().polarity_scores
    return np.array([score(answer["response"])["compound"] for answer in answers])


def measures(answers: Sequence[Answer], topics: Sequence[str]) -> dict[str, Float[np.ndarray, "n"]]:
    """One number an answer under the name of what it measures.

    The last two tell a better answer from a trick: a policy that has found one phrase for everything repeats it, and
    leaves the topic.
    """
    texts = [answer["response"].strip() for answer in answers]
    scores = sentiments(answers)
    return {
        "sentiment (VADER, -1 to 1)": scores,
        "positive answers, share": (scores >= POSITIVE).astype(float),
        "tokens": np.array([float(answer["tokens"]) for answer in answers]),
        "ended by themselves, share": np.array([float(answer["finish_reason"] == "eos") for answer in answers]),
        "name their topic, share": np.array([float(names_topic(*one)) for one in zip(topics, texts, strict=True)]),
        "given once only, share": np.array([float(texts.count(text) == 1) for text in texts]),
    }


def with_interval(values: Float[np.ndarray, "n"]) -> str:
    """Mean and its 95 % bootstrap interval over prompts."""
    low, high = bootstrap(values, seed=0)
    return f"{values.mean():.2f} ({low:.2f} to {high:.2f})"


def table(before: Sequence[Answer], after: Sequence[Answer], topics: Sequence[str]) -> Table:
    """All measures of both, and their differences prompt by prompt."""
    first, second = measures(before, topics), measures(after, topics)
    made = Table(title=f"Greedy answers to {len(topics)} held-out prompts: mean (95 % interval)")
    for column in ("", "before", "after RPO", "difference"):
        made.add_column(column, justify="right" if column else "left")
    for name, values in first.items():
        made.add_row(name, *map(with_interval, (values, second[name], second[name] - values)))
    return made


def divergence(policy: Path, start: Path, sampled: Sequence[Answer]) -> Float[np.ndarray, "n"]:
    """log policy - log start of every answer that the policy sampled at temperature 1, nats; its mean estimates KL."""
    rows = [
        (tuple(Message(**turn) for turn in answer["prompt"]), answer["response"], answer["finish_reason"] == "eos")
        for answer in sampled
    ]
    return divergences(policy, start, rows)


def served(folder: Path, prompt: str) -> str:
    """transformers' greedy answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        turns(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**chat, max_new_tokens=40, do_sample=False)
    return str(tokenizer.decode(ids[0, chat["input_ids"].shape[1] :], skip_special_tokens=True))


def report(folder: Path, start: Path) -> None:
    console = Console(width=110)
    asked = prompts("held_out")
    before, after, sampled = (read_jsonl(folder / f"{name}.jsonl") for name in ("before", "after", "sampled"))
    topics = [one["topic"] for one in asked]
    console.print(table(before, after, topics))
    kl = divergence(folder / "rpo" / "hf", start, sampled)
    said = f"KL to the start, nats an answer (of {len(kl)} sampled at temperature 1): {with_interval(kl)}\n"
    console.print(said, markup=False, highlight=False)
    side = Table(show_lines=True)
    for column in ("prompt", "before", "after RPO"):
        side.add_column(column)
    step = len(asked) // SHOWN + 1  # one of each question, on topics far apart: not chosen by what was answered
    for number in range(0, len(asked), step):
        cells = [Text(asked[number]["text"])]
        for found in (before, after):
            score = sentiments([found[number]])[0]
            cells.append(Text(f"{found[number]['response'].strip()} ({score:+.2f})"))
        side.add_row(*cells)
    console.print(side)
    out = folder / "rpo" / "hf"
    question = asked[0]["text"]
    console.print(f"run folder    {folder / 'rpo'}\nHugging Face  {out}", markup=False, highlight=False)
    console.print(f"transformers  {question} -> {served(out, question)}", markup=False, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Report of the quickstart.")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the answers and of the run")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model that it started from")
    arguments = parser.parse_args(argv)
    return run_command(lambda: report(arguments.runs, arguments.model))


if __name__ == "__main__":
    raise SystemExit(main())
