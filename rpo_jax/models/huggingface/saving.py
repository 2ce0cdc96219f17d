"""Parameters to Hugging Face folders: written as they are, one tensor at a time in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from rpo_jax.core.files import atomic_directory
from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.decoder import Params, abstract_params
from rpo_jax.models.huggingface.configuration import to_transformers
from rpo_jax.models.huggingface.folders import WEIGHTS, WEIGHTS_INDEX, copy_tokenizer
from rpo_jax.models.huggingface.loading import DTYPES, check_dtype
from rpo_jax.models.huggingface.tensors import TensorLayout, flat_params, tensors_of

_STORED_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def save_pretrained(
    path: str | Path,
    model_config: ModelConfig,
    params: Params,
    *,
    tokenizer: Any = None,
    generation_config: Mapping[str, Any] | str | Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    readme: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a Hugging Face folder that transformers' AutoModelForCausalLM loads; whole or not at all.

    Args:
        path: folder to make; an existing one is refused unless `overwrite`.
        model_config: the architecture.
        params: NumPy or fully addressable jax arrays.
        tokenizer: a tokenizer, or a folder whose tokenizer files and chat template are copied.
        generation_config: its values, or a folder whose generation_config.json is copied; by default the
            architecture's special tokens.
        dtype: of the written tensors; by default the architecture's, so that load and save give equal bytes.
        max_shard_bytes: a larger model is split over several files with an index.
        readme: the folder's README.md.
        overwrite: replace an existing folder.
    """
    dtype = dtype or model_config.dtype
    check_dtype(dtype)
    tensors = tensors_of(model_config)
    flat = flat_params(params)
    _check_params(model_config, flat)
    target = Path(path).expanduser()
    with atomic_directory(target, overwrite=overwrite) as folder:
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
        if readme is not None:
            (folder / "README.md").write_text(readme, encoding="utf-8")
        to_transformers(model_config, dtype).save_pretrained(folder)
        _write_generation_config(folder, model_config, generation_config)
        _write_shards(folder, tensors, flat, dtype, max_shard_bytes)
    return target


def _check_params(model_config: ModelConfig, flat: Mapping[tuple[str, ...], Any]) -> None:
    expected = {path: leaf.shape for path, leaf in flat_params(abstract_params(model_config)).items()}
    got = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    wrong = sorted(path for path in expected.keys() | got.keys() if expected.get(path) != got.get(path))
    if wrong:
        path = wrong[0]
        raise ValueError(
            f"Parameter {'.'.join(path)} has shape {got.get(path)}; the architecture implies {expected.get(path)}."
        )


def _write_generation_config(folder: Path, model_config: ModelConfig, given: Any) -> None:
    from transformers import GenerationConfig

    if isinstance(given, str | Path):
        content = (Path(given).expanduser() / "generation_config.json").read_bytes()
        (folder / "generation_config.json").write_bytes(content)
        return
    eos = model_config.eos_token_id
    special = {
        "bos_token_id": model_config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": model_config.pad_token_id,
    }
    GenerationConfig(**(special | dict(given or {}))).save_pretrained(folder)


def _shards(tensors: Mapping[str, TensorLayout], item_bytes: int, limit: int) -> Iterator[list[str]]:
    """Keys of one file after another, in order, each file as full as `limit` bytes allow."""
    keys: list[str] = []
    size = 0
    for key, tensor in tensors.items():
        tensor_bytes = prod(tensor.shape) * item_bytes
        if keys and size + tensor_bytes > limit:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += tensor_bytes
    yield keys


def _write_shards(
    folder: Path,
    tensors: Mapping[str, TensorLayout],
    flat: Mapping[tuple[str, ...], Any],
    dtype: str,
    max_shard_bytes: int,
) -> None:
    item_bytes = np.dtype(DTYPES[dtype]).itemsize
    shards = list(_shards(tensors, item_bytes, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, {key: tensors[key] for key in keys}, flat, dtype)
        weight_map |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        total = sum(prod(tensor.shape) for tensor in tensors.values())
        index = {"metadata": {"total_size": total * item_bytes}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(
    file: Path, tensors: Mapping[str, TensorLayout], flat: Mapping[tuple[str, ...], Any], dtype: str
) -> None:
    """Write a safetensors file tensor by tensor: the library's save_file wants all of them in memory at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + prod(tensor.shape) * np.dtype(DTYPES[dtype]).itemsize
        header[key] = {"dtype": _STORED_NAMES[dtype], "shape": tensor.file_shape, "data_offsets": [start, end]}
    described = json.dumps(header, separators=(",", ":")).encode()
    described += b" " * (-len(described) % 8)  # the values begin where every dtype is aligned
    with file.open("wb") as stream:
        stream.write(len(described).to_bytes(8, "little") + described)
        for tensor in tensors.values():
            parameter = flat[tensor.rule.path]
            host = np.asarray(parameter if tensor.layer is None else parameter[tensor.layer])
            stored = np.ascontiguousarray(tensor.to_file(host), dtype=DTYPES[dtype])
            stream.write(stored.reshape(-1).view(np.uint8).data)
