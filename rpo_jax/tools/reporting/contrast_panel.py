"""The contrast matrix of a training batch, as the step computes it, with the prompts behind its rows and columns.

Letters: M chosen and N rejected responses of a batch, without its empty slots; E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from rpo_jax.config import Config, Method, resolve
from rpo_jax.core.records import Batch, Side
from rpo_jax.data.tokenizer import decode
from rpo_jax.objectives import contrast
from rpo_jax.training.prepare import Prepared, batches_of
from rpo_jax.training.scoring import weigh

MAX_SHOWN = 96  # rows and columns of a report's heat map: more cannot be told apart on a screen
MAX_CHARACTERS = 320  # of a prompt or a response


@dataclass(frozen=True)
class BatchContrast:
    """A batch's contrast matrix; rows and columns are ordered so that neighbours have related prompts.

    Attributes:
        weights: how much each chosen response is contrasted with each rejected one; 0 where that is not valid.
        mask: valid entries.
        cosine: similarity of the prompts; None where the weighting does not embed them.
        temperature: tau of each row; None where the weighting has none.
        perplexity: effective contrasts of each row.
        chosen_prompts, rejected_prompts: of rows and columns, cut in the middle where they are long.
        chosen, rejected: the responses of rows and columns, likewise.
        paired: whether row i and column i are one pair.
    """

    step: int
    weights: Float[np.ndarray, "M N"]
    mask: Bool[np.ndarray, "M N"]
    cosine: Float[np.ndarray, "M N"] | None
    temperature: Float[np.ndarray, "M"] | None
    perplexity: Float[np.ndarray, "M"]
    chosen_prompts: list[str]
    rejected_prompts: list[str]
    chosen: list[str]
    rejected: list[str]
    paired: bool


def batch_contrast(config: Config, prepared: Prepared, step: int = 1) -> BatchContrast:
    """The contrast matrix that training step `step`, counted from 1, sees.

    Raises ValueError for an objective that has no contrast matrix, and for a step below 1.
    """
    method = resolve(config)
    if method.weights is None:
        raise ValueError(f"objective.name={config.objective.name} contrasts no responses with each other.")
    if step < 1:
        raise ValueError(f"step={step} must be at least 1, the first training step.")
    batch = batches_of(config, prepared.train, prepared.responses, 1).batch_at(step - 1)
    weights, mask, temperature, perplexity = _weights(method, config.contrast.alpha, batch)
    chosen, rejected = batch.sides["chosen"], batch.sides["rejected"]
    embedded = chosen.embedding.shape[1] > 0
    cosine = np.asarray(contrast.cosine(chosen.embedding, rejected.embedding)) if embedded else None
    rows, columns = _order(batch, method.groups_of(len(batch.sides["chosen"].valid), method.group))
    columns = rows if method.paired else columns

    return BatchContrast(
        step=step,
        weights=weights[np.ix_(rows, columns)],
        mask=mask[np.ix_(rows, columns)],
        cosine=None if cosine is None else cosine[np.ix_(rows, columns)],
        temperature=None if temperature is None else temperature[rows],
        perplexity=perplexity[rows],
        chosen_prompts=_prompts(prepared, chosen, rows),
        rejected_prompts=_prompts(prepared, rejected, columns),
        chosen=_responses(prepared, "chosen", chosen, rows),
        rejected=_responses(prepared, "rejected", rejected, columns),
        paired=method.paired,
    )


def _weights(
    method: Method, alpha: float, batch: Batch
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """Weights and valid entries of the whole batch, nothing across groups; each row's temperature and perplexity."""
    from scipy.linalg import block_diag  # takes a third of a second

    groups = method.groups_of(len(batch.sides["chosen"].valid), method.group)
    chosen, rejected = (
        jax.tree.map(lambda x: jnp.asarray(x.reshape(groups, len(x) // groups, *x.shape[1:])), batch.sides[kind])
        for kind in ("chosen", "rejected")
    )
    matrix = weigh(method, alpha, chosen, rejected)
    temperature = None if matrix.temperature is None else np.asarray(matrix.temperature).ravel()
    perplexity = np.asarray(contrast.row_perplexity(matrix.weights, matrix.mask)).ravel()
    # The groups' matrices are blocks on the diagonal of the batch's.
    weights, mask = (np.asarray(block_diag(*np.asarray(blocks))) for blocks in (matrix.weights, matrix.mask))
    return weights, mask, temperature, perplexity


def _order(batch: Batch, groups: int) -> tuple[Int[np.ndarray, "M"], Int[np.ndarray, "N"]]:
    """Filled slots of both sides, group by group, in each so that neighbours have related prompts."""
    rows, columns, sides = [], [], (batch.sides["chosen"], batch.sides["rejected"])
    for number in range(groups):
        size = [len(side.valid) // groups for side in sides]
        slots = (number * count + np.arange(count) for count in size)
        chosen, rejected = (of[side.valid[of]] for side, of in zip(sides, slots, strict=True))
        embeddings = np.concatenate([sides[0].embedding[chosen], sides[1].embedding[rejected]])
        chain = np.array(_chain(embeddings), int)
        rows.append(chosen[chain[chain < len(chosen)]])
        columns.append(rejected[chain[chain >= len(chosen)] - len(chosen)])
    return np.concatenate(rows), np.concatenate(columns)


def _chain(embeddings: Float[np.ndarray, "S E"]) -> list[int]:
    """Each to its nearest that is left, from the first on: related ones come to lie together."""
    if not len(embeddings) or not embeddings.shape[1]:
        return list(range(len(embeddings)))
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    left, chain = np.ones(len(unit), bool), [0]
    left[0] = False
    while left.any():
        nearest = int(np.argmax(np.where(left, unit @ unit[chain[-1]], -np.inf)))
        left[nearest] = False
        chain.append(nearest)
    return chain


def _prompts(prepared: Prepared, side: Side, slots: Int[np.ndarray, "S"]) -> list[str]:
    examples = (prepared.train.examples[int(side.example_index[slot])] for slot in slots)
    return [_text(prepared, example.prompt_ids) for example in examples]


def _responses(prepared: Prepared, kind: str, side: Side, slots: Int[np.ndarray, "S"]) -> list[str]:
    """Of several responses of a kind to one prompt, the one in the slot."""
    texts = []
    for slot in slots:
        responses = prepared.train.examples[int(side.example_index[slot])].responses
        (ids, *_) = (one.ids for one in responses if (one.kind, one.text_id) == (kind, int(side.text_id[slot])))
        texts.append(_text(prepared, ids))
    return texts


def _text(prepared: Prepared, ids: Int[np.ndarray, "_"]) -> str:
    text = decode(prepared.tokenizer, ids.tolist(), skip_special_tokens=True).strip()
    half = MAX_CHARACTERS // 2
    return text if len(text) <= MAX_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def for_page(matrix: BatchContrast) -> dict[str, Any]:
    """What the page draws: the first MAX_SHOWN rows and columns; null where an entry is not valid."""
    shown = slice(0, MAX_SHOWN)
    weights = np.where(matrix.mask, matrix.weights, np.nan)[shown, shown]
    return {
        "step": matrix.step,
        "of": list(matrix.weights.shape),
        "weights": [[None if np.isnan(value) else float(f"{value:.3g}") for value in row] for row in weights],
        "cosine": None if matrix.cosine is None else np.round(matrix.cosine[shown, shown].astype(float), 3).tolist(),
        "temperature": None if matrix.temperature is None else [float(f"{x:.3g}") for x in matrix.temperature[shown]],
        "perplexity": [float(f"{x:.3g}") for x in matrix.perplexity[shown]],
        "rows": matrix.chosen_prompts[shown],
        "columns": matrix.rejected_prompts[shown],
        "chosen": matrix.chosen[shown],
        "rejected": matrix.rejected[shown],
        "paired": matrix.paired,
    }
