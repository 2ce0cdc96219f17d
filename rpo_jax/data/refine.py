"""Prompts after a text that asks for a good response: how a policy judges a pair when it is told what good means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rpo_jax.core.records import KINDS, TokenizedExample, TokenizedResponse
from rpo_jax.data.control_tokens import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REFINED = {kind.refines: name for name, kind in KINDS.items() if kind.refines}


def refined(
    examples: Sequence[TokenizedExample], text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[TokenizedExample]:
    """The examples with refined prompts, the text before the prompt as it has been cut, and responses that fit.

    What the tokenizer or its template puts in front stays there. Raises ValueError, naming the row, where nothing of a
    response fits.
    """
    encoder = TextEncoder(tokenizer)
    (before,) = encoder.encode([text])
    made = []
    for example in examples:
        own = example.prompt_ids
        start = encoder.num_leading(own)
        prompt = np.concatenate([own[:start], before, own[start:]])
        room = max_tokens - len(prompt)
        if room < 1:
            raise ValueError(
                f"{example.row_id}: objective.sr_prompt and the prompt take {len(prompt)} tokens, which leaves nothing "
                f"of data.max_tokens={max_tokens} for a response; raise it, or lower data.max_prompt_tokens."
            )
        again = [
            TokenizedResponse(_REFINED[response.kind], response.ids[:room], prompt=len(example.prompts))
            for response in example.responses
            if response.kind in _REFINED
        ]
        made.append(replace(example, prompts=(*example.prompts, prompt), responses=(*example.responses, *again)))
    return made
