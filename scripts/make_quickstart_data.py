"""Write the quickstart's preference pairs: `python scripts/make_quickstart_data.py [--out DIR] [--seed N]`.

Every answer comes from one generator: an opener, a tip, a caution and a next step, each of which is good or not. A
pair's answers differ in what is good about them (one or two criteria, the chosen one better in each) and, by chance,
in everything else. Over the chosen answers each criterion is met about half of the time, so a model fitted to them
cannot tell chosen from rejected by likelihood: preferences have to teach that.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from rpo_jax import quickstart
from rpo_jax.quickstart import CRITERIA, TOPICS, Advice, Topic

TRAIN_PAIRS_PER_TOPIC, EVAL_PAIRS_PER_TOPIC = 34, 4
TWO_CRITERIA_SHARE = 0.5  # where the chosen answer meets several; other pairs differ in one criterion

OPENINGS = (
    "",
    "I am quite new to this. ",
    "I have one free hour. ",
    "My budget is very small. ",
    "I tried once and failed. ",
    "My sister would like to know. ",
    "I want to do it well. ",
    "It is my first time. ",
)
QUESTIONS = (
    "What should I know about {}?",
    "Can you give me some advice on {}?",
    "How can I get better at {}?",
    "What matters most when it comes to {}?",
    "Do you have a good tip about {}?",
    "What would you tell a friend about {}?",
    "How should I go about {}?",
    "What helps the most with {}?",
    "Please teach me something useful about {}.",
)


def prompts_of(topic: Topic) -> list[str]:
    return [
        opening + question.format(subject)
        for opening in OPENINGS
        for question in QUESTIONS
        for subject in topic.subjects
    ]


def _draw(rng: random.Random, options: Sequence[str]) -> str:
    """One of the options, the k-th with weight 1/k: as in real text, some phrases are much more common."""
    return rng.choices(options, weights=[1 / rank for rank in range(1, len(options) + 1)])[0]


def _side(choices: Sequence[Advice], good: bool) -> list[str]:
    return [choice.good if good else choice.bad for choice in choices]


def answer(rng: random.Random, topic: Topic, good: frozenset[str]) -> str:
    """An answer that meets exactly the criteria in `good`."""
    openers = quickstart.COURTEOUS_OPENERS if "courtesy" in good else quickstart.CURT_OPENERS
    times = quickstart.DEFINITE_TIMES if "next_step" in good else quickstart.VAGUE_TIMES
    sentences = (
        _draw(rng, openers),
        _draw(rng, _side(topic.tips, "advice" in good)),
        _draw(rng, _side(topic.cautions, "caution" in good)),
        f"next, {_draw(rng, topic.next_steps)} {_draw(rng, times)}",
    )
    return " ".join(_as_sentence(words) for words in sentences)


def _as_sentence(words: str) -> str:
    for name in ("saturday", "monday"):
        words = words.replace(name, name.capitalize())
    return words[0].upper() + words[1:] + "."


def criteria_of_pair(rng: random.Random) -> tuple[frozenset[str], frozenset[str]]:
    """What is good about the chosen and the rejected answer: a fair coin per criterion, then one or two lost."""
    chosen: list[str] = []
    while not chosen:
        chosen = [name for name in CRITERIA if rng.random() < 0.5]
    lost = rng.sample(chosen, min(len(chosen), 1 + (rng.random() < TWO_CRITERIA_SHARE)))
    return frozenset(chosen), frozenset(chosen) - set(lost)


def pairs_of(rng: random.Random, topic: Topic, count: int) -> list[dict[str, str | float]]:
    rows = []
    for prompt in rng.sample(prompts_of(topic), count):
        chosen, rejected = (answer(rng, topic, good) for good in criteria_of_pair(rng))
        rows.append(
            {
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "topic": topic.name,
                "gold_chosen": quickstart.gold_score(prompt, chosen),
                "gold_rejected": quickstart.gold_score(prompt, rejected),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's preference pairs as JSONL.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "configs" / "data")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    rng = random.Random(arguments.seed)
    train, held_out = [], []
    for topic in TOPICS:
        rows = pairs_of(rng, topic, TRAIN_PAIRS_PER_TOPIC + EVAL_PAIRS_PER_TOPIC)
        train += rows[:TRAIN_PAIRS_PER_TOPIC]
        held_out += rows[TRAIN_PAIRS_PER_TOPIC:]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("eval", held_out)):
        rng.shuffle(rows)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.out / f"quickstart_{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
