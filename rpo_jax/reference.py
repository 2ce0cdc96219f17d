"""Log-probs of the reference model, computed once over a data set and kept on disk.

Letters: n examples; one column per name in rpo_jax.types.RESPONSES.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.step import LogProbs, Params
from rpo_jax.types import RESPONSES, Batch, PreferenceData

FORMAT = "rpo_jax.reference_log_probs.1"

log = logging.getLogger(__name__)


def folder_fingerprint(folder: Path) -> str:
    """SHA-256 over the weights and config.json of a model folder."""
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def params_fingerprint(params: Params) -> str:
    """SHA-256 over parameters in memory: those of a model from scratch, which no folder holds."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def data_fingerprint(data: PreferenceData, responses: tuple[str, ...]) -> str:
    """SHA-256 over the token ids that are scored, and over what they follow: tokenizer and truncation are in it."""
    digest = hashlib.sha256(repr(responses).encode())
    for example in data.examples:
        for name in ("prompt", *responses):
            ids = getattr(example, f"{name}_ids")
            digest.update(b"-" if ids is None else len(ids).to_bytes(8, "little") + np.asarray(ids, np.int32).tobytes())
    return digest.hexdigest()


def compute_log_probs(
    batches: PreferenceBatches,
    log_probs: Callable[[Batch], LogProbs],
    num_examples: int,
    on_progress: Callable[[int, Mapping[str, float]], None],
) -> Float[np.ndarray, "n 3"]:
    """Log-probs of every response in one pass over `batches`; NaN where an example has no such response.

    Args:
        batches: must reach every example within an epoch.
        log_probs: host batch to the log-probs of its response slots.
        on_progress: gets the number of batches done.
    """
    result = np.full((num_examples, len(RESPONSES)), np.nan, np.float32)
    for step in range(batches.steps_per_epoch):
        batch = batches.batch_at(step)
        values, start = np.asarray(log_probs(batch).log_prob), 0
        for column, name in enumerate(RESPONSES):
            side = getattr(batch, name)
            valid = np.asarray(side.valid)
            result[side.example_index[valid], column] = values[start : start + len(valid)][valid]
            start += len(valid)
        on_progress(step + 1, {})
    return result


def read_cache(path: Path, fingerprint: str, num_examples: int) -> Float[np.ndarray, "n 3"] | None:
    """What `write_cache` wrote for this fingerprint; None, with a logged reason, where it is damaged or foreign."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            metadata, values = file.metadata() or {}, file.get_tensor("log_probs")
    except (SafetensorError, OSError) as error:
        log.warning("Reference log-probs in %s are computed again: %s.", path, error)
        return None
    expected = {"format": FORMAT, "fingerprint": fingerprint, "sha256": hashlib.sha256(values.tobytes()).hexdigest()}
    if metadata != expected or values.shape != (num_examples, len(RESPONSES)) or values.dtype != np.float32:
        log.warning("Reference log-probs in %s are computed again: the file is not what its header says.", path)
        return None
    return values


def write_cache(path: Path, fingerprint: str, values: Float[np.ndarray, "n 3"]) -> None:
    """Write beside, flush to disk, rename: a reader finds the whole file or none."""
    checksum = hashlib.sha256(values.tobytes()).hexdigest()
    content = save({"log_probs": values}, {"format": FORMAT, "fingerprint": fingerprint, "sha256": checksum})
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, beside = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def cached_log_probs(
    data: PreferenceData,
    batches: PreferenceBatches,
    settings: Sequence[object],
    cache_dir: Path,
    log_probs: Callable[[Batch], LogProbs],
    on_progress: Callable[[int, Mapping[str, float]], None],
) -> tuple[PreferenceData, bool]:
    """The data with the reference's log-probs filled in, and whether they came from the cache.

    Args:
        batches: one epoch reaches every example of `data`.
        settings: whatever else decides the values, such as the reference's weights and dtype; its repr is hashed.
        log_probs: called for each batch unless the cache has them all.
    """
    parts = repr((FORMAT, data_fingerprint(data, batches.responses), *settings))
    fingerprint = hashlib.sha256(parts.encode()).hexdigest()
    path = cache_dir / "reference_log_probs" / f"{fingerprint}.safetensors"
    values = read_cache(path, fingerprint, len(data.examples))
    found = values is not None
    if values is None:
        values = compute_log_probs(batches, log_probs, len(data.examples), on_progress)
        write_cache(path, fingerprint, values)
    return replace(data, reference_log_probs=values), found
