"""Weights of Hugging Face folders to parameters and back: one table (families.WeightRule), read both ways.

safetensors only. Reading gives NumPy arrays on the host; the caller places them on devices.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.decoder import Params, abstract_params
from rpo_jax.models.families import FAMILIES, WeightRule, read_config, to_transformers
from rpo_jax.models.folders import (
    WEIGHTS,
    WEIGHTS_INDEX,
    copy_tokenizer,
    resolve_folder,
    safetensors_files,
    some,
    written_whole,
)

Shape = tuple[int, ...]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_FILE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Buffers that older versions of transformers wrote beside the weights; they follow from the configuration.
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")


class Layout(NamedTuple):
    """How a file's array relates to a parameter of one layer."""

    file_shape: Callable[[Shape], Shape]
    read: Callable[[np.ndarray, Shape], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


# torch stores a projection as [out, in]; here it is [*in axes, *out axes], heads apart from head_dim.
LAYOUTS: dict[str, Layout] = {
    "table": Layout(lambda shape: shape, lambda array, shape: array, lambda array: array),
    "vector": Layout(
        lambda shape: (prod(shape),), lambda array, shape: array.reshape(shape), lambda array: array.reshape(-1)
    ),
    "linear": Layout(
        lambda shape: (prod(shape[1:]), shape[0]),
        lambda array, shape: array.T.reshape(shape),
        lambda array: array.reshape(array.shape[0], -1).T,
    ),
    "joined_linear": Layout(
        lambda shape: (shape[-1], prod(shape[:-1])),
        lambda array, shape: array.T.reshape(shape),
        lambda array: array.reshape(-1, array.shape[-1]).T,
    ),
}


def _flat(params: Params) -> dict[tuple[str, ...], Any]:
    return dict(cast(Any, flatten_dict(params)))


class _Tensor(NamedTuple):
    """One tensor of a folder: its rule, the layer where it belongs to one, and the parameter's shape there."""

    rule: WeightRule
    layer: int | None
    shape: Shape

    @property
    def file_shape(self) -> Shape:
        return LAYOUTS[self.rule.layout].file_shape(self.shape)


def _tensors(model_config: ModelConfig) -> dict[str, _Tensor]:
    """Every tensor that a folder of this architecture must hold, in the order in which it is written."""
    parameters = _flat(abstract_params(model_config))
    rules = [rule for rule in FAMILIES[model_config.family].weights if rule.path in parameters]
    assert {rule.path for rule in rules} == set(parameters), "a parameter without a rule, or one with two"
    assert len(rules) == len(parameters), "two rules fill one parameter"
    layered = [rule for rule in rules if "{layer}" in rule.key]
    first, *rest = (rule for rule in rules if rule not in layered)
    tensors = {first.key: _Tensor(first, None, parameters[first.path].shape)}
    for layer in range(model_config.num_layers):
        for rule in layered:
            tensors[rule.key.format(layer=layer)] = _Tensor(rule, layer, parameters[rule.path].shape[1:])
    return tensors | {rule.key: _Tensor(rule, None, parameters[rule.path].shape) for rule in rest}


def check_pretrained(path: str | Path) -> ModelConfig:
    """Architecture of a Hugging Face folder or hub name, after checking that its weights fit; reads no tensor.

    Every tensor of the folder must fill exactly one place and every place must be filled; otherwise ValueError names
    them. The architecture's dtype is that of the folder's tensors, float32 where they are mixed.
    """
    folder = resolve_folder(path)
    model_config = read_config(folder)
    files = safetensors_files(folder)
    tensors = _tensors(model_config)
    _check_keys(folder, model_config, tensors, files)
    stored = _check_contents(folder, tensors, files)
    return dataclasses.replace(model_config, dtype=stored.pop() if len(stored) == 1 else "float32")


def load_pretrained(path: str | Path, dtype: str = "float32") -> tuple[ModelConfig, Params]:
    """Architecture and parameters of a Hugging Face folder or hub name; refuses what check_pretrained refuses.

    Returns:
        The architecture, and a nested dict of NumPy arrays of `dtype` in host memory.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}.")
    folder = resolve_folder(path)
    model_config = check_pretrained(folder)
    files = safetensors_files(folder)
    if model_config.tie_embeddings and "lm_head.weight" in files:
        _check_tied(folder, files)
    return model_config, unflatten_dict(_read(model_config, _tensors(model_config), files, dtype))


def _check_keys(
    folder: Path, model_config: ModelConfig, tensors: Mapping[str, _Tensor], files: Mapping[str, Path]
) -> None:
    missing = [key for key in tensors if key not in files]
    tied = {"lm_head.weight"} if model_config.tie_embeddings else set()
    unexpected = [key for key in files if key not in tensors and key not in tied and not _DERIVED.fullmatch(key)]
    problems = [f"lacks {some(missing)}"] if missing else []
    problems += [f"holds {some(unexpected)}, which nothing uses"] if unexpected else []
    if problems:
        raise ValueError(
            f"The weights in {folder} do not fit its config.json ({model_config.family}, {model_config.num_layers} "
            f"layers): the folder {' and '.join(problems)}."
        )


def _check_contents(folder: Path, tensors: Mapping[str, _Tensor], files: Mapping[str, Path]) -> set[str]:
    """Check each tensor's shape and dtype before any is read; returns the dtypes found."""
    from safetensors import safe_open

    found: set[str] = set()
    for file in sorted(set(files.values())):
        with safe_open(file, "numpy") as stored:
            for key in stored.keys() & tensors.keys():
                view = stored.get_slice(key)
                got, expected = tuple(view.get_shape()), tensors[key].file_shape
                if got != expected:
                    raise ValueError(f"{key} in {file} has shape {got}; {folder / 'config.json'} implies {expected}.")
                if view.get_dtype() not in _FILE_DTYPES:
                    raise ValueError(
                        f"{key} in {file} has dtype {view.get_dtype()}; supported are {', '.join(_FILE_DTYPES)}: "
                        "quantized weights must be converted first."
                    )
                found.add(_FILE_DTYPES[view.get_dtype()])
    return found


def _read(
    model_config: ModelConfig, tensors: Mapping[str, _Tensor], files: Mapping[str, Path], dtype: str
) -> dict[tuple[str, ...], np.ndarray]:
    from safetensors import safe_open

    parameters = _flat(abstract_params(model_config))
    filled = {path: np.empty(leaf.shape, DTYPES[dtype]) for path, leaf in parameters.items()}
    for file in sorted(set(files.values())):
        with safe_open(file, "numpy") as stored:
            for key in stored.keys() & tensors.keys():
                rule, layer, shape = tensors[key]
                target = filled[rule.path][... if layer is None else layer]
                target[...] = LAYOUTS[rule.layout].read(stored.get_tensor(key), shape)
    return filled


def _check_tied(folder: Path, files: Mapping[str, Path]) -> None:
    from safetensors import safe_open

    def raw(key: str) -> bytes:
        with safe_open(files[key], "numpy") as stored:
            return stored.get_tensor(key).tobytes()

    if raw("lm_head.weight") != raw("model.embed_tokens.weight"):
        raise ValueError(
            f"{folder / 'config.json'} ties the output head to the embedding (tie_word_embeddings), but lm_head.weight "
            "differs from model.embed_tokens.weight; set tie_word_embeddings to false."
        )


def save_pretrained(
    path: str | Path,
    model_config: ModelConfig,
    params: Params,
    *,
    tokenizer: Any = None,
    generation_config: Mapping[str, Any] | str | Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
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
        overwrite: replace an existing folder.
    """
    dtype = dtype or model_config.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}.")
    tensors = _tensors(model_config)
    flat = _flat(params)
    _check_params(model_config, flat)
    target = Path(path).expanduser()
    with written_whole(target, overwrite=overwrite) as folder:
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
        to_transformers(model_config, dtype).save_pretrained(folder)
        _write_generation_config(folder, model_config, generation_config)
        _write_shards(folder, tensors, flat, dtype, max_shard_bytes)
    return target


def _check_params(model_config: ModelConfig, flat: Mapping[tuple[str, ...], Any]) -> None:
    expected = {path: leaf.shape for path, leaf in _flat(abstract_params(model_config)).items()}
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


def _shards(tensors: Mapping[str, _Tensor], item_bytes: int, limit: int) -> Iterator[list[str]]:
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
    tensors: Mapping[str, _Tensor],
    flat: Mapping[tuple[str, ...], Any],
    dtype: str,
    max_shard_bytes: int,
) -> None:
    from safetensors.numpy import save_file

    def array(tensor: _Tensor) -> np.ndarray:
        parameter = flat[tensor.rule.path]
        host = np.asarray(parameter if tensor.layer is None else parameter[tensor.layer])
        # save_file writes the buffer as it lies in memory, so a transposed view must become an array of its own.
        return np.ascontiguousarray(LAYOUTS[tensor.rule.layout].write(host).astype(DTYPES[dtype]))

    item_bytes = np.dtype(DTYPES[dtype]).itemsize
    shards = list(_shards(tensors, item_bytes, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: array(tensors[key]) for key in keys}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        total = sum(prod(tensor.shape) for tensor in tensors.values())
        index = {"metadata": {"total_size": total * item_bytes}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
