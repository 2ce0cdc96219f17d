"""What a layout finds in a row, and the checks that hold whatever the layout."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rpo_jax.core.records import Message, PreferenceExample, Response
from rpo_jax.data.layouts.fields import Unusable
from rpo_jax.data.layouts.messages import spoken, turns_text

Prompt = str | tuple[Message, ...]


class Parts(NamedTuple):
    """What a layout finds in a row.

    implicit: the prompt is what the answers begin with, and no column says that it is.
    prefilled: the prompt may end with a turn of the assistant, which responses continue.
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    template_arguments: str = ""
    implicit: bool = False
    prefilled: bool = False


def pair(prompt: Prompt, chosen: str, rejected: str) -> Parts:
    """A prompt with one response of each kind."""
    return Parts(prompt, (Response("chosen", chosen), Response("rejected", rejected)))


def response_of(kind: str, answer: Prompt) -> Response:
    """A response that is a text, or turns of which one may be all: its text says all that it has."""
    if isinstance(answer, str):
        return Response(kind, answer)
    first, *others = answer
    if not others and not first.more:
        return Response(kind, first.content)
    text = "\n\n".join(part for part in (spoken(first), turns_text(others)) if part)
    return Response(kind, text, turns=answer)


def answered(prompt: Prompt, answers: Mapping[str, Prompt], kinds: Sequence[str]) -> Parts:
    """A stated prompt with its answers, by column: texts, or turns that begin and end with the assistant's.

    An assistant's message answers a user's, so a text before one is a user's turn.
    """
    for name, turns in answers.items():
        roles = [] if isinstance(turns, str) else [turn.role for turn in turns]
        if not isinstance(turns, str) and {*roles[:1], *roles[-1:]} != {"assistant"}:
            raise Unusable(f"column '{name}' is not one assistant turn: its roles are {', '.join(roles) or 'none'}")
    if isinstance(prompt, str) and not all(isinstance(answer, str) for answer in answers.values()):
        prompt = (Message("user", prompt),)
    responses = tuple(response_of(kind, answer) for kind, answer in zip(kinds, answers.values(), strict=True))
    return Parts(prompt, responses, prefilled=True)


def shared_conversation(answers: Mapping[str, Prompt], kinds: Sequence[str]) -> Parts:
    """Whole conversations, by column, parted into the turns that they share and the rest, which answers them.

    The rest begins where the assistant first says something else, or, if the user does, with the assistant's turn
    before that; of a single conversation it is the last turn.
    """
    talks = []
    for name, turns in answers.items():
        if isinstance(turns, str):
            raise Unusable(f"column '{name}' does not hold messages: got str")
        if not turns or turns[-1].role != "assistant":
            raise Unusable(f"column '{name}' does not end with an assistant turn")
        talks.append(turns)
    cut = min(map(len, talks)) - 1
    while any(talk[:cut] != talks[0][:cut] for talk in talks):
        cut -= 1
    while cut > 0 and (talks[0][cut - 1].role == "assistant" or any(talk[cut].role != "assistant" for talk in talks)):
        cut -= 1
    if cut < 1:
        raise Unusable("no shared prompt: the conversations differ before the assistant's first turn, or begin with it")
    responses = tuple(response_of(kind, talk[cut:]) for kind, talk in zip(kinds, talks, strict=True))
    return Parts(talks[0][:cut], responses, implicit=True)


def is_conversation(answer: Prompt, least: int = 2) -> bool:
    """Whether an answer has its prompt in front: messages, at least so many, that do not begin with the assistant's."""
    return not isinstance(answer, str) and len(answer) >= least and answer[0].role != "assistant"


def common_prefix(first: str, second: str) -> str:
    """The characters that both texts begin with."""
    shorter = range(min(len(first), len(second)))
    # Long transcripts: comparing character by character takes three times as long.
    return first[: bisect.bisect_left(shorter, True, key=lambda n: first[: n + 1] != second[: n + 1])]


def finish(row_id: str, parts: Parts) -> PreferenceExample:
    """The example made of `parts`; Unusable for what no training can use."""
    prompt = parts.prompt
    if isinstance(prompt, tuple):
        last = prompt[-1].role if prompt else "nothing"
        if last not in ("user", "tool", "assistant" if parts.prefilled else "user"):
            raise Unusable(f"prompt does not end with a user turn: it ends with {last}")
        blank = last != "tool" and not spoken(prompt[-1]).strip()
    else:
        blank = not prompt.strip()
    if blank:
        raise Unusable("empty prompt")
    texts = [prompt] if isinstance(prompt, str) else [text for turn in prompt for text in (turn.content, turn.more)]
    texts.append(parts.template_arguments)
    for response in parts.responses:
        if not (spoken(response.turns[-1]) if response.turns else response.text).strip():
            raise Unusable(f"empty {response.kind} response")
        texts += [response.text, *(turn.content for turn in response.turns)]
    chosen, rejected = (
        {(one.text, one.turns) for one in parts.responses if one.kind == kind} for kind in ("chosen", "rejected")
    )
    if chosen & rejected:
        raise Unusable("chosen equals rejected")
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise Unusable(f"not valid unicode text: lone surrogate U+{code:04X}") from None
        if "\0" in text:  # other control characters may be meant; this one ends the text for half of all programs
            raise Unusable("null character: a text holds U+0000")
    return PreferenceExample(row_id, prompt, parts.responses, parts.template_arguments)
