"""Small random data and models that the tests of the upper packages share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rpo_jax import models
from rpo_jax.core.records import PreferenceData, TokenizedExample, TokenizedResponse
from rpo_jax.models import lora, quantization
from rpo_jax.models.projection import INT4_LEVELS, NF4, NF4_LEVELS, SCALE_LEVELS, Int4, Quantized
from tests.data.ragged import embedded, example

VOCAB = 96


def random_data(num_examples: int = 20, *, seed: int = 0, width: int = 8, mismatched: bool = False) -> PreferenceData:
    """Ragged token ids, and embeddings in a few clusters so that calibrated weights are not flat."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(3, VOCAB, rng.integers(low, high)).astype(np.int32)

    examples = [
        example(f"made.jsonl:{i + 1}", ids(4, 14), ids(2, 12), ids(2, 12), ids(2, 12) if mismatched else None, number=i)
        for i in range(num_examples)
    ]
    centres = rng.normal(size=(4, width))
    embeddings = centres[rng.integers(0, 4, num_examples)] + 0.3 * rng.normal(size=(num_examples, width))
    embeddings = embeddings.astype(np.float32)
    reference = (-10 + rng.normal(size=(num_examples, 3))).astype(np.float32)
    return embedded(examples, embeddings, reference=reference)


def with_more_responses(data: PreferenceData) -> PreferenceData:
    """The prompts with one to three further responses each, of either kind."""
    rng = np.random.default_rng(2)

    def more(number: int) -> list[TokenizedResponse]:
        return [
            TokenizedResponse(kind, rng.integers(3, VOCAB, rng.integers(2, 9)).astype(np.int32), 1000 + 9 * number + k)
            for k, kind in enumerate(rng.choice(["chosen", "rejected"], rng.integers(1, 4)))
        ]

    examples = [
        TokenizedExample(one.row_id, one.prompt_id, one.prompts, (*one.responses, *more(number)))
        for number, one in enumerate(data.examples)
    ]
    made = PreferenceData(examples)
    row = None if data.embeddings is None else made.example_index
    return dataclasses.replace(made, embeddings=data.embeddings, embedding_row=row)


def small_model(**changes) -> models.ModelConfig:
    sizes = {
        "family": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "tie_embeddings": False,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 64,
    }
    return models.new_config(**sizes | changes)


def quantized(model_config: models.ModelConfig, params: Any, dtype: str = "int8") -> Any:
    """Parameters as a rounded base has them, each matrix rounded whole.

    int8 by the equation: W ~ values * scale, scale = max over inputs |W| / 127. nf4 and int4 by the functions whose
    results tests/models/test_quantization.py holds against bitsandbytes' own.
    """
    flat = flatten_dict(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params))
    for path, _, layers, inputs, _ in lora.matrices(model_config).values():
        lead, rank = len(layers), len(inputs)
        if dtype == "int8":
            axes = tuple(range(lead, lead + rank))
            largest = np.max(np.abs(flat[path]), axis=axes, keepdims=True)
            scale = np.where(largest > 0, largest / 127, 1.0).astype(np.float32)
            flat[path] = Quantized(np.rint(flat[path] / scale).astype(np.int8), scale.squeeze(axes))
            continue
        sizes, (kind, levels) = flat[path].shape[:lead], quantization.BY_BLOCKS[dtype]
        parts = []
        for wide in flat[path].reshape(-1, *flat[path].shape[lead:]):
            blocks = quantization.in_blocks(wide, rank)
            scales = quantization.rounded_scales(np.max(np.abs(blocks), axis=1))
            parts.append((quantization.packed(blocks, levels), *scales))
        arrays = (np.stack(field) for field in zip(*parts, strict=True))
        flat[path] = kind(*(array.reshape(*sizes, *array.shape[1:]) for array in arrays))
    return unflatten_dict(flat)


def widened(model_config: models.ModelConfig, base: Any) -> Any:
    """The float32 parameters that a base of nf4 or int4 stands for, by NumPy and in another order of operations."""
    flat = dict(flatten_dict(base))
    for path, _, layers, inputs, outputs in lora.matrices(model_config).values():
        kernel, lead = jax.tree.map(np.asarray, flat[path]), len(layers)
        levels = {NF4: NF4_LEVELS, Int4: INT4_LEVELS}[type(flat[path])]
        codes = np.concatenate([kernel.values & 15, kernel.values >> 4], axis=lead + 1)
        of_scales = np.moveaxis(kernel.scales, lead, -1)  # output by output
        numbers = np.arange(np.prod(of_scales.shape[lead:])).reshape(of_scales.shape[lead:])
        lead_axes = (slice(None),) * lead
        offset = kernel.offset.reshape(*kernel.offset.shape, *(1,) * (of_scales.ndim - lead))
        scales = SCALE_LEVELS[of_scales] * kernel.steps[(*lead_axes, numbers // 256)] + offset
        wide = levels[codes] * np.expand_dims(np.moveaxis(scales, -1, lead), lead + 1)
        flat[path] = wide.reshape(*layers.values(), *inputs.values(), *outputs.values()).astype(np.float32)
    return unflatten_dict(flat)
