"""The quickstart's small world: what good advice on sixty topics sounds like, and a score that checks it.

Standard library only. The sentences are in quickstart.json. scripts/make_quickstart_data.py writes preference pairs
from them; `gold_score` judges any answer, a model's samples included.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

CRITERIA = ("courtesy", "advice", "caution", "next_step")

_TABLES = json.loads(files("rpo_jax.tasks").joinpath("quickstart.json").read_text(encoding="utf-8"))
# Both sides of every choice have the same number of words, so that length says nothing about quality.
COURTEOUS_OPENERS, CURT_OPENERS = _TABLES["courteous_openers"], _TABLES["curt_openers"]
DEFINITE_TIMES, VAGUE_TIMES = _TABLES["definite_times"], _TABLES["vague_times"]


class Advice(NamedTuple):
    """One piece of advice and the same advice with its decisive word replaced by a wrong one."""

    good: str
    bad: str


class Topic(NamedTuple):
    """Something people ask about; the topics of a cluster share their cautions and next steps."""

    name: str
    subjects: tuple[str, ...]  # how prompts name the topic
    tips: tuple[Advice, ...]
    cautions: tuple[Advice, ...]
    next_steps: tuple[str, ...]


def _advice(texts: list[str]) -> tuple[Advice, ...]:
    """From words of which some are "right/wrong"."""
    return tuple(Advice(re.sub(r"/[a-z]+", "", text), re.sub(r"[a-z]+/", "", text)) for text in texts)


TOPICS = tuple(
    Topic(
        name=name,
        subjects=tuple(topic["subjects"]),
        tips=_advice(topic["tips"]),
        cautions=_advice(shared["cautions"]),
        next_steps=tuple(shared["next_steps"]),
    )
    for shared in _TABLES["clusters"].values()
    for name, topic in shared["topics"].items()
)


def _sentences(text: str) -> list[str]:
    """Lower-case words of each sentence, single-spaced: punctuation and capitals do not decide a score."""
    sentences = (" ".join(re.findall(r"[a-z]+", part)) for part in re.split(r"[.!?]", text.lower()))
    return [sentence for sentence in sentences if sentence]


@lru_cache(maxsize=4096)
def find_topic(prompt: str) -> Topic | None:
    """The topic whose subject the prompt names; None where it names none of them."""
    text = f" {' '.join(_sentences(prompt))} "
    named = ((subject, topic) for topic in TOPICS for subject in topic.subjects if f" {subject} " in text)
    return max(named, key=lambda item: len(item[0]), default=("", None))[1]


def _only_good(choices: tuple[Advice, ...], sentences: list[str]) -> bool:
    return any(choice.good in sentences for choice in choices) and not any(
        choice.bad in sentences for choice in choices
    )


def criteria_met(prompt: str, response: str) -> dict[str, bool]:
    """Which of CRITERIA the response meets.

    courtesy: the first sentence is a courteous opener. advice: a tip that is right for the prompt's topic, and none
    that is wrong. caution: the same for the safety rules of the topic's cluster. next_step: the last sentence names
    a next step of the cluster and when to take it.
    """
    topic, sentences = find_topic(prompt), _sentences(response)
    if topic is None or not sentences:
        return dict.fromkeys(CRITERIA, False)
    last = {f"next {step} {time}" for step in topic.next_steps for time in DEFINITE_TIMES}
    return {
        "courtesy": sentences[0] in COURTEOUS_OPENERS,
        "advice": _only_good(topic.tips, sentences),
        "caution": _only_good(topic.cautions, sentences),
        "next_step": sentences[-1] in last,
    }


def gold_score(prompt: str, response: str) -> float:
    """Share of CRITERIA that the response meets, in [0, 1]; 0 for any text to a prompt on none of TOPICS."""
    met = criteria_met(prompt, response)
    return sum(met.values()) / len(met)
