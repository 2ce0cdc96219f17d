"""The prompts that a run with rounds answers: read, shared out between training and held-out ones, encoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from rpo_jax.config import DataConfig
from rpo_jax.core.records import PreferenceData, TokenizedExample
from rpo_jax.data.prompts import PromptRow, PromptSet, read_prompts
from rpo_jax.data.tokenize import PromptEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RoundPrompts(NamedTuple):
    """Prompts to answer, and their token ids as examples without responses."""

    rows: tuple[PromptRow, ...]
    data: PreferenceData


def read_parts(data: DataConfig) -> dict[str, tuple[str, PromptSet]]:
    """The prompts of `train` and, where there are any, `held_out`, each with where they come from.

    Raises ValueError for files without prompts, and where data.eval_rows leaves none to train on.
    """
    if data.path is None:
        raise ValueError("data.path is not set; give a file, a folder or a hub data set with prompts.")
    path, asked = data.path, _read_prompts(data, data.path, data.split)
    held_out: dict[str, tuple[str, PromptSet]] = {}
    if data.eval_path is not None:
        held_out["held_out"] = data.eval_path, _read_prompts(data, data.eval_path, data.eval_split)
    elif data.eval_rows:
        if data.eval_rows >= len(asked.rows):
            raise ValueError(
                f"data.eval_rows={data.eval_rows} leaves nothing to train on: {path} has {len(asked.rows)} prompts."
            )
        held_out["held_out"] = path, replace(asked, rows=asked.rows[-data.eval_rows :])
        asked = replace(asked, rows=asked.rows[: -data.eval_rows])
    return {"train": (path, replace(asked, rows=asked.rows[: data.train_rows])), **held_out}


def _read_prompts(data: DataConfig, path: str, split: str) -> PromptSet:
    return read_prompts(
        path, split=split, layout=data.layout, columns=data.columns or None, ignore_columns=data.ignore_columns
    )


def encoded_prompts(
    data: DataConfig, path: str, asked: PromptSet, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> RoundPrompts:
    """The prompts that can be answered, each text once, and their token ids.

    Those that are too long are left out and told: what is answered and what is trained on would be cut otherwise.
    Raises ValueError, with the row, for a prompt that cannot be encoded, and where none is left.
    """
    encoder = PromptEncoder(tokenizer, data.template, data.template_arguments, None, asked.truncation_side)
    kept: list[PromptRow] = []
    examples: list[TokenizedExample] = []
    seen: set[Any] = set()
    too_long = 0
    for row in asked.rows:
        if row.template_arguments:
            raise ValueError(
                f"{row.row_id}: train.rounds cannot give tools and the like to the template; leave it out."
            )
        try:
            ids = encoder.encode(row.prompt)
        except ValueError as error:
            raise ValueError(f"{row.row_id}: {error}; mend the row, or leave it out.") from None
        if not len(ids):
            raise ValueError(f"{row.row_id}: the prompt is empty, and the tokenizer has no BOS to stand for it.")
        too_long += len(ids) > data.max_prompt_tokens
        if len(ids) <= data.max_prompt_tokens and row.prompt not in seen:
            seen.add(row.prompt)
            kept.append(row)
            examples.append(TokenizedExample(row.row_id, len(examples), (ids,), ()))
    if too_long:
        say(f"{path}: {too_long} prompts of more than data.max_prompt_tokens={data.max_prompt_tokens} left out")
    if not kept:
        raise ValueError(
            f"{path}: no prompt has at most data.max_prompt_tokens={data.max_prompt_tokens} tokens; raise it."
        )
    return RoundPrompts(tuple(kept), PreferenceData(examples))
