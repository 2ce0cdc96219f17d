"""A preference task whose truth is known: answers about rpo_jax.tasks.quickstart's sixty topics, scored by its rule.

Every answer is an opener, a tip, a caution and a next step, each of which is good or not. A pair's answers differ in
what is good about them (one or two criteria, the chosen one better in each) and, by chance, in everything else. Where
a criterion is met by about half of the chosen answers, or by fewer, a model fitted to them does not learn to meet it:
preferences have to teach that. Prompts are related: six topics of a cluster share their cautions and next steps, and
all topics the openers and the times, so what is learnt from one prompt can help with another.

What it can say: whether an objective carries preferences over to prompts that were not in training, on a scale where
the truth is a rule. What it cannot: anything about language. Its sentences are of one form, every criterion weighs the
same, good and bad differ in a word, and labels are wrong only as often as `noise` says, and then at random.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rpo_jax.tasks import quickstart
from rpo_jax.tasks.quickstart import CRITERIA, TOPICS, Advice, Topic

TWO_CRITERIA_SHARE = 0.5  # where the chosen answer meets several; other pairs differ in one criterion
Row = dict[str, str | float]

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


@dataclass(frozen=True)
class GoldTask:
    """How much of the generated task is drawn, and how good its pairs are.

    Args:
        train_pairs: per topic.
        held_out_pairs: per topic, on other prompts.
        met: how likely a chosen answer meets each criterion, before one that meets none is drawn again.
        noise: share of training pairs whose answers are swapped. Held-out pairs are never wrong.
    """

    train_pairs: int = 34
    held_out_pairs: int = 4
    met: float = 0.5
    noise: float = 0.0

    def __post_init__(self) -> None:
        most = len(OPENINGS) * len(QUESTIONS) * min(len(topic.subjects) for topic in TOPICS)
        if self.train_pairs < 1 or self.held_out_pairs < 1 or self.train_pairs + self.held_out_pairs > most:
            raise ValueError(
                f"train_pairs={self.train_pairs} and held_out_pairs={self.held_out_pairs} must be at least 1 and "
                f"together at most {most}, the prompts that a topic has."
            )
        if not 0 < self.met < 1 or not 0 <= self.noise <= 1:
            raise ValueError(f"met={self.met} must be between 0 and 1, and noise={self.noise} from 0 to 1.")


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


def _criteria_of_pair(rng: random.Random, met: float) -> tuple[frozenset[str], frozenset[str]]:
    """What is good about the chosen and the rejected answer: a coin per criterion, then one or two lost."""
    chosen: list[str] = []
    while not chosen:
        chosen = [name for name in CRITERIA if rng.random() < met]
    lost = rng.sample(chosen, min(len(chosen), 1 + (rng.random() < TWO_CRITERIA_SHARE)))
    return frozenset(chosen), frozenset(chosen) - set(lost)


def _pairs_of(rng: random.Random, topic: Topic, count: int, met: float) -> list[Row]:
    rows: list[Row] = []
    for prompt in rng.sample(prompts_of(topic), count):
        chosen, rejected = (answer(rng, topic, good) for good in _criteria_of_pair(rng, met))
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


def make_rows(task: GoldTask, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out pairs in random order; a prompt is in one of them only."""
    rng = random.Random(seed)
    train, held_out = [], []
    for topic in TOPICS:
        rows = _pairs_of(rng, topic, task.train_pairs + task.held_out_pairs, task.met)
        train += rows[: task.train_pairs]
        held_out += rows[task.train_pairs :]
    for rows in (train, held_out):
        rng.shuffle(rows)
    # A generator of its own: at any noise the pairs are the same, and more noise swaps more of them.
    coins = random.Random(f"{seed} noise")
    return [_swapped(row) if coins.random() < task.noise else row for row in train], held_out


def _swapped(row: Row) -> Row:
    other = {"chosen": "rejected", "rejected": "chosen", "gold_chosen": "gold_rejected", "gold_rejected": "gold_chosen"}
    return {key: row[other.get(key, key)] for key in row}


def win(prompt: str, answer: str, other: str) -> float:
    """1 where the answer's gold score is higher than the other's, 0 where it is lower, 1/2 where they are equal."""
    own, against = quickstart.gold_score(prompt, answer), quickstart.gold_score(prompt, other)
    return (1 + (own > against) - (own < against)) / 2
