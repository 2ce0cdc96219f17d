"""Log-probs of the reference model, computed once over a data set and kept on disk.

One file for each kind of response, so that an objective that needs one more computes that one alone. A file is a
safetensors file of one vector; its header says what the values were computed from, part by part.

Letters: r responses of a data set, as rpo_jax.core.records.PreferenceData numbers them; k of one kind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import save

from rpo_jax.core.files import WriteFailed, atomic_write, check_writable
from rpo_jax.core.records import Batch, PreferenceData
from rpo_jax.core.store import DAMAGED, ByProduct, fault, load
from rpo_jax.data.reference_pass import ReferencePass
from rpo_jax.hosts import processes
from rpo_jax.training.micro_batches import LogProbs, Params

FORMAT = "rpo_jax.reference_log_probs.3"
FOLDER = "reference_log_probs"
HEADER_SIZE_BYTES = 8  # safetensors: the header's length, then the header, then the values

# What decides the values.
DECISIVE = ("format", "weights", "architecture", "compute_dtype", "tokens")
# Where the token ids come from: not compared to find a file, only to say why none was found.
ORIGINS = ("data", "tokenizer", "template", "truncation")
# What a message calls some of them; the others by their name.
WORDS = {"format": "cache's format", "compute_dtype": "compute dtype", "tokens": "token ids"}
READABLE = ("compute_dtype", "template", "truncation")  # the others are hashes
SLOT = ("slot", "response")  # files that differ in these have nothing to do with each other

_WHAT = "Reference log-probs"
_OTHER = "it is of something else than its name says"


def params_fingerprint(params: Params) -> str:
    """SHA-256 over parameters in memory: those of a model from scratch, which no folder holds."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(_whole(leaf).tobytes())
    return digest.hexdigest()


def _whole(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """The values of an array that may be spread over several processes."""
    spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True) if spread else leaf)


def tokens_fingerprint(data: PreferenceData, response: str) -> str:
    """SHA-256 over the token ids that are scored, and over what they follow."""
    digest = hashlib.sha256()
    for number in data.of_kind(response):
        for ids in (data.flat.prompt_of(number), data.response(number).ids):
            digest.update(len(ids).to_bytes(8, "little") + np.asarray(ids, np.int32).tobytes())
    return digest.hexdigest()


def compute_log_probs(
    passes: ReferencePass,
    log_probs: Callable[[Batch], LogProbs],
    on_progress: Callable[[int, Mapping[str, float]], None],
) -> Float[np.ndarray, "r"]:
    """Log-probs of every response that the pass reaches; NaN elsewhere.

    Args:
        log_probs: host batch to the log-probs of its response slots.
        on_progress: gets the number of batches done.
    """
    result = np.full(passes.num_responses, np.nan, np.float32)
    waiting = None
    for number in range(len(passes) + 1):
        dispatched = None
        if number < len(passes):
            batch, responses = passes.batch(number)
            dispatched = log_probs(batch).log_prob, responses
        if waiting is not None:  # read while the device works on the next one
            values, responses = waiting
            result[responses] = np.asarray(values)[: len(responses)]
            on_progress(number, {})
        waiting = dispatched
    return result


def _header(path: Path) -> dict[str, str]:
    """Metadata of a cache file; raises SafetensorError where the file is not whole."""
    with safe_open(path, framework="np") as file:
        return file.metadata() or {}


