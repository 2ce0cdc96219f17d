"""Raw Anthropic HH-RLHF transcripts: chosen and rejected as "\\n\\nHuman: ...\\n\\nAssistant: ..." texts."""

from __future__ import annotations

import re

from rpo_jax.core.records import Message
from rpo_jax.data.layouts.fields import Fields, Unusable, text_field
from rpo_jax.data.layouts.layout import Layout, per_row
from rpo_jax.data.layouts.parts import Parts, common_prefix, pair

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse(values: Fields) -> Parts:
    """The prompt is the longest common prefix of both texts, backed up to the last "\\n\\nAssistant:".

    What follows it is the response, also where it runs into further turns (5 of 2,312 rows of the harmless test
    split do). Turns and responses are stripped. Source: arXiv 2204.05862's release, github.com/anthropics/hh-rlhf.
    """
    chosen, rejected = text_field(values, "chosen"), text_field(values, "rejected")
    shared = common_prefix(chosen, rejected)
    cut = shared.rfind(_ASSISTANT)
    if cut < 0 or not shared.startswith(_HUMAN):
        raise Unusable("no shared prompt: the texts do not begin with the same Human and Assistant turns")
    responses = [text[cut + len(_ASSISTANT) :].strip() for text in (chosen, rejected)]
    return pair(_messages(shared[:cut]), *responses)._replace(implicit=True)


def _messages(transcript: str) -> tuple[Message, ...]:
    pieces = _TURN.split(transcript)[1:]
    messages: list[Message] = []
    for name, content in zip(pieces[::2], pieces[1::2], strict=True):
        role, content = _ROLES[name], content.strip()
        # A few transcripts repeat a speaker's mark; chat templates want roles to alternate.
        if messages and messages[-1].role == role:
            content = f"{messages.pop().content}\n\n{content}"
        messages.append(Message(role, content))
    return tuple(messages)


def _is_transcript(values: Fields) -> bool:
    texts = (values["chosen"], values["rejected"])
    return "prompt" not in values and all(
        isinstance(text, str) and text.startswith(_HUMAN) and _ASSISTANT in text for text in texts
    )


LAYOUT = Layout(
    read=per_row(parse),
    columns=("chosen", "rejected"),
    description="Anthropic/hh-rlhf: chosen and rejected transcripts of Human and Assistant",
    recognise=_is_transcript,
)
