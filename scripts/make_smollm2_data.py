"""Write the quickstart's preference pairs and held-out prompts: `python scripts/make_smollm2_data.py [--out DIR]`.

SmolLM2-135M-Instruct answers every training prompt of configs/data/smollm2_prompts.json several times, and VADER scores
the answers' sentiment. Of the answers that are whole, plain and about their topic, the two that differ most make a
pair, if the better one is hardly the longer one: what is praised here is not to be length.

The bundled pairs are of the package's 4-bit weights; other weights, or the rounding of another machine, give other
answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from fetch_smollm2 import DEFAULT_FOLDER, fetch
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rpo_jax.core.command import run_command
from rpo_jax.core.jsonl import read_jsonl, write_jsonl
from rpo_jax.sampling.engine import Sampling
from rpo_jax.sampling.generation import GenerateConfig, generate

DATA = Path(__file__).resolve().parents[1] / "configs" / "data"
PROMPTS = DATA / "smollm2_prompts.json"
TRAIN, HELD_OUT = "smollm2_train.jsonl", "smollm2_held_out.jsonl"
SYSTEM = {"role": "system", "content": "Be brief."}
SAMPLES = 4  # of every prompt
TEMPERATURE = 0.8
MAX_TOKENS = 40
MIN_WORDS = 6
POSITIVE = 0.05  # VADER's own threshold of positive text
MIN_DIFFERENCE = 0.2  # between the scores of a pair
RATIOS = 0.9, 1.4  # of their lengths in words, the rejected one's to the chosen one's


def prompts(part: str) -> list[dict[str, str]]:
    """Topic and text of the prompts of `train` or `held_out`, which share no topic."""
    content = json.loads(PROMPTS.read_text(encoding="utf-8"))
    return [
        {"topic": topic, "text": question.format(topic=topic)}
        for topic in content[part]
        for question in content["questions"]
    ]


def names_topic(topic: str, answer: str) -> bool:
    """Whether an answer has the last word of its topic, its beginning at least (`tyres` for `tyre`)."""
    return topic.split()[-1].lower()[:5] in answer.lower()


def pairs(answers: Sequence[dict[str, Any]], asked: Sequence[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Of every prompt the two usable answers that differ most, the better one positive and hardly the longer one.

    Args:
        answers: rows that rpo_jax.generate writes, those to one prompt together.
    """
    score = SentimentIntensityAnalyzer().polarity_scores
    topic_of = {one["text"]: one["topic"] for one in asked}
    for prompt, found in groupby(answers, key=lambda row: row["prompt"]):
        topic = topic_of[prompt[-1]["content"]]
        usable = [row["response"] for row in found if _is_usable(row, topic)]
        scored = sorted((score(response)["compound"], response) for response in usable)
        apart = [pair for pair in combinations(scored, 2) if _differ(*pair)]
        if not apart:
            continue
        (low, rejected), (high, chosen) = max(apart, key=lambda pair: pair[1][0] - pair[0][0])
        yield {
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "score_chosen": high,
            "score_rejected": low,
        }


def _is_usable(answer: dict[str, Any], topic: str) -> bool:
    """Whole, one line of plain letters, about its topic."""
    text = answer["response"]
    whole = answer["finish_reason"] == "eos" and len(text.split()) >= MIN_WORDS
    return whole and text.isascii() and "\n" not in text and names_topic(topic, text)


def _differ(low: tuple[float, str], high: tuple[float, str]) -> bool:
    """Whether the second of two scored answers is positive, the first is not nearly as much, and about as long."""
    ratio = len(low[1].split()) / len(high[1].split())
    return high[0] >= POSITIVE and high[0] - low[0] >= MIN_DIFFERENCE and RATIOS[0] <= ratio <= RATIOS[1]


def turns(text: str) -> list[dict[str, str]]:
    """A prompt as the model is asked it."""
    return [SYSTEM, {"role": "user", "content": text}]


def messages(asked: Sequence[dict[str, str]], times: int = 1) -> list[dict[str, Any]]:
    """Rows that rpo_jax.generate answers."""
    return [{"messages": turns(one["text"])} for one in asked for _ in range(times)]


def make(out: Path, work: Path, model: Path) -> None:
    """Sample answers into `work`, where a second start goes on, and write the files into `out`."""
    print(fetch(model))
    work.mkdir(parents=True, exist_ok=True)
    asked, file = prompts("train"), work / "prompts.jsonl"
    write_jsonl(file, messages(asked, SAMPLES))
    config = GenerateConfig(
        model=str(model),
        prompts=str(file),
        out=str(work / "answers.jsonl"),
        sampling=Sampling(temperature=TEMPERATURE),
        max_tokens=MAX_TOKENS,
        batch_size=96,
    )
    found = list(pairs(read_jsonl(generate(config)), asked))
    write_jsonl(out / TRAIN, found)
    write_jsonl(out / HELD_OUT, messages(prompts("held_out")))
    print(f"{out / TRAIN}: {len(found)} pairs of {len(asked)} prompts")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write the quickstart's preference pairs and held-out prompts as JSONL."
    )
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, default=Path("runs/smollm2_data"), help="folder of the samples")
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER.expanduser())
    arguments = parser.parse_args(argv)
    return run_command(lambda: make(arguments.out, arguments.work, arguments.model))


if __name__ == "__main__":
    raise SystemExit(main())