def _checksum(parts: Mapping[str, str], values: np.ndarray) -> str:
    """SHA-256 over the values and what the file says of them."""
    header = json.dumps({name: part for name, part in parts.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(header.encode() + np.ascontiguousarray(values).tobytes()).hexdigest()


def _read(path: Path) -> tuple[dict[str, str], Float[np.ndarray, "k"]]:
    """Metadata of a cache file, and its values, mapped; ValueError, SafetensorError or OSError where it is damaged."""
    with safe_open(path, framework="np") as file:
        header = file.metadata() or {}
        if list(file.keys()) != ["log_probs"] or file.get_slice("log_probs").get_dtype() != "F32":
            raise ValueError("it is no cache of reference log-probs")
    with path.open("rb") as stream:
        start = HEADER_SIZE_BYTES + int.from_bytes(stream.read(HEADER_SIZE_BYTES), "little")
    values = np.memmap(path, np.float32, "r", offset=start)
    if any(name not in header for name in ("response", *DECISIVE)):
        raise ValueError("it is no cache of reference log-probs: its header lacks what they are kept with")
    if header.get("sha256") != _checksum(header, values):
        raise ValueError("its content does not match its checksum")
    return header, values


def read_cache(path: Path, parts: Mapping[str, str], num_responses: int) -> Float[np.ndarray, "k"] | None:
    """What `write_cache` wrote for these parts, mapped from the file, not read into memory.

    None where there is no such file, and, with a logged reason, where it is damaged or not what it should be.
    """

    def read() -> Float[np.ndarray, "n"]:
        header, values = _read(path)
        if len(values) != num_responses or any(header[name] != parts[name] for name in ("response", *DECISIVE)):
            raise ValueError(_OTHER)
        return values

    return load(_WHAT, path, read) if path.exists() else None


def cache_file_fault(path: Path) -> str | None:
    """Why a file of the cache cannot be used for anything; None where it can."""

    def read() -> None:
        if path.stem != _name(_read(path)[0]):
            raise ValueError(_OTHER)

    return fault(read)


def _name(parts: Mapping[str, str]) -> str:
    """A cache file's name, by what decides its values."""
    decisive = json.dumps([parts[part] for part in ("response", *DECISIVE)])
    return hashlib.sha256(decisive.encode()).hexdigest()


def write_cache(path: Path, parts: Mapping[str, str], values: Float[np.ndarray, "k"]) -> None:
    """Keep the values; a reader finds the whole file or none."""
    atomic_write(path, save({"log_probs": values}, {**parts, "sha256": _checksum(parts, values)}))


def _check_finite(data: PreferenceData, response: str, log_probs: Float[np.ndarray, "k"]) -> None:
    for number, value in zip(data.of_kind(response), log_probs, strict=True):
        if not np.isfinite(value):
            raise ValueError(
                f"The reference gives {data.example_of(number).row_id} a {response} log-prob of {value}; check the "
                "reference's weights, or use model.compute_dtype=float32."
            )


def _age(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
        return path.stat().st_mtime
    return 0.0


def what_changed(folder: Path, parts: Mapping[str, str]) -> list[str]:
    """What the file that is nearest to these parts was computed from and they are not, in words.

    Empty where the folder has no file of the same data and response.
    """
    nearest, most = None, -1
    for path in sorted(folder.glob("*.safetensors"), key=_age):
        try:
            header = _header(path)
        except DAMAGED:
            continue
        if any(header.get(name) != parts[name] for name in SLOT):
            continue
        same = sum(header.get(name) == parts[name] for name in (*DECISIVE, *ORIGINS))
        if same >= most:  # the newest of those that are equally near
            nearest, most = header, same
    if nearest is None:
        return []
    changed = [name for name in DECISIVE if nearest.get(name) != parts[name]]
    if "tokens" in changed:
        origins = [name for name in ORIGINS if nearest.get(name) != parts[name]]
        changed = [name for name in changed if name != "tokens"] + (origins or ["tokens"])
    return [
        f"the {WORDS.get(name, name)}"
        + (f" ({nearest.get(name)} before, {parts[name]} now)" if name in READABLE else "")
        for name in changed
    ]


def cached_log_probs(
    data: PreferenceData,
    responses: tuple[str, ...],
    parts: Mapping[str, str],
    cache_dir: Path,
    compute: Callable[[tuple[str, ...]], Float[np.ndarray, "r"]],
    say: Callable[[str], None],
) -> tuple[PreferenceData, tuple[str, ...]]:
    """The data with the reference's log-probs filled in, and the kinds of response that had to be computed.

    Of several processes the first reads and writes its cache folder, and sends the others what it found.

    Args:
        parts: `slot`, DECISIVE without `format` and `tokens`, and ORIGINS.
        compute: from the kinds of response that the cache lacks to their log-probs; not called if it has them all.
        say: called with why values are computed again, where the cache has such values of something else.
    """
    places: dict[str, tuple[Path, dict[str, str]]] = {}

    def look() -> dict[str, np.ndarray | None]:
        by_kind: dict[str, np.ndarray | None] = {}
        reasons: dict[str, None] = {}
        for name in responses:
            own = {**parts, "format": FORMAT, "response": name, "tokens": tokens_fingerprint(data, name)}
            path = cache_dir / FOLDER / f"{_name(own)}.safetensors"
            by_kind[name] = read_cache(path, own, len(data.of_kind(name)))
            if by_kind[name] is None and not path.exists():
                reasons |= dict.fromkeys(what_changed(path.parent, own))
            places[name] = path, own
        if reasons:
            say(f"reference log-probs of {parts['slot']} are computed again: {', '.join(reasons)} changed")
        if any(values is None for values in by_kind.values()):
            try:  # before hours go into what cannot be kept
                check_writable(cache_dir / FOLDER)
            except WriteFailed as error:
                say(f"run.cache_dir: {error}; reference log-probs are computed, and not kept for the next run")
        return by_kind

    cached = processes.from_main(look)
    log_probs, kept = np.full(data.num_responses, np.nan, np.float32), ByProduct(_WHAT)
    missing = tuple(name for name, values in cached.items() if values is None)
    computed = compute(missing) if missing else log_probs
    for name, values in cached.items():
        numbers = data.of_kind(name)
        log_probs[numbers] = computed[numbers] if values is None else values
        if values is None:
            _check_finite(data, name, log_probs[numbers])
            if processes.is_main():
                kept.write(partial(write_cache, *places[name], log_probs[numbers]))
    return replace(data, reference_log_probs=log_probs), missing
