"""Logits equal those of transformers' torch models.  `pytest tests/models -s -k parity` prints the figures.

Largest difference of a logit: case, family, in plain rows, in padded ones, in packed ones, and the largest logit.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rpo_jax import models

from .conftest import CASES, SIZES, torch_model

TOLERANCE = 1e-4
LENGTHS = (24, 15, 9)


def _padded(side: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, attention mask and positions of rows of several lengths."""
    width = max(LENGTHS)
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (len(LENGTHS), width))
    index = np.arange(width)
    lengths = LENGTHS if side else [width] * len(LENGTHS)
    real = np.stack([index >= width - n if side == "left" else index < n for n in lengths])
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    return tokens, real, positions


def _difference(name: str, model_config, params, side: str | None) -> tuple[float, float]:
    tokens, real, positions = _padded(side)
    torch_arguments = {"attention_mask": torch.tensor(real), "position_ids": torch.tensor(positions)}
    with torch.no_grad():
        expected = torch_model(name)(torch.tensor(tokens), **(torch_arguments if side else {})).logits.numpy()
    # The same arguments in every case, so that each model compiles once; tests of the defaults are in test_decoder.
    arguments = {"positions": jnp.array(positions), "segment_ids": jnp.array(real, jnp.int32)}
    arguments["branch_ids"] = jnp.zeros(real.shape, jnp.int32)
    got = np.asarray(models.apply(model_config, params, jnp.array(tokens), **arguments))
    assert np.isfinite(got).all()
    return float(np.abs(got - expected)[real].max()), float(np.abs(expected[real]).max())


def _packed_difference(name: str, model_config, params) -> float:
    """Rows that hold a prompt once with two responses as branches behind it, against a row for each response."""
    tokens, _, _ = _padded(None)
    prompt, response = 10, 7
    ends = prompt, prompt + response, prompt + 2 * response
    branches = np.repeat([0, 1, 2], [prompt, response, response])
    positions = np.concatenate([np.arange(ends[1]), np.arange(prompt, ends[1])])
    arguments = {"positions": positions, "segment_ids": np.ones_like(branches), "branch_ids": branches}
    arguments = {key: jnp.array(np.broadcast_to(ids, tokens.shape), jnp.int32) for key, ids in arguments.items()}
    got = np.asarray(models.apply(model_config, params, jnp.array(tokens), **arguments))
    with torch.no_grad():
        rows = (tokens[:, : ends[1]], np.delete(tokens, np.s_[prompt : ends[1]], axis=1))
        expected = [torch_model(name)(torch.tensor(row)).logits.numpy() for row in rows]
    separate = np.concatenate([expected[0], expected[1][:, prompt:]], axis=1)
    return float(np.abs(got - separate).max())


@pytest.mark.parametrize("name", CASES)
def test_parity_of_logits(name, hf_folder):
    model_config, params = models.load_pretrained(hf_folder(name))
    unpadded, size = _difference(name, model_config, params, None)
    right, _ = _difference(name, model_config, params, "right")
    left, _ = _difference(name, model_config, params, "left")
    packed = _packed_difference(name, model_config, params)
    # A row of the table in docs/families.md.
    print(f"\n| {name} | {model_config.family} | {unpadded:.1e} | {max(right, left):.1e} | {packed:.1e} | {size:.0f} |")
    assert size > 1  # small logits would agree for no good reason
    assert max(unpadded, right, left, packed) <= TOLERANCE
