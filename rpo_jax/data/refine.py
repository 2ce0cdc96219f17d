"""Prompts after a text that asks for a good response: how a policy judges a pair when it is told what good means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rpo_jax.core.records import KINDS, TokenizedExample, TokenizedResponse
from rpo_jax.data.tokenize import encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REFINED = {kind.refines: name for name, kind in KINDS.items() if kind.refines}


def refined(
    examples: Sequence[TokenizedExample], text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[TokenizedExample]:
    """The examples with refined prompts, the text before the prompt as it has been cut, and responses that fit.

    One BOS stays at the start, where the tokenizer has one. Raises ValueError, naming the row, where nothing of a
    response fits.
    """
    (before,) = encode_prompts([text], tokenizer)
    has_bos = tokenizer.bos_token_id is not None
    made = []
    for example in examples:
        prompt = np.concatenate([before, example.prompt_ids[int(has_bos) :]])
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
