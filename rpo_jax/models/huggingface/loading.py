"""Weights of Hugging Face folders to parameters: checked first, then read by slices, straight into shards.

safetensors only. Neither the model nor a parameter is ever whole in the memory of a host whose devices hold parts of
it: a device's part of one parameter is, and a block of a tensor of the file.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Sharding

from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.decoder import Params, abstract_params
from rpo_jax.models.families import FAMILIES
from rpo_jax.models.huggingface.configuration import is_text_part, read_config
from rpo_jax.models.huggingface.folders import Stored, resolve_folder, safetensors_files, some
from rpo_jax.models.huggingface.mxfp4 import SUFFIXES, Packed
from rpo_jax.models.huggingface.tensors import Index, Shape, TensorLayout, flat_params, tensors_of

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_FILE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# A file is mapped while it is read, and what has been touched stays in memory until it is closed.
READ_BYTES = 1 << 26
log = logging.getLogger(__name__)
# Buffers that older versions of transformers wrote beside the weights; they follow from the configuration.
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")
# The text part's tensors in a folder that also sees or hears, as transformers 4 and 5 name them.
_TEXT_PART = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(.*)")


def check_pretrained(path: str | Path) -> ModelConfig:
    """Architecture of a Hugging Face folder or hub name, after checking that its weights fit; reads no tensor.

    Every tensor of the folder must fill exactly one place and every place must be filled; otherwise ValueError names
    them. The architecture's dtype is that of the folder's tensors, float32 where they are mixed.
    """
    weights = open_weights(path)
    if weights.left_out:
        log.warning("%s: its text part is used; %d tensors of its other parts are left out.", path, weights.left_out)
    return weights.model_config


def load_pretrained(path: str | Path, dtype: str = "float32") -> tuple[ModelConfig, Params]:
    """Architecture and parameters of a Hugging Face folder or hub name; refuses what check_pretrained refuses.

    Returns:
        The architecture, and a nested dict of NumPy arrays of `dtype` in host memory.
    """
    check_dtype(dtype)
    weights = open_weights(path)
    weights.check_tied()
    shapes = flat_params(abstract_params(weights.model_config))
    filled = {place: weights.read(place, (slice(None),) * len(leaf.shape), dtype) for place, leaf in shapes.items()}
    return weights.model_config, unflatten_dict(filled)


def place(shape: Shape, sharding: Sharding, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """A sharded array from a function of the part that a device holds, called once for each part of this process.

    jax.make_array_from_callback keeps the parts of all devices in host memory until the last is read, and reads one
    anew for each of its copies.
    """
    holders: dict[tuple[tuple[int, int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        holders.setdefault(tuple(part.indices(size) for part, size in zip(index, shape, strict=True)), []).append(
            device
        )
    parts = []
    for bounds, devices in holders.items():
        part = read(tuple(slice(*bound) for bound in bounds))
        # Copied: an array that the step may give up must own its memory, on a CPU too.
        parts += [jax.device_put(part, device, may_alias=False) for device in devices]
        jax.block_until_ready(parts)
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def check_dtype(dtype: str, *more: str) -> None:
    """Raise ValueError unless the dtype is one of DTYPES or of `more`."""
    if dtype not in (*DTYPES, *more):
        raise ValueError(f"dtype={dtype!r} is not known; use one of {', '.join((*DTYPES, *more))}.")


Place: TypeAlias = Stored | Packed


class Weights(NamedTuple):
    """The weights of a folder that fit its architecture, none of them in memory.

    Attributes:
        files: for each tensor where it is.
        keys: for each parameter its tensors by their places: one per layer, and per expert, or a single one.
        left_out: how many tensors belong to other parts than text.
    """

    folder: Path
    model_config: ModelConfig
    tensors: Mapping[str, TensorLayout]
    files: Mapping[str, Place]
    keys: Mapping[tuple[str, ...], Mapping[tuple[int, ...], str]]
    left_out: int

    def read(self, path: tuple[str, ...], index: Index, dtype: Any) -> np.ndarray:
        """A part of a parameter; only that part of the files is read, in blocks of READ_BYTES."""
        keys = self.keys[path]
        last = max(keys)
        wanted = [range(size + 1)[part] for size, part in zip(last, index, strict=False)]
        inner = index[len(last) :]
        shape = _sizes(self.tensors[keys[last]].shape, inner)
        part = np.empty((*map(len, wanted), *shape), DTYPES[dtype])
        for number, place in enumerate(itertools.product(*wanted)):
            self._read_tensor(keys[place], inner, part.reshape(-1, *shape)[number])
        return part

    def place(self, path: tuple[str, ...], like: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
        """A parameter on devices, in the dtype of `like`."""
        return place(like.shape, sharding, lambda index: self.read(path, index, str(like.dtype)))

    def _read_tensor(self, key: str, index: Index, target: np.ndarray) -> None:
        tensor = self.tensors[key]
        axis = tensor.order[0]  # the slowest in the file
        start, stop, _ = index[axis].indices(tensor.shape[axis])
        row_bytes = target.nbytes // max(1, stop - start)
        # What is touched between the rows of a block counts as well.
        row_bytes = max(row_bytes, 4 * prod(tensor.shape) // tensor.shape[axis])
        step = max(1, READ_BYTES // row_bytes)
        for lower in range(start, stop, step):
            upper = min(stop, lower + step)
            block = tuple(slice(lower, upper) if number == axis else part for number, part in enumerate(index))
            into = tuple(
                slice(lower - start, upper - start) if number == axis else slice(None) for number in range(len(index))
            )
            target[into] = tensor.from_file(self.files[key].read(tensor.file_index(block)), block)

    def check_tied(self) -> None:
        """ValueError where a folder holds a head of its own that its configuration says is the embedding."""
        names = _tied_names(self.model_config)
        if not names or names[0] not in self.files:
            return
        rows, columns = self.tensors[names[1]].file_shape
        step = max(1, READ_BYTES // (4 * columns))
        blocks = (slice(start, min(rows, start + step)) for start in range(0, rows, step))
        same = self.files[names[0]].described() == self.files[names[1]].described()
        if not same or any(len({self.files[name].read((block,)).tobytes() for name in names}) > 1 for block in blocks):
            raise ValueError(
                f"{self.folder / 'config.json'} ties the output head to the embedding (tie_word_embeddings), but "
                f"{names[0]} differs from {names[1]}; set tie_word_embeddings to false."
            )


def _tied_names(model_config: ModelConfig) -> tuple[str, ...]:
    """The tensors of output head and embedding where they are one; a folder may hold both."""
    keys = {rule.path: rule.key for rule in FAMILIES[model_config.family].weights}
    return (keys[("head",)], keys[("embed",)]) if model_config.tie_embeddings else ()


def open_weights(path: str | Path) -> Weights:
    """The weights of a Hugging Face folder or hub name; errors as check_pretrained's."""
    folder = resolve_folder(path)
    model_config = read_config(folder)
    stored = {key: Stored(file, key) for key, file in safetensors_files(folder).items()}
    files: Mapping[str, Place] = stored
    if FAMILIES[model_config.family].reads_mxfp4:
        files = _unpacked(stored)
    if text_part := is_text_part(folder, model_config):
        files = {name: place for key, place in stored.items() if (name := _text_name(key))}
    if model_config.num_layers > len(files):  # before a name is made for each
        raise ValueError(
            f"{folder / 'config.json'} has {model_config.num_layers} layers; the {len(files)} tensors of the folder "
            "cannot fill them."
        )
    tensors = tensors_of(model_config)
    _check_keys(folder, model_config, tensors, files)
    dtypes = _check_contents(folder, tensors, files)
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    keys: dict[tuple[str, ...], dict[tuple[int, ...], str]] = {}
    for key, tensor in tensors.items():
        keys.setdefault(tensor.rule.path, {})[tensor.place] = key
    model_config = dataclasses.replace(model_config, dtype=dtype)
    left_out = len(stored) - len(files) if text_part else 0
    return Weights(folder, model_config, tensors, files, keys, left_out)


