"""TRL's preference layout: prompt, chosen, rejected, each text or messages; the prompt may be implicit."""

from __future__ import annotations

import re

from rpo_jax.data.layouts.conditions import ASKED, PROMPT, check_rest, prompt_field, states
from rpo_jax.data.layouts.fields import Fields, Unusable
from rpo_jax.data.layouts.layout import Layout, per_row
from rpo_jax.data.layouts.messages import text_or_messages
from rpo_jax.data.layouts.parts import Parts, answered, common_prefix, is_conversation, pair, shared_conversation

_LAST_SPACE = re.compile(r"(\s+)\S*\Z")
_KINDS = ("chosen", "rejected")


def parse(values: Fields) -> Parts:
    """Prompt, chosen and rejected of one row; all text is kept as it is.

    Without a column for it, the prompt is what both responses begin with: the turns that they share, or whole
    words, the space before the responses staying with them, unless that is a line break, as after `assistant` where a
    template was rendered.
    """
    prompt = prompt_field(values)
    answers = {name: text_or_messages(values, name) for name in _KINDS}
    if any(map(is_conversation, answers.values())):
        return states(prompt, shared_conversation(answers, _KINDS), values)
    if prompt is not None:
        return answered(prompt, answers, _KINDS)
    chosen, rejected = answers.values()
    if isinstance(chosen, str) and isinstance(rejected, str):
        check_rest(values, (chosen, rejected), is_text=True)  # first: what they share may be nothing because of it
        return _shared_words(chosen, rejected)
    return shared_conversation(answers, _KINDS)


def _shared_words(chosen: str, rejected: str) -> Parts:
    cut = len(common_prefix(chosen, rejected))
    at_word_end = chosen[cut : cut + 1].isspace() and rejected[cut : cut + 1].isspace()
    if not at_word_end:
        space = _LAST_SPACE.search(chosen[:cut])
        # A line break ends what is before it; a space begins what is after.
        cut = 0 if space is None else space.end(1) if "\n" in space[1] else space.start()
    if not chosen[:cut].strip():
        raise Unusable("no shared prompt: chosen and rejected do not begin with the same words")
    return pair(chosen[:cut], chosen[cut:], rejected[cut:])._replace(implicit=True)


LAYOUT = Layout(
    read=per_row(parse),
    columns=("chosen", "rejected"),
    description="TRL preference data: prompt, chosen, rejected as text or messages; the prompt may be implicit",
    prompt=(PROMPT, *ASKED),
    aliases={"chosen": ("chosen_response",), "rejected": ("rejected_response",)},
)
