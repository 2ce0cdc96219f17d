"""Parameters to Hugging Face folders: written as they are, one tensor at a time in memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rpo_jax.core.files import atomic_directory, read_json
from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.decoder import Params, abstract_params
from rpo_jax.models.families.family import WeightRule
from rpo_jax.models.huggingface.configuration import to_transformers, write_config
from rpo_jax.models.huggingface.folders import WEIGHTS, WEIGHTS_INDEX, copy_tokenizer
from rpo_jax.models.huggingface.loading import DTYPES, check_dtype
from rpo_jax.models.huggingface.tensors import TensorLayout, flat_params, tensors_of

RENDERING = "rpo_jax.json"  # of a reward model: how texts become the tokens that it was trained on
_SCORE = "score.weight"
_STORED_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class RewardHead(NamedTuple):
    """What makes a sequence-classification model of a decoder.

    kernel: of the score. pad_id: the token that is not scored. rendering: what RENDERING is to hold.
    """

    kernel: np.ndarray
    pad_id: int
    rendering: Mapping[str, Any]


def classifier_name(model_config: ModelConfig) -> str:
    """transformers' class of sequence-classification models of this family; ValueError where it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    kind = to_transformers(model_config, model_config.dtype).model_type
    if kind not in KNOWN:
        raise ValueError(
            f"transformers has no sequence-classification model of the type {kind}, as which a reward model is "
            "exported; start from another family."
        )
    return KNOWN[kind]


def save_pretrained(
    path: str | Path,
    model_config: ModelConfig,
    params: Params,
    *,
    config: str | Path | None = None,
    tokenizer: Any = None,
    generation_config: Mapping[str, Any] | str | Path | None = None,
    end_ids: Collection[int] = (),
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    readme: str | None = None,
    overwrite: bool = False,
    reward: RewardHead | None = None,
) -> Path:
    """Write a Hugging Face folder that AutoModelForCausalLM of transformers 4 and 5 loads alike; whole or not at all.

    Files of other folders are copied byte for byte where nothing in them is to change.

    Args:
        path: folder to make; an existing one is refused unless `overwrite`.
        model_config: the architecture.
        params: NumPy or fully addressable jax arrays.
        config: folder of the model that these weights descend from, whose config.json is kept.
        tokenizer: a tokenizer, or a folder whose tokenizer files and chat template are copied.
        generation_config: its values, or a folder whose generation_config.json is copied; by default the
            architecture's special tokens.
        end_ids: tokens that end an answer, besides those of the architecture and of the generation_config; all of them
            are written there.
        dtype: of the written tensors; by default the architecture's, so that load and save give equal bytes.
        max_shard_bytes: a larger model is split over several files with an index.
        readme: the folder's README.md.
        overwrite: replace an existing folder.
        reward: write a model for AutoModelForSequenceClassification instead: this head in the place of the words'.
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
        write_config(folder, model_config, dtype, None if config is None else Path(config).expanduser())
        if reward is not None:
            tensors = {key: tensor for key, tensor in tensors.items() if tensor.rule.path != ("head",)}
            rule = WeightRule(_SCORE, ("score",), "table")
            tensors[_SCORE], flat[rule.path] = TensorLayout(rule, (), (1, len(reward.kernel))), reward.kernel[None]
            _make_classifier(folder, model_config, reward)
        _write_generation_config(folder, model_config, generation_config, end_ids)
        _write_shards(folder, tensors, flat, dtype, max_shard_bytes)
    return target


def _make_classifier(folder: Path, model_config: ModelConfig, reward: RewardHead) -> None:
    labels: dict[str, Any] = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": reward.pad_id}
    values = read_json(folder, "config.json") | labels | {"architectures": [classifier_name(model_config)]}
    for name, content in (("config.json", values), (RENDERING, reward.rendering)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_params(model_config: ModelConfig, flat: Mapping[tuple[str, ...], Any]) -> None:
    expected = {path: leaf.shape for path, leaf in flat_params(abstract_params(model_config)).items()}
    got = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    wrong = sorted(path for path in expected.keys() | got.keys() if expected.get(path) != got.get(path))
    if wrong:
        path = wrong[0]
        raise ValueError(
            f"Parameter {'.'.join(path)} has shape {got.get(path)}; the architecture implies {expected.get(path)}."
        )


def _write_generation_config(
    folder: Path, model_config: ModelConfig, generation_config: Any, end_ids: Collection[int]
) -> None:
    """The given values with every end token: what generates takes its end tokens from this file alone."""
    from transformers import GenerationConfig

    name, source, values = "generation_config.json", None, {}
    if isinstance(generation_config, str | Path):
        source = Path(generation_config).expanduser()
        values = read_json(source, name)
    else:
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        values = {key: getattr(model_config, key) for key in special} | dict(generation_config or {})
    listed = _token_ids(values.get("eos_token_id"), source and source / name)
    further = sorted({*_token_ids(model_config.eos_token_id), *end_ids} - {*listed})
    ends = listed + further
    values["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    if source is None:
        GenerationConfig(**values).save_pretrained(folder)
    elif further:
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        (folder / name).write_bytes((source / name).read_bytes())


def _token_ids(value: Any, file: Path | None = None) -> list[int]:
    """The ids of a setting that may be absent, one, or several."""
    ids = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if not all(type(number) is int for number in ids):
        raise ValueError(f"{file}: eos_token_id must be a token's number or a list of them, got {str(value)[:100]}.")
    return ids


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
            host = np.asarray(parameter[tensor.place] if tensor.place else parameter)
            stored = np.ascontiguousarray(tensor.to_file(host), dtype=DTYPES[dtype])
            stream.write(stored.reshape(-1).view(np.uint8).data)