def _unpacked(files: Mapping[str, Stored]) -> dict[str, Place]:
    """The same where two tensors that stand for one in MXFP4 are that one."""
    blocks, scales = SUFFIXES
    packed = [key.removesuffix(blocks) for key in files if key.endswith(blocks)]
    named = {key: tuple(files[key + suffix] for suffix in SUFFIXES) for key in packed if key + scales in files}
    halves = {key + suffix for key in named for suffix in SUFFIXES}
    others = {key: place for key, place in files.items() if key not in halves}
    return others | {key: Packed(key, *two) for key, two in named.items()}


def _text_name(key: str) -> str | None:
    """The name in a folder of text alone; None for what is not of the text part."""
    if key.startswith("lm_head."):
        return key
    if (match := _TEXT_PART.fullmatch(key)) is None:
        return None
    return match[1] if match[1].startswith("lm_head.") else f"model.{match[1]}"


def _check_keys(
    folder: Path, model_config: ModelConfig, tensors: Mapping[str, TensorLayout], files: Mapping[str, Place]
) -> None:
    missing = [key for key in tensors if key not in files]
    tied = _tied_names(model_config)[:1]
    unexpected = [key for key in files if key not in tensors and key not in tied and not _DERIVED.fullmatch(key)]
    problems = [f"lacks {some(missing)}"] if missing else []
    problems += [f"holds {some(unexpected)}, which nothing uses"] if unexpected else []
    if problems:
        raise ValueError(
            f"The weights in {folder} do not fit its config.json ({model_config.family}, {model_config.num_layers} "
            f"layers): the folder {' and '.join(problems)}."
        )


def _check_contents(folder: Path, tensors: Mapping[str, TensorLayout], files: Mapping[str, Place]) -> set[str]:
    """Check each tensor's shape and dtype before any is read; returns the dtypes found."""
    dtypes: set[str] = set()
    for key, tensor in tensors.items():
        got, dtype = files[key].described()
        if got != tensor.file_shape:
            raise ValueError(
                f"{files[key].name} in {files[key].file} has shape {got}; {folder / 'config.json'} implies "
                f"{tensor.file_shape}."
            )
        if dtype not in _FILE_DTYPES:
            raise ValueError(
                f"{files[key].name} in {files[key].file} has dtype {dtype}; supported are {', '.join(_FILE_DTYPES)}: "
                "others, quantized weights among them, must be converted first."
            )
        dtypes.add(_FILE_DTYPES[dtype])
    return dtypes


def _sizes(shape: Shape, index: Index) -> Shape:
    return tuple(len(range(size)[part]) for size, part in zip(shape, index, strict=True))
