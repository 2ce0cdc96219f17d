"""What is compared, in which order, and what a judge says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from rpo_jax.core.records import Message

Choice = Literal["first", "second", "tie"]
Outcome = Literal["a", "b", "tie", "unparsable", "refused"]
Prompt = str | tuple[Message, ...]


class JudgingFailed(ValueError):
    """A judge cannot be asked, or what it gives is no verdict; the message says why, and is for the user."""


def turns(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt's messages; a string is a user's."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def as_json(prompt: Prompt) -> str | list[dict[str, Any]]:
    """A prompt as rows have it, and as a user's function gets it."""
    return prompt if isinstance(prompt, str) else [message.to_dict() for message in prompt]


class Pair(NamedTuple):
    """Two responses to one prompt; `key` names the prompt by what it says, and by its number among equal ones."""

    key: str
    row_id: str
    prompt: Prompt
    a: str
    b: str


class Comparison(NamedTuple):
    """A pair in the order in which a judge sees it."""

    pair: Pair
    a_first: bool

    @property
    def responses(self) -> tuple[str, str]:
        return (self.pair.a, self.pair.b) if self.a_first else (self.pair.b, self.pair.a)


class Verdict(NamedTuple):
    """A judge's word on one comparison.

    choice: None where the answer cannot be read as one.
    answer: what the judge said, or the scores that it gave.
    refused: the endpoint would not judge this comparison at all.
    cached: it was not asked for in this run.
    """

    choice: Choice | None
    answer: str
    refused: bool = False
    cached: bool = False
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def outcome(self, comparison: Comparison) -> Outcome:
        """Which of the two responses won, whatever the order was."""
        if self.refused:
            return "refused"
        if self.choice is None:
            return "unparsable"
        if self.choice == "tie":
            return "tie"
        return "a" if (self.choice == "first") == comparison.a_first else "b"


class Judge(Protocol):
    """Gives a verdict on every comparison, in any order, each with its index.

    sees_order: whether the order may change its mind.
    """

    name: str
    sees_order: bool

    def verdicts(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]: ...
