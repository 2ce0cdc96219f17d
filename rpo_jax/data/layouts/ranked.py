"""Any number of scored responses to a prompt, as UltraFeedback has them; a rule makes them chosen and rejected."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from rpo_jax.core.records import Message, PreferenceExample, Response
from rpo_jax.data.layouts.conditions import ASKED, PROMPT, prompt_field, states
from rpo_jax.data.layouts.fields import Fields, Unusable, field, list_field, number_field, wrong_type
from rpo_jax.data.layouts.layout import Layout, per_row
from rpo_jax.data.layouts.messages import spoken, text_or_messages
from rpo_jax.data.layouts.parts import Parts, Prompt, answered, is_conversation, shared_conversation

_TEXTS = ("response", "text", "completion", "output", "answer", "content")
_SCORES = ("overall_score", "score", "rating", "reward", "fine-grained_score")


class AllEqual(Exception):
    """Scores of a row among which a rule that compares finds no difference."""


class Rule(NamedTuple):
    """Which of a prompt's responses are chosen; the others are rejected.

    name: in RULES. threshold: the least score of a chosen response, for the rule of this name alone.
    """

    name: str = "above_mean"
    threshold: float | None = None


ABOVE_MEAN = Rule()


def _top_half(scores: Sequence[float]) -> list[bool]:
    ordered = sorted(scores, reverse=True)
    border = ordered[len(ordered) // 2]
    # Of equal scores at the border none is above the others, unless nothing would be chosen.
    above = [score > border for score in scores]
    return above if any(above) else [score == border for score in scores]


# By name, from different scores to whether each response is chosen; `threshold` compares no scores with each other.
RULES: dict[str, Callable[[Sequence[float]], list[bool]]] = {
    "above_mean": lambda scores: [score > math.fsum(scores) / len(scores) for score in scores],
    "best": lambda scores: [score == max(scores) for score in scores],
    "top_half": _top_half,
}
THRESHOLD = "threshold"


def by_rule(example: PreferenceExample, rule: Rule) -> PreferenceExample:
    """The example with its responses chosen or rejected, each kind with what the rule is surest of in front.

    So a pair, which is the first response of each kind, is the best against the worst. Equal responses are one, whose
    score is the mean. Raises Unusable where there is nothing to compare, AllEqual where the scores are the same.
    """
    by_response: dict[tuple[str, tuple[Message, ...]], list[float]] = {}
    for response in example.responses:
        assert response.score is not None, "the layout scores its responses"
        by_response.setdefault((response.text, response.turns), []).append(response.score)
    scores = [math.fsum(of_one) / len(of_one) for of_one in by_response.values()]
    if rule.name == THRESHOLD:
        assert rule.threshold is not None, "checked with the configuration"
        is_chosen = [score >= rule.threshold for score in scores]
    elif len(scores) == 1:
        raise Unusable(f"one response: data.ranked_rule={rule.name} compares several; give it more, or use {THRESHOLD}")
    elif len(set(scores)) == 1:
        raise AllEqual(f"all scores are equal: {scores[0]:g}")
    else:
        is_chosen = RULES[rule.name](scores)
    made = [
        Response("chosen" if chosen else "rejected", text, score, turns)
        for (text, turns), score, chosen in zip(by_response, scores, is_chosen, strict=True)
    ]
    sides = (
        sorted((one for one in made if one.kind == kind), key=lambda one: sign * (one.score or 0.0))
        for kind, sign in (("chosen", -1), ("rejected", 1))
    )
    return replace(example, responses=tuple(one for side in sides for one in side))


def parse(values: Fields) -> Parts:
    """Every response with its score, all of one kind until `by_rule`; text as it is.

    A response is a text, turns of the assistant, a whole conversation, or an object with a text; scores are a list
    beside, or in the objects.
    """
    prompt = prompt_field(values)
    items = list_field(values, "responses")
    if not items:
        raise Unusable("no responses: column 'responses' is empty")
    scores = _scores(values, items)
    answers = {f"responses {number}": _answer(item) for number, item in enumerate(items, start=1)}
    for name, answer in answers.items():
        if not (answer if isinstance(answer, str) else "".join(map(spoken, answer[-1:]))).strip():
            raise Unusable(f"empty response: number {name.removeprefix('responses ')}")
    kinds = ("chosen",) * len(items)
    if any(map(is_conversation, answers.values())):
        parts = states(prompt, shared_conversation(answers, kinds), values)
    else:
        parts = answered(field(values, PROMPT) if prompt is None else prompt, answers, kinds)
    scored = (one._replace(score=score) for one, score in zip(parts.responses, scores, strict=True))
    return parts._replace(responses=tuple(scored))


def _is_object(item: Any) -> bool:
    """Whether it has a text and perhaps a score, and is no message."""
    return isinstance(item, Mapping) and not {"role", "from"} & set(item)


def _answer(item: Any) -> Prompt:
    if _is_object(item):
        key = next((key for key in _TEXTS if item.get(key) is not None), None)
        if key is None:
            raise Unusable(f"column 'responses' has an object without a text: it has none of {', '.join(_TEXTS)}")
        item = item[key]
    if item is None:
        raise wrong_type("responses", "texts or messages alone", item)
    return text_or_messages({"responses": item}, "responses")


def _scores(values: Fields, items: Sequence[Any]) -> list[float]:
    if "scores" in values or not all(map(_is_object, items)):
        scores = list_field(values, "scores")
        if len(scores) != len(items):
            raise Unusable(f"{len(items)} responses have {len(scores)} scores: each needs its own")
        return [_number(score, "scores", number) for number, score in enumerate(scores, start=1)]
    keys = [next((key for key in _SCORES if item.get(key) is not None), None) for item in items]
    if None in keys:
        raise Unusable(f"column 'scores' is missing: response {keys.index(None) + 1} has none of {', '.join(_SCORES)}")
    return [_number(item[key], str(key), number) for number, (item, key) in enumerate(zip(items, keys, strict=True), 1)]


def _number(value: Any, name: str, number: int) -> float:
    try:
        return number_field({name: value}, name)
    except Unusable as reason:
        raise Unusable(f"{reason} (response {number})") from None


def _is_ranked(values: Fields) -> bool:
    """Lists of scored responses; where a row says which are chosen and rejected, it is a pair with more beside."""
    return not any(name in values for name in ("chosen", "rejected"))


LAYOUT = Layout(
    read=per_row(parse),
    columns=("responses",),
    description="a prompt, any number of responses and their scores; openbmb/UltraFeedback's completions",
    prompt=(PROMPT, *ASKED),
    also=("scores",),
    aliases={"responses": ("completions", "generations"), "scores": ("ratings", "rewards")},
    recognise=_is_ranked,
    ranks=True,
)
