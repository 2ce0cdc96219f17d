"""The tokens that end an answer: one rule for `generate` and for the samples of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpo_jax.core.jsonl import parse_json
from rpo_jax.data.chat_template import ChatTemplate
from rpo_jax.models import ModelConfig
from rpo_jax.runs.folder import GENERATION_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_tokens(
    folder: Path | None,
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    template_arguments: Mapping[str, Any] | None = None,
) -> frozenset[int]:
    """The end tokens of the model, its folder's generation_config.json, the tokenizer and its chat template, together.

    Args:
        folder: of the model; None where it has none yet.

    Raises ValueError for a generation_config.json that is not a JSON object.
    """
    file, generation = folder and folder / GENERATION_CONFIG, {}
    if file is not None and file.is_file():
        try:
            generation = parse_json(file.read_bytes())
            generation.get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} is not a JSON object ({error}); copy it again, or remove it.") from None
    ends: set[Any] = set(ChatTemplate(tokenizer, template_arguments).end_ids if tokenizer.chat_template else ())
    for ids in (generation.get("eos_token_id"), model_config.eos_token_id, tokenizer.eos_token_id):
        ends |= set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
    return frozenset(ends)
