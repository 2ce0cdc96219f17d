"""Prompts with an answer each, for supervised fine-tuning: TRL's prompt-completion and messages, alpaca's rows."""

from __future__ import annotations

import re
from itertools import chain

from rpo_jax.data.layouts.conditions import ALIASES, ASKED, PROMPT, USED
from rpo_jax.data.layouts.fields import Fields, is_metadata
from rpo_jax.data.layouts.layout import Layout, per_row
from rpo_jax.data.layouts.parts import Parts
from rpo_jax.data.layouts.unpaired import COMPLETION, one_answer

_READ = {"completion", *COMPLETION, PROMPT, *ASKED, *USED, *chain(*ALIASES.values())}
_JUDGED = re.compile(r"label|tag|score|reward|rating|rank|chosen|rejected|margin|preferred|win", re.IGNORECASE)


def parse(values: Fields) -> Parts:
    """A chosen response: the completion, or the last turn of a conversation."""
    return one_answer(values, lambda: "chosen")


def recognise(values: Fields) -> bool:
    """Where nothing else stands in a row that may be an answer or say how good one is."""
    return all(name in _READ or (is_metadata(name, "a text") and not _JUDGED.search(name)) for name in values)


LAYOUT = Layout(
    read=per_row(parse),
    columns=("completion",),
    description="supervised fine-tuning: prompt and completion, messages, or instruction, input and output",
    prompt=(PROMPT, *ASKED),
    aliases={"completion": COMPLETION},
    recognise=recognise,
)
