"""TRL's unpaired preference layout: prompt, completion, label; LLaMA-Factory's KTO files too."""

from __future__ import annotations

from collections.abc import Callable

from rpo_jax.data.layouts.conditions import ASKED, PROMPT, prompt_field, states
from rpo_jax.data.layouts.fields import Fields, field, label_field
from rpo_jax.data.layouts.layout import Layout, per_row
from rpo_jax.data.layouts.messages import text_or_messages
from rpo_jax.data.layouts.parts import Parts, answered, is_conversation, shared_conversation

COMPLETION = ("response", "output", "messages", "conversations", "conversation")  # what else it is called


def parse(values: Fields) -> Parts:
    """A chosen response where `label` is true or 1, a rejected one where it is false or 0; text as it is."""
    return one_answer(values, lambda: "chosen" if label_field(values, "label") else "rejected")


def one_answer(values: Fields, kind: Callable[[], str]) -> Parts:
    """The response of a row that has one, of what kind it is once that is read.

    A completion that is a whole conversation is answered by its last turn, and needs no prompt beside it.
    """
    prompt = prompt_field(values)
    completion = text_or_messages(values, "completion")
    answers, kinds = {"completion": completion}, (kind(),)
    if is_conversation(completion, least=1 if prompt is None else 2):
        return states(prompt, shared_conversation(answers, kinds), values)
    return answered(field(values, PROMPT) if prompt is None else prompt, answers, kinds)


LAYOUT = Layout(
    read=per_row(parse),
    columns=("completion", "label"),
    description="TRL unpaired preference data: prompt, completion, label (true or false)",
    prompt=(PROMPT, *ASKED),
    aliases={"completion": COMPLETION, "label": ("kto_tag",)},
)
